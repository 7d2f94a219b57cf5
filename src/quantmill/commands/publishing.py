"""`quantmill publish`: a folder of branches -> a repository, and what its readers type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from quantmill import __version__
from quantmill.console import Console, gigabytes, progress
from quantmill.errors import BadRequest
from quantmill.hub.publish import Branch, publish, read_branches
from quantmill.hub.variants import MAIN
from quantmill.sources import split_branch
from quantmill.types import Json


def publish_folder(
    folder: Path, name: str, endpoint: str | None, console: Console, *, private: bool, dry_run: bool
) -> Json:
    """Publish, or say what would be. Returns the JSON document."""
    from huggingface_hub import HfApi

    if name.count("/") != 1 or split_branch(name)[1]:
        raise BadRequest(f"{name} is no repository name: write owner/name; branches are named by the folders")
    branches = read_branches(folder)
    for branch in branches:
        console.say(f"{branch.name}: {len(branch.files)} files, {gigabytes(branch.size)}")
    if branches[0].name != MAIN:
        console.note(
            f"there is no folder {MAIN}: who names no branch will find an empty one; rename one to have it there"
        )
    if dry_run:
        console.say("nothing was sent")
        return _document(
            name, [{"name": b.name, "size_bytes": b.size, "files": len(b.files)} for b in branches]
        )
    api = HfApi(endpoint=endpoint, library_name="quantmill", library_version=__version__)
    done = publish(branches, name, api, private=private, notify=console.note, track=_bar)
    console.say(f"\n{api.endpoint}/{name} holds every file with the hash that it has here. To get a branch:")
    for line in reader_lines(name, branches, endpoint):
        console.say(f"  {line}")
    return _document(name, [_row(asdict(p)) for p in done])


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Bytes on a bar; none where nothing is to be sent."""
    if not total:
        yield lambda _: None
        return
    with progress("bytes", total) as advance:
        yield lambda count: advance(count, "")


def reader_lines(name: str, branches: tuple[Branch, ...], endpoint: str | None) -> list[str]:
    """What a reader types, a line per branch."""
    before = f"HF_ENDPOINT={endpoint} " if endpoint else ""
    return [f"{before}quantmill download {name}" + ("" if b.name == MAIN else f":{b.name}") for b in branches]


def _document(name: str, rows: list[Json]) -> Json:
    return {"repository": name, "branches": rows}


def _row(done: Json) -> Json:
    keys = {"size": "size_bytes"}
    return {keys.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in done.items()}
