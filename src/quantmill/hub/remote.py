"""A hub as huggingface_hub shows it: what a revision holds.

Knows the protocol's hashes; publish.py and download.py know what to do, hub_errors.py what errors mean.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.errors import BadCheckpoint
from quantmill.hub.paths import path_fault
from quantmill.hub_errors import in_our_words
from quantmill.sources import split_branch

if TYPE_CHECKING:
    from huggingface_hub import HfApi

AT_ONCE = 1 << 20  # bytes
PAPERS = ("*.json", "*.jinja", "*.txt", "*.model")
LARGE = 100_000_000  # bytes from which no hub keeps a file in git itself


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit. `sha256` where it is stored as a large one, else git's `blob`."""

    path: str
    size: int
    blob: str
    sha256: str | None
    xet: bool

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@dataclass(frozen=True, slots=True)
class Hashes:
    """A file of this disk by both names that a hub may know it by; a large one has no `blob`."""

    size: int
    sha256: str
    blob: str

    def same(self, other: RemoteFile) -> bool:
        return self.size == other.size and other.etag in (self.sha256, self.blob)


def hash_file(path: Path) -> Hashes:
    """Both hashes in one reading, without a copy: the file must not be cut meanwhile."""
    size = path.stat().st_size
    large, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        if size:
            with (
                mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as view,
            ):
                for begin in range(0, size, AT_ONCE):
                    large.update(view[begin : begin + AT_ONCE])
                    if size < LARGE:
                        git.update(view[begin : begin + AT_ONCE])
    return Hashes(size, large.hexdigest(), git.hexdigest() if size < LARGE else "")


def list_files(api: HfApi, name: str, commit: str) -> dict[str, RemoteFile]:
    """Every file of a commit. Raises BadCheckpoint for a path that no folder should hold."""
    from huggingface_hub.hf_api import RepoFile

    found = {}
    for item in api.list_repo_tree(name, revision=commit, recursive=True):
        if not isinstance(item, RepoFile):
            continue
        if fault := path_fault(item.path):
            raise BadCheckpoint(f"{name} has a file whose path {fault}: {item.path[:80]!a}; do not use it")
        sha256 = item.lfs.sha256 if item.lfs else None
        found[item.path] = RemoteFile(item.path, item.size, item.blob_id, sha256, bool(item.xet_hash))
    return found


def fetch_papers(asked: str) -> Path:
    """The small files of `owner/name[:branch]` in the shared cache, without weights. Raises as in_our_words."""
    from huggingface_hub import snapshot_download

    name, branch = split_branch(asked)
    with in_our_words(asked):
        return Path(snapshot_download(name, revision=branch, allow_patterns=list(PAPERS)))


def token_header(api: HfApi) -> dict[str, str]:
    """What to send with a request of our own: the user's token from the usual places, if there is one."""
    from huggingface_hub import get_token

    token = api.token if isinstance(api.token, str) else get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


@contextmanager
def quiet_bars(quiet: bool) -> Iterator[None]:
    """Where we carry the bytes and count them, huggingface_hub's own bars would stay empty: they are not shown."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
