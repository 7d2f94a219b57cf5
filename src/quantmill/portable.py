"""What of a run's record may leave this machine: names, not paths. Knows no reports."""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PurePath
from typing import Any

_PATHS = ("/", "~", "./", "../")
_NAMED = ("source", "original", "model", "path", "folder", "out", "file", "dataset", "text", "base")
# A path inside a sentence: from the root or a home, at least two parts; no URL, no fraction, no closing tag.
_WITHIN = re.compile(r"(?<![\w/:.<~-])(?:~|/[\w.@+-]+|[A-Za-z]:\\[\w.@+-]+)(?:[/\\][\w.@+-]+)+[/\\]?")


def public_name(text: str) -> str:
    """A path on the maker's machine without its folders; anything else as it is."""
    return PurePath(text).name if text.startswith(_PATHS) else text


def public_source(text: str) -> str:
    """What the user named as the original: a repository as it is, a folder or file of theirs by its name."""
    local = text.startswith(_PATHS) or Path(text).exists()
    return Path(text).expanduser().absolute().name if local else text


def public_command(command: str) -> str:
    """A command with its paths cut short: it shows what was asked for, not whose disk it was."""
    try:
        words = shlex.split(command)
    except ValueError:  # an odd quote
        words = command.split()
    short = []
    for word in words:
        option, equals, value = word.partition("=")
        short.append(f"{option}={public_name(value)}" if equals else public_name(word))
    return shlex.join(short)


def public_text(text: str) -> str:
    """A sentence whose paths are cut to their last part."""
    return _WITHIN.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def public_json(value: Any, key: str = "") -> Any:
    """A JSON value without the folders of whoever made it: commands, named paths, and paths in sentences.

    Applied twice it does nothing more, so `public_json(value) == value` says that nothing has to be cut.
    """
    if isinstance(value, dict):
        return {k: public_json(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [public_json(v, key) for v in value]
    if not isinstance(value, str):
        return value
    if key == "command":
        return public_text(public_command(value))
    return public_name(value) if key in _NAMED and "\n" not in value else public_text(value)
