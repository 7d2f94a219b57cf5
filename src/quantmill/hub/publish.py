"""Folders of branches -> a repository on a hub, one complete branch per variant.

    folders -> checked -> hashed -> compared -> large files up -> one commit per branch -> compared again

Only what differs is sent; a branch moves once, when all of it is there. An interrupted run is simply repeated.
Goes through huggingface_hub, to any endpoint, and never sees a token.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill import manifest
from quantmill.console import gigabytes
from quantmill.doctor import check
from quantmill.doctor.private import cleaned, telling_texts
from quantmill.errors import BadCheckpoint, BadRequest, QuantmillError
from quantmill.hub import wire
from quantmill.hub.card_facts import (
    EVAL_REPORT,
    ORIGINAL_CARD,
    QUANTIZE_REPORT,
    branch_folders,
    read_branch,
)
from quantmill.hub.card_gguf import ENDING, gguf_folders, read_files
from quantmill.hub.paths import path_fault
from quantmill.hub.remote import (
    Hashes,
    RemoteFile,
    hash_file,
    list_files,
    quiet_bars,
    token_header,
)
from quantmill.hub.upload import Advance, Meter, Uploads
from quantmill.hub.variants import MAIN
from quantmill.hub_errors import in_our_words
from quantmill.types import Level

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

CARD = "README.md"
ATTRIBUTES = ".gitattributes"  # the hub's own
WORKERS = 4  # branches that are hashed and sent at once: while one is sent, the next one is hashed
SUMS = manifest.NAME

Notify = Callable[[str], None]
Track = Callable[[int], AbstractContextManager[Advance]]  # bytes to be sent -> who hears of them


def untracked(_: int) -> AbstractContextManager[Advance]:
    """Nobody hears of the bytes."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch to be: every file by its path in the repository."""

    name: str
    files: Mapping[str, Path]
    sums: Mapping[str, str] = field(default_factory=dict)  # the maker's, of some files or none

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(p.stat().st_size for p in self.files.values())


@dataclass(frozen=True, slots=True)
class Published:
    """A branch as it is on the hub now; `sent` are the files that had to travel or change."""

    name: str
    commit: str
    size: int
    files: int
    sent: tuple[str, ...]


def read_branches(folder: Path) -> tuple[Branch, ...]:
    """The branches in a folder, `main` first, each one examined.

    Raises SourceNotFound, BadCheckpoint where the doctor finds an error or a branch has no card.
    """
    if places := gguf_folders(folder):
        _refuse_telling(places)
        return (_gguf_branch(folder, places),)
    found = branch_folders(folder)
    names = [f.name if f != folder else read_branch(f).name for f in found]
    branches = [
        Branch(n, _files(f), manifest.read_manifest(f) or {}) for n, f in zip(names, found, strict=True)
    ]
    _refuse_telling(found)
    for branch, path in zip(branches, found, strict=True):
        _refuse_damaged(path)
        if CARD not in branch.files:
            raise BadCheckpoint(f"{path} has no card: type quantmill card {folder} first")
    return tuple(sorted(branches, key=lambda b: (b.name != MAIN, b.name)))


def _gguf_branch(folder: Path, places: Sequence[Path]) -> Branch:
    """GGUF files side by side in one branch, as their readers look for them; reports take the files' names."""
    read_files(folder)  # raises where a header is damaged
    if not (folder / CARD).is_file():
        raise BadCheckpoint(f"{folder} has no card: type quantmill card {folder} first")
    files, sums = {CARD: folder / CARD}, dict[str, str]()
    for place in places:
        known = manifest.read_manifest(place) or {}
        for path in sorted(place.glob(f"*{ENDING}")):
            files[path.name] = path
            sums |= {path.name: known[path.name]} if path.name in known else {}
            for report in (p for p in (place / QUANTIZE_REPORT, place / EVAL_REPORT) if p.is_file()):
                files[f"{path.name.removesuffix(ENDING)}.{report.name}"] = report
        files |= {n: place / n for n in (ORIGINAL_CARD, "LICENSE") if (place / n).is_file()}
    return Branch(MAIN, files, sums)


def _files(folder: Path) -> dict[str, Path]:
    """Every file that does not begin with a dot, nor lies below such a folder."""
    shown = manifest.files_of(folder)
    for name in shown:
        if fault := path_fault(name):
            raise BadRequest(f"{folder}: the path {name!a} {fault}: rename the file")
    return shown


