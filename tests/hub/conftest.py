"""Repositories on disk for the tests of the hub lane."""

from __future__ import annotations

import pytest

import hub_folders
from branch_folders import eval_report, modules, quantize_report, write_branch
from quantmill.hub.variants import CARD_GRID
from quantmill.types import QuantConfig

LOSSES = (0.0312, 0.0221, 0.00051, 0.00043)


@pytest.fixture
def make_branch(tmp_path):
    """make_branch(name, config, report=..., evaluation=..., check=...) writes a branch folder."""

    def make(name, config=None, **files):
        return write_branch(tmp_path / "out" / name, config or QuantConfig(), **files)

    return make


@pytest.fixture
def repository(make_branch):
    """The four branches of the card grid, made and measured; the folder they are in."""
    for variant, loss in zip(CARD_GRID, LOSSES, strict=True):
        reports = modules(variant.config, loss / 10)
        report = quantize_report(variant.branch, variant.config, reports)
        evaluation = eval_report(loss, 5.25 * (1 + loss))
        folder = make_branch(variant.branch, variant.config, report=report, evaluation=evaluation)
    return folder.parent


@pytest.fixture(scope="session")
def two_branches(tmp_path_factory):
    """A folder of two complete branches, not to be changed."""
    return hub_folders.repository_folder(tmp_path_factory.mktemp("made") / "two")


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub without tokens, in a process of its own."""
    running = hub_folders.Hub.start(tmp_path_factory.mktemp("hub") / "root")
    yield running
    running.stop()


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """huggingface_hub in this process, let out to the hub and nowhere else. Returns an HfApi."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return HfApi(endpoint=hub.url)
