"""`quantmill card` and `check --fix`: examine branches, write the card from what was found, mend folders."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from quantmill.console import Console
from quantmill.doctor import Mended, check, fix
from quantmill.errors import UserError
from quantmill.files import write_json
from quantmill.hub.card import Siblings, write_card
from quantmill.hub.card_facts import branch_folders, parse_card
from quantmill.hub.card_gguf import gguf_folders, write_gguf_card
from quantmill.hub.remote import fetch_papers
from quantmill.manifest import update_manifest
from quantmill.types import CheckReport, Json

CHECK_REPORT = "check_report.json"


def describe(folder: Path, name: str | None, siblings: Siblings | None = None) -> Path:
    """Write README.md, and a copy into each branch, for a folder of branches, one branch, or GGUF files.

    Returns its path. `siblings` are repositories of the same model that the card shall name.
    """
    if gguf_folders(folder):
        return write_gguf_card(folder, name=name, siblings=siblings)
    branches = branch_folders(folder)
    for branch in branches:
        write_json(branch / CHECK_REPORT, _without_paths(check_to_json(check(branch)), branch))
    card = write_card(folder, name=name, siblings=siblings)
    for branch in branches:
        update_manifest(branch, (CHECK_REPORT, card.name, *(p.name for p in branch.glob("*.png"))))
    return card


def _without_paths(report: Json, folder: Path) -> Json:
    """The report travels with the branch: where that lies here is nobody's business."""
    text = json.dumps(report)
    for path in (folder.resolve(), folder.absolute()):
        text = text.replace(json.dumps(f"{path}/")[1:-1], "").replace(
            json.dumps(str(path))[1:-1], folder.name
        )
    found: Json = json.loads(text)
    return found


def mend(folder: Path, base: str | None, console: Console) -> Mended:
    """Mend a folder, with the original's files where they can be had. Says what was done and how to undo it."""
    mended = fix(folder, _original(folder, base, console))
    for note in mended.notes:
        console.say(f"mended  {note}")
    if mended.backup is not None:
        place = Path(os.path.realpath(folder))
        console.say(f"undo    rm -r {place} && mv {mended.backup} {place}")
    return mended


def _original(folder: Path, base: str | None, console: Console) -> Path | None:
    """The folder of the original: what was typed, else what the card names, as far as it can be had."""
    named = base or _base_of_card(folder / "README.md")
    if named is None or Path(named).is_dir():
        return Path(named) if named else None
    try:
        return fetch_papers(named)
    except UserError as error:
        if base is not None:
            raise
        console.note(f"the original {named} is out of reach ({error}): name it with --base")
        return None


def _base_of_card(card: Path) -> str | None:
    """`base_model` of a card's header."""
    if not card.is_file():
        return None
    named = parse_card(card.read_text(encoding="utf-8", errors="replace")).header.get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and first.count("/") == 1 else None


def check_to_json(report: CheckReport) -> Json:
    """A check report as `quantmill check --json` prints it."""
    findings = [dataclasses.asdict(f) for f in report.findings]
    return {"ok": report.ok, "findings": findings, "loaders": report.loaders}
