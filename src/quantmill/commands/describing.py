"""`quantmill card`: examine every branch, then write the card from what was found and measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from quantmill.doctor import check
from quantmill.files import write_json
from quantmill.hub.card import write_card
from quantmill.hub.card_facts import branch_folders
from quantmill.manifest import update_manifest
from quantmill.types import CheckReport, Json

CHECK_REPORT = "check_report.json"


def describe(folder: Path, name: str | None) -> Path:
    """Write README.md, and a copy into each branch, for a folder of branches or one branch. Returns its path."""
    branches = branch_folders(folder)
    for branch in branches:
        write_json(branch / CHECK_REPORT, check_to_json(check(branch)))
    card = write_card(folder, name=name)
    for branch in branches:
        update_manifest(branch, (CHECK_REPORT, card.name, *(p.name for p in branch.glob("*.png"))))
    return card


def check_to_json(report: CheckReport) -> Json:
    """A check report as `quantmill check --json` prints it."""
    findings = [dataclasses.asdict(f) for f in report.findings]
    return {"ok": report.ok, "findings": findings, "loaders": report.loaders}