def _refuse_damaged(folder: Path) -> None:
    error = next((f for f in check(folder, hashes=False).findings if f.level is Level.ERROR), None)
    if error:
        raise BadCheckpoint(
            f"{folder} is not fit to be published ({error.where}: {error.message}): "
            f"type quantmill check {folder}"
        )


def _refuse_telling(folders: Sequence[Path]) -> None:
    """No path of the maker's disk leaves it."""
    for folder in folders:
        if papers := cleaned(folder):
            others = [str(f) for f in folders if cleaned(f)]
            fix = f"quantmill check --fix {shlex.quote(others[0])}"
            if len(others) > 1:
                listed = " ".join(map(shlex.quote, others))
                fix = f"for d in {listed}; do quantmill check --fix $d; done"
            raise BadCheckpoint(
                f"{folder}/{next(iter(papers))} holds paths of this machine: first type  {fix}"
            )
        if texts := telling_texts(folder):
            cure = f"type quantmill card {folder} again" if texts[0] == CARD else "take it out"
            raise BadCheckpoint(f"{folder}/{texts[0]} names a folder of this machine: {cure}")


def publish(
    branches: Sequence[Branch],
    name: str,
    api: HfApi,
    *,
    private: bool,
    notify: Notify,
    track: Track = untracked,
) -> list[Published]:
    """Bring every branch to the hub and prove that it is there. `notify` hears what will be sent before it is.

    Raises BadRequest (no right to, or public where private was asked for), SourceNotFound (hub out of reach),
    QuantmillError where what the hub holds afterwards is not what was sent.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        hashed = list(pool.map(_hash, branches))
    with in_our_words(name):
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise BadRequest(
                f"{name} exists already and is public: choose another name, or leave --private out"
            )
        ours = not _settle_xet(api, name)
        with ThreadPoolExecutor(WORKERS) as pool:
            compared = list(pool.map(lambda b, local: _compare(b, local, name, api), branches, hashed))
        total = _announce(compared, notify)
        counted = ours and wire.is_direct(
            api.endpoint
        )  # else huggingface_hub carries the bytes, and counts them
        with quiet_bars(counted), (track if counted else untracked)(total) as advance:
            meter = Meter(advance)
            uploads = Uploads(name, api, meter) if ours else None
            with ThreadPoolExecutor(WORKERS) as pool:
                prepared = pool.map(lambda ready: _bring(ready, uploads), compared)
                return [_publish(ready, name, api, meter) for ready in prepared]


def _announce(compared: Sequence[_Prepared], notify: Notify) -> int:
    """Say per branch what has to travel, and how much that is in all. Returns the bytes, each object's once."""
    doomed: dict[str, int] = {}
    for ready in compared:
        if ready.commit and not ready.sent:
            notify(f"{ready.branch.name}: unchanged")
            continue
        sizes = {ready.local[p].sha256: ready.local[p].size for p in ready.changed}
        doomed |= sizes
        count = len(ready.local) + 1
        notify(
            f"{ready.branch.name}: sending {len(ready.sent)} of {count} files, {gigabytes(sum(sizes.values()))}"
        )
    if doomed:
        whole = gigabytes(sum(ready.branch.size for ready in compared))
        notify(f"{gigabytes(sum(doomed.values()))} to send of {whole}; files that branches share travel once")
    return sum(doomed.values())


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A branch here, hashed, and on the hub."""

    branch: Branch
    local: Mapping[str, Hashes]
    commit: str | None
    remote: Mapping[str, RemoteFile]

    @property
    def changed(self) -> tuple[str, ...]:
        return tuple(p for p, h in self.local.items() if p not in self.remote or not h.same(self.remote[p]))

    @property
    def gone(self) -> tuple[str, ...]:
        return tuple(p for p in self.remote if p not in self.local and p not in (ATTRIBUTES, SUMS))

    @property
    def sums(self) -> bytes:
        return manifest.manifest_text({p: h.sha256 for p, h in self.local.items()}).encode()

    @property
    def sent(self) -> tuple[str, ...]:
        """What has to travel."""
        stale = SUMS not in self.remote or self.remote[SUMS].size != len(self.sums)
        return (*self.changed, *((SUMS,) if self.changed or self.gone or stale else ()))


def _hash(branch: Branch) -> dict[str, Hashes]:
    """Every file. Raises BadCheckpoint where the weights are not those that were made."""
    local = {path: hash_file(file) for path, file in branch.files.items()}
    listed = {p: s for p, s in branch.sums.items() if p.endswith(".safetensors")}
    if wrong := manifest.differing(listed, {p: h.sha256 for p, h in local.items()}):
        raise BadCheckpoint(
            f"{branch.name}: {wrong[0]} is not what its {SUMS} says, so it was damaged or replaced: make it again"
        )
    return local


def _compare(branch: Branch, local: Mapping[str, Hashes], name: str, api: HfApi) -> _Prepared:
    """A branch here beside the one on the hub."""
    commit = _commit_of(api, name, branch.name)
    return _Prepared(branch, local, commit, list_files(api, name, commit) if commit else {})


def _bring(ready: _Prepared, uploads: Uploads | None) -> _Prepared:
    """Bring large files that differ to the hub; the branch stays as it is."""
    if uploads is not None:
        for path in ready.changed:
            uploads.send(ready.branch.files[path], ready.local[path])
    return ready


def _publish(ready: _Prepared, name: str, api: HfApi, meter: Meter) -> Published:
    """One branch: only what differs is sent."""
    branch, local, commit = ready.branch, ready.local, ready.commit
    if ready.sent or commit is None:
        parcel = _Parcel(branch, local, ready.changed, ready.gone, ready.sums)
        commit = _send(api, name, parcel, commit)
        _prove(list_files(api, name, commit), local, f"{name}:{branch.name}")
    for path in ready.changed:
        meter.reached(local[path].sha256, local[path].size)
    return Published(branch.name, commit, branch.size, len(local) + 1, ready.sent)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What differs between a branch here and on the hub."""

    branch: Branch
    local: Mapping[str, Hashes]
    changed: tuple[str, ...]
    gone: tuple[str, ...]
    sums: bytes

    def additions(self) -> list[CommitOperationAdd]:
        """New each time: huggingface_hub notes in them what it learned of one revision."""
        from huggingface_hub import CommitOperationAdd

        found = []
        for path in self.changed:
            addition = CommitOperationAdd(path, str(self.branch.files[path]))
            addition.upload_info.sha256 = bytes.fromhex(self.local[path].sha256)  # else computed once more
            found.append(addition)
        return [*found, CommitOperationAdd(SUMS, self.sums)]


