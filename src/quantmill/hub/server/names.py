"""Which names a repository, a branch and a file may have; everything else is refused before it is used.

Files are never stored under their names here, but readers put them on their disks: what could leave a folder
there, or look like another name, is no name. Raises Refusal (400).
"""

from __future__ import annotations

import re

from quantmill.hub.paths import path_fault
from quantmill.hub.server.refusal import bad

RESERVED = ("api", "datasets", "spaces", "models", "resolve")

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OID = re.compile(r"[0-9a-f]{64}")


def repository_name(owner: str, name: str) -> str:
    """`owner/name`, checked: ASCII letters, digits, `.`, `_`, `-`, as on the public hub."""
    for part in (owner, name):
        if not _PART.fullmatch(part) or ".." in part or "--" in part or part.endswith((".git", ".lock")):
            raise bad(f"{_shown(part)} cannot be part of a repository's name: use letters, digits, . _ and -")
    if owner.lower() in RESERVED:
        raise bad(f"{owner} is a word of the protocol: choose another owner")
    return f"{owner}/{name}"


def branch_name(name: str) -> str:
    """A branch that git and every file system can hold."""
    parts = name.split("/")
    wrong = ".." in name or name == "HEAD" or _COMMIT.fullmatch(name) or _OID.fullmatch(name)
    odd = any(not p or p.startswith(".") or p.endswith((".", ".lock")) for p in parts)
    if not _BRANCH.fullmatch(name) or wrong or odd:
        raise bad(f"{_shown(name)} cannot be a branch: use letters, digits, . _ - and single slashes")
    return name


def file_path(path: str) -> str:
    """A path that stays where it is put, on every system."""
    if fault := path_fault(path):
        raise bad(f"the path {_shown(path)} {fault}: rename the file")
    return path


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit's full hash."""
    return bool(_COMMIT.fullmatch(revision))


def object_id(oid: object) -> str:
    """The sha256 of an LFS object."""
    if not isinstance(oid, str) or not _OID.fullmatch(oid):
        raise bad("an object's id is its sha256: 64 digits and small letters")
    return oid


def _shown(text: str) -> str:
    """A hostile name in a message: short and plain ASCII."""
    return ascii(text[:60])
