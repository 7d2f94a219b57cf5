"""Which path of a file in a repository may be written to a disk. Used by the hub in a box and by our download.

A repository is somebody else's: what could leave the folder there, look like another name, or mean something
else on another system, is refused.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_PATH, LONGEST_PART, DEEPEST = 1024, 255, 32  # bytes, bytes, folders
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, invisible, unassigned

_ESCAPED = re.compile(
    r"%(?:2e|2f|5c|00|25)", re.IGNORECASE
)  # . / \ NUL %, for whoever unquotes once too often


def path_fault(path: str) -> str | None:
    """What is wrong with a path, None where it is a plain relative one with forward slashes, composed (NFC)."""
    parts = path.split("/")
    alike = unicodedata.normalize("NFKC", path).replace("\\", "/").split("/")  # full-width dots and slashes
    if path != unicodedata.normalize("NFC", path) or any(unicodedata.category(c) in _HIDDEN for c in path):
        return "has characters that cannot be seen or told apart"
    if any(p in ("", ".", "..") or p.endswith((" ", ".")) or p.startswith(" ") for p in parts):
        return "is not a plain relative one, as folder/file"
    if ".." in alike or _ESCAPED.search(path):
        return "could be taken for one that leaves its folder"
    if "\\" in path or ":" in path or any(p.lower() in (".git", "git~1") for p in parts):
        return "means something else on other systems"
    sizes = [len(p.encode()) for p in parts]
    if max(sizes) > LONGEST_PART or sum(sizes) + len(parts) > LONGEST_PATH or len(parts) > DEEPEST:
        return f"is longer than {LONGEST_PATH} bytes, or too deep"
    return None