def _commit_of(api: HfApi, name: str, branch: str) -> str | None:
    """Where a branch is, None where there is none yet."""
    return next((r.target_commit for r in api.list_repo_refs(name).branches if r.name == branch), None)


def _send(api: HfApi, name: str, parcel: _Parcel, parent: str | None) -> str:
    """Large files first, then the branch, then one commit: a reader never sees half of it."""
    from huggingface_hub import CommitOperationDelete

    branch = parcel.branch.name
    try:
        api.preupload_lfs_files(name, additions=parcel.additions(), revision=branch if parent else MAIN)
    except RuntimeError as error:  # huggingface_hub wraps what went wrong with one file
        raise error.__cause__ or error from None
    if parent is None:
        first = api.list_repo_commits(name)[-1].commit_id  # holds nothing, where main may hold other weights
        api.create_branch(name, branch=branch, revision=first, exist_ok=True)
    operations: list[Any] = [*parcel.additions(), *(CommitOperationDelete(p) for p in parcel.gone)]
    done = api.create_commit(
        name, operations, commit_message=f"{branch} by quantmill", revision=branch, parent_commit=parent
    )
    return str(done.oid)


def _prove(remote: Mapping[str, RemoteFile], local: Mapping[str, Hashes], where: str) -> None:
    """Every file on the hub has the hash that it has here. Raises QuantmillError."""
    wrong = [p for p, h in local.items() if p not in remote or not h.same(remote[p])]
    if wrong:
        raise QuantmillError(f"{where} does not hold {wrong[0]} as it is here: type the same again")


def _settle_xet(api: HfApi, name: str) -> bool:
    """Whether large files go by xet: where the hub has it, and does not say that LFS is there as well.

    A hub that takes cut LFS uploads on says so (`lfsUrl`). huggingface_hub itself asks neither, and knows xet only.
    """
    from huggingface_hub import constants, get_session, hf_raise_for_status

    url = f"{api.endpoint}/api/models/{name}/xet-write-token/{MAIN}"
    answer = get_session().get(url, headers=token_header(api), follow_redirects=True)
    if answer.status_code != 404:
        hf_raise_for_status(answer)
        if "lfsUrl" not in answer.json():
            return True
    constants.HF_HUB_DISABLE_XET = True
    return False
