"""A hub as huggingface_hub shows it: what a revision holds, and its errors in our words.

Knows the protocol's errors and hashes; publish.py and download.py know what to do.
"""

from __future__ import annotations

import hashlib
import importlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadCheckpoint, BadRequest, QuantmillError, SourceNotFound
from quantmill.hub.paths import path_fault
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


def transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's HTTP client, which has changed its name, raises when a connection fails."""
    from huggingface_hub import get_session

    module = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return (module.TransportError, ConnectionError, TimeoutError)


@contextmanager
def in_our_words(name: str) -> Iterator[None]:
    """Turns errors of huggingface_hub about repository `name` into ours: one line, with the cure."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise BadRequest(f"{name} is no repository name: write owner/name") from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceNotFound(f"HF_HUB_OFFLINE is set, and {name} has to be asked for: unset it") from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceNotFound(f"the hub is out of reach, and the cache does not hold {name}") from error
    except errors.RevisionNotFoundError as error:
        raise SourceNotFound(
            f"{name} has no such branch: type quantmill branches {name.partition(':')[0]}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceNotFound(
            f"there is no repository {name} that you may see: check it, or 'hf auth login'"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(name, error) from error
    except transport_errors() as error:
        raise SourceNotFound(f"the hub did not answer about {name} ({error}): type the same again") from error


def _http_error(name: str, error: Exception) -> QuantmillError:
    """A refusal that a token may cure, or anything else that a hub can answer."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = (response.headers.get("X-Error-Message") if response is not None else None) or "no reason given"
    if status in (401, 403):
        return BadRequest(f"the hub refused {name} ({said}): set HF_TOKEN to a token with that right")
    if status == 429:
        return QuantmillError(
            f"the hub takes no more requests from you for now (429 at {name}){_patience(response)}: wait, then "
            "type the same again; what arrived is not sent or fetched twice"
        )
    if status is not None and status >= 500:
        return QuantmillError(
            f"the hub is in trouble ({status} at {name}, {said}): type the same again in a few minutes; what "
            "arrived is not sent or fetched twice"
        )
    if status == 412:
        return BadRequest(f"somebody else changed {name} meanwhile: type the same again")
    return QuantmillError(f"the hub failed at {name} with {status} ({said}): type the same again later")


def _patience(response: Any) -> str:
    """How long a hub asks to wait."""
    said = response.headers.get("Retry-After", "")
    return f", for {said} s" if said.isdecimal() else ""
