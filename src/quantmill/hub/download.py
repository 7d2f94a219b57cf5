"""A revision on a hub -> a folder on this disk, every file proved by its hash.

    sizes -> room on the disk? -> large files, each resumed where it stopped -> the rest -> all hashes

Large files go into partial files that carry their hash in their name, and get their own name only when they have
that hash; config.json comes after them, so half a model is no model. Small files, links and the shared cache's
layout are huggingface_hub's business.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from quantmill.errors import BadRequest, QuantmillError, SourceNotFound
from quantmill.files import read_json
from quantmill.hub import wire
from quantmill.hub.remote import (
    RemoteFile,
    hash_file,
    list_files,
    quiet_bars,
    token_header,
)
from quantmill.hub.streams import Digest, pump, write_all
from quantmill.hub_errors import in_our_words, transport_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WORKERS = 4
PASSING = (429, 500, 502, 503, 504)  # a hub that is asked again after a while
ATTEMPTS = 5  # connections per file that end too early and bring nothing
SPARE = 64_000_000  # bytes of the disk that stay free
PARTIAL = ".quantmill-partial"
WEIGHTS = (".safetensors", ".gguf")
NEVER = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
)  # pickles, and other frameworks'


@dataclass(frozen=True, slots=True)
class Place:
    """Where a revision goes: the shared cache, or a folder of the user's."""

    name: str
    cache: Path
    local: Path | None

    @property
    def blobs(self) -> Path:
        return self.cache / f"models--{self.name.replace('/', '--')}" / "blobs"

    def target(self, file: RemoteFile) -> Path:
        return self.local / file.path if self.local else self.blobs / file.etag

    def partial(self, file: RemoteFile) -> Path:
        folder = self.local / ".cache" / "huggingface" / "download" if self.local else self.blobs
        return folder / f"{file.etag}{PARTIAL}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a download will do, before it starts. Sizes in bytes."""

    place: Place
    branch: str
    commit: str
    files: Mapping[str, RemoteFile]
    missing: tuple[RemoteFile, ...]
    left: int  # bytes still to fetch
    free: int  # bytes free on the disk

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files.values())


def plan(name: str, branch: str | None, api: HfApi, cache: Path | None, local: Path | None) -> Plan:
    """Look, fetch nothing. Raises SourceNotFound, BadRequest (the disk is too full), BadCheckpoint (odd paths)."""
    from huggingface_hub import constants

    place = Place(name, Path(cache or constants.HF_HUB_CACHE).expanduser(), local)
    with in_our_words(f"{name}:{branch}" if branch else name):
        commit = str(api.model_info(name, revision=branch).sha)
        files = {p: f for p, f in list_files(api, name, commit).items() if not p.lower().endswith(NEVER)}
    missing = tuple(f for f in files.values() if not _there(place.target(f), f))
    left = sum(f.size - _begun(place.partial(f)) for f in missing)
    free = shutil.disk_usage(_existing(place.local or place.cache)).free
    if left + SPARE > free:
        raise BadRequest(
            f"{left:,} bytes are to be fetched and {free:,} are free at {place.local or place.cache}: "
            "make room, or name another disk with --cache-dir or --local-dir"
        )
    return Plan(place, branch or "main", commit, files, missing, left, free)


def _there(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _begun(partial: Path) -> int:
    return partial.stat().st_size if partial.is_file() else 0


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


Advance = Callable[[int], None]


def fetch(plan: Plan, api: HfApi, advance: Advance) -> Path:
    """Carry the plan out. `advance` hears of every byte that comes. Returns the folder.

    Raises SourceNotFound (hub out of reach) and QuantmillError (what came has not the hash that it should have).
    """
    from huggingface_hub import snapshot_download

    place = plan.place
    large = [f for f in plan.missing if f.sha256 and not f.xet]
    with in_our_words(place.name), ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda f: _fetch_large(f, plan, api, advance), large))
        _note_proved(plan, large)
        with quiet_bars(not any(f.xet for f in plan.missing)):
            folder = Path(
                snapshot_download(
                    place.name,
                    revision=plan.commit,
                    cache_dir=place.cache,
                    local_dir=place.local,
                    endpoint=api.endpoint,
                    token=api.token,
                    ignore_patterns=[f"*{suffix}" for suffix in NEVER],
                    max_workers=WORKERS,
                )
            )
    advance(sum(f.size for f in plan.missing if f not in large))
    _prove(folder, [f for f in plan.files.values() if f not in large], plan)
    _name_branch(plan)
    return folder


def _note_proved(plan: Plan, files: Sequence[RemoteFile]) -> None:
    """Let huggingface_hub know what lies in a folder already: it would hash all of it once more."""
    from huggingface_hub._local_folder import write_download_metadata

    if plan.place.local is not None:
        for file in files:
            write_download_metadata(plan.place.local, file.path, plan.commit, file.etag)


