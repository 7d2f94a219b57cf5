"""What of a run's record may leave this machine: names, not paths. Knows no reports."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePath

_PATHS = ("/", "~", "./", "../")


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
