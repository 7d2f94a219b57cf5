"""What the command line's parser and the operating system refuse -> one line with the cure.

Errors of our own carry their line already (errors.py). What is in neither is a bug, and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import typer

from quantmill.files import FULL, UNFINISHED

# Typer brings a Click of its own and exports the leaf alone.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_CURES = {
    errno.ENOSPC: "make room, or name another disk",
    errno.EDQUOT: "make room, or name another disk",
    errno.EFBIG: "that file system takes no file of such a size: name another disk",
    errno.EROFS: "name a folder that you may write to",
    errno.EACCES: "name another, or mend its rights",
    errno.EPERM: "name another, or mend its rights",
    errno.ENOENT: "name a path that exists",
    errno.ENOTDIR: "name a folder there",
    errno.EISDIR: "name a file there",
    errno.EEXIST: "name another",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "type 'ulimit -n 4096' first",
    errno.ENOMEM: "close other programs, or give --max-ram",
}


# What has another name in a neighbouring command.
_OTHER_NAMES = {
    ("eval", "--dataset"): "--text",
    ("eval", "--seqlen"): "--ctx",
    ("eval", "--samples"): "--windows",
    ("quantize", "--text"): "--dataset",
    ("quantize", "--ctx"): "--seqlen",
    ("quantize", "--group"): "--group-size",
    ("generate", "--max-tokens"): "--max-new-tokens",
    ("chat", "--max-tokens"): "--max-new-tokens",
}

_GOES_ON = {
    "quantize": " (the same command with --resume goes on)",
    **dict.fromkeys(("demo", "download", "publish"), " (the same command goes on)"),
}


def usage_line(error: Exception) -> str:
    """The parser's complaint, what is possible, and where to read more; the help itself where nothing was typed."""
    message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
    if "\n" in message:
        return message
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "quantmill"
    if other := _OTHER_NAMES.get((command.rpartition(" ")[2], str(getattr(error, "option_name", "")))):
        message = f"no such option: {getattr(error, 'option_name', '')} (here it is called {other})"
    return f"quantmill: {message[:1].lower()}{message[1:]}; type {command} --help"


def system_line(error: OSError) -> str | None:
    """What the operating system refused, and the cure; None for what no user can mend."""
    cure = _CURES.get(error.errno or 0)
    if cure is None:
        return None
    place = f"{_known(str(error.filename))}: " if error.filename else ""
    goes_on = _goes_on() if error.errno in FULL else ""
    return f"quantmill: {place}{error.strerror}: {cure}{goes_on}"


def _known(name: str) -> str:
    """The path, or its part that somebody typed: what is being written has a name of ours."""
    parts = Path(name).parts
    ours = next((i for i, part in enumerate(parts) if part.endswith(f".{UNFINISHED}")), len(parts))
    return str(Path(*parts[:ours]))


def interrupted_line() -> str:
    """What is left after Ctrl-C."""
    return f"quantmill: interrupted{_goes_on()}"


def _goes_on() -> str:
    return _GOES_ON.get("".join(sys.argv[1:2]), "")