def _fetch_large(file: RemoteFile, plan: Plan, api: HfApi, advance: Advance) -> None:
    """One file, from where an earlier run stopped; it gets its name when it has its hash."""
    partial, target = plan.place.partial(file), plan.place.target(file)
    for folder in (partial.parent, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as stream:
        stream.seek(0, os.SEEK_END)
        fcntl.flock(stream, fcntl.LOCK_EX)  # two runs of the same download take turns
        if _there(target, file):
            return
        advance(min(stream.tell(), file.size) - _begun(partial))
        with Digest(stream) as digest:
            _append(_Part(stream, digest), file, plan, api, advance)
            os.fsync(stream.fileno())
            found = digest.hexdigest(file.size)
        if found != file.sha256:
            partial.unlink()
            raise QuantmillError(f"{file.path} came with another hash than the hub says: type the same again")
        partial.replace(target)


@dataclass(frozen=True, slots=True)
class _Part:
    """A partial file, and the digest that follows it as it grows."""

    stream: BinaryIO
    digest: Digest

    @property
    def size(self) -> int:
        return self.stream.tell()

    def restart(self) -> None:
        """Forget everything."""
        self.digest.restart()
        self.stream.seek(0)
        self.stream.truncate()


def _append(out: _Part, file: RemoteFile, plan: Plan, api: HfApi, advance: Advance) -> None:
    """Fetch what is missing at the end; a connection that breaks is followed by the next one."""
    if out.size > file.size:
        out.restart()
    fruitless = 0
    while (begin := out.size) < file.size:
        try:
            _stream(out, file, plan, api, advance)
        except transport_errors() as error:
            fruitless = 0 if out.size > begin else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise SourceNotFound(
                    f"the connection to the hub broke at {file.path} ({error}): type the same again"
                ) from None
            time.sleep(min(30, 2**fruitless - 1))


def _stream(out: _Part, file: RemoteFile, plan: Plan, api: HfApi, advance: Advance) -> None:
    """One connection. Raises transport_errors(), and QuantmillError for a refusal."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(plan.place.name, file.path, revision=plan.commit, endpoint=api.endpoint)
    headers = token_header(api) | {"Range": f"bytes={out.size}-", "Accept-Encoding": "identity"}
    if not wire.is_direct(url) or not _stream_direct(out, file, url, headers, advance):
        _stream_by_client(out, file, url, headers, advance)


def _stream_direct(
    out: _Part, file: RemoteFile, url: str, headers: Mapping[str, str], advance: Advance
) -> bool:
    """Over a connection of our own. False where the hub sends us elsewhere, or has objections: nothing came."""
    with wire.connection(url) as (link, target):
        link.request("GET", target, headers=dict(headers))
        answer = link.getresponse()
        if answer.status not in (200, 206):
            return False
        body = wire.body_of(link, answer)
        if body is None:
            return False
        _settle(out, answer.status, body.left, file)

        pump(body, out.stream, out.digest, file.size - out.size, advance)
        if out.size < file.size:
            raise ConnectionError("the connection ended too early")
    return True


def _settle(out: _Part, status: int, length: int, file: RemoteFile) -> None:
    """Take the head of an answer: where ranges are not known, from the start. Raises QuantmillError: too long."""
    if status != 206:
        out.restart()
    if length >= 0 and out.size + length > file.size:
        raise QuantmillError(f"{file.path} is longer than the hub says: type the same again")


def _stream_by_client(
    out: _Part, file: RemoteFile, url: str, headers: dict[str, str], advance: Advance
) -> None:
    """Over huggingface_hub's client: TLS, proxies, redirections."""
    from huggingface_hub import get_session

    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as answer:
        if answer.status_code in PASSING:
            raise ConnectionError(f"the hub answered {answer.status_code}")
        if answer.status_code >= 400:
            raise QuantmillError(
                f"the hub answered {answer.status_code} for {file.path}: type the same again"
            )
        _settle(out, answer.status_code, -1, file)
        for chunk in answer.iter_raw():
            if out.size + len(chunk) > file.size:
                raise QuantmillError(f"{file.path} is longer than the hub says: type the same again")
            write_all(out.stream, memoryview(chunk))
            out.digest.grown_to(out.size)
            advance(len(chunk))


def _prove(folder: Path, files: Sequence[RemoteFile], plan: Plan) -> None:
    """Every file that was not proved when it came. A wrong one is removed, so that the next run fetches it."""
    for file in files:
        path = folder / file.path
        if not hash_file(path).same(file):
            path.resolve().unlink()
            raise QuantmillError(f"{path} is damaged and was removed: type the same again")


def _name_branch(plan: Plan) -> None:
    """Let the shared cache know which commit the branch is, for those who ask for it offline."""
    if plan.place.local is None and plan.branch != plan.commit:
        ref = plan.place.blobs.parent / "refs" / plan.branch
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(plan.commit)


def lacking_weights(folder: Path) -> str | None:
    """A weight file that a snapshot of the cache lacks, None where it has them: papers are fetched without them."""
    for index in folder.glob("*.safetensors.index.json"):
        named = sorted(set((read_json(index).get("weight_map") or {}).values()))
        return next((name for name in named if not (folder / name).is_file()), None)
    return None if any(p.is_file() for s in WEIGHTS for p in folder.rglob(f"*{s}")) else "a weight file"
