"""The table of a repository's branches, ours and other people's."""

import json
import shutil

import pytest

from branch_folders import eval_report
from hub_folders import OTHER
from quantmill.errors import SourceNotFound
from quantmill.hub.branches import read_branches
from quantmill.hub.machine import Machine
from quantmill.hub.publish import publish
from quantmill.hub.publish import read_branches as read_folders
from quantmill.sources import resolve

LARGE = Machine(ram=10**12, vram=None)


@pytest.fixture
def measured(two_branches, online, tmp_path):
    """A repository with a measurement in each branch."""
    folder = shutil.copytree(two_branches, tmp_path / "two")
    for branch, loss in (("main", 0.01), (OTHER, 0.02)):
        report = eval_report(loss, 6.0)
        (folder / branch / "eval_report.json").write_text(json.dumps(report))
        (folder / branch / "check_report.json").write_text(
            json.dumps({"loaders": {"vllm": "yes", "x": "no"}})
        )
    publish(read_folders(folder), "me/measured", online, private=False, notify=lambda _: None)
    return online


def test_parameters_sizes_and_measurements(measured):
    main, other = read_branches("me/measured", measured, LARGE)
    assert (main.name, other.name) == ("main", OTHER)
    row = other.to_json()
    assert {k: row[k] for k in ("bits", "group_size", "desc_act", "mean_kl")} == {
        "bits": 8,
        "group_size": 32,
        "desc_act": True,
        "mean_kl": 0.02,
    }
    assert row["size_bytes"] > main.size > 200_000
    assert main.loaders == ("vllm",)


def test_the_least_measured_loss_that_fits_is_best(measured):
    assert [b.best for b in read_branches("me/measured", measured, LARGE)] == [True, False]
    none = read_branches("me/measured", measured, Machine(ram=10**8, vram=None))
    assert [(b.fits, b.best) for b in none] == [("no", False)] * 2


def test_a_main_that_nobody_filled_fits_nowhere(two_branches, online, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copytree(two_branches / OTHER, tmp_path / "one" / OTHER)
    publish(read_folders(tmp_path / "one"), "me/no-main", online, private=False, notify=lambda _: None)
    main, other = read_branches("me/no-main", online, LARGE)
    assert (main.size, main.fits, main.best) == (0, "-", False)
    assert (other.fits, other.best) == ("RAM", True)
    with pytest.raises(SourceNotFound, match=rf"holds no config.json; it has {OTHER}, main; name a branch"):
        resolve("me/no-main")


def test_other_peoples_branches_are_read_from_names_and_configs(online):
    online.create_repo("you/theirs", exist_ok=True)
    files = {
        "main": {
            "config.json": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}
        },
        "gptq-8bit--1g-actorder_True": {},
        "awq": {"config.json": {"quantization_config": {"quant_method": "awq", "bits": 4}}},
        "exl2": {"config.json": {"quantization_config": {"quant_method": "exl2\n", "bits": 4.25}}},
        "plain": {"config.json": {}},
        "odd": {"config.json": [1], "quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False}},
    }
    for branch in files:
        online.create_branch("you/theirs", branch=branch, exist_ok=True)
    for branch, papers in files.items():
        for path, value in {**papers, "model.safetensors": [branch]}.items():
            data = json.dumps(value).encode()
            online.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id="you/theirs", revision=branch)
    first = online.list_repo_commits("you/theirs")[-1].commit_id
    online.create_branch("you/theirs", branch="files", revision=first, exist_ok=True)
    for kind in ("Q4_K_M", "IQ2_XXS-00001-of-00002"):
        online.upload_file(
            path_or_fileobj=kind.encode(),
            path_in_repo=f"m-7b.{kind}.gguf",
            repo_id="you/theirs",
            revision="files",
        )
    rows = read_branches("you/theirs", online, LARGE)
    methods = {b.name: b.method for b in rows}
    assert methods == {
        "main": "gptq",
        "gptq-8bit--1g-actorder_True": "gptq",
        "awq": "awq",
        "exl2": "exl2",
        "plain": "none",
        "odd": "gptq",
        "files": "gguf IQ2_XXS, Q4_K_M",
    }
    assert [b.name for b in rows if b.to_json()["bits"] is None] == ["exl2", "files", "plain"]
    found = {b.name: b.config for b in rows}
    assert (found["main"].bits, found["main"].group_size) == (4, 64)
    assert (found["gptq-8bit--1g-actorder_True"].bits, found["gptq-8bit--1g-actorder_True"].group_size) == (
        8,
        -1,
    )
    assert (found["awq"].bits, found["awq"].desc_act) == (4, False)
    assert (found["odd"].group_size, found["odd"].desc_act) == (32, False)


@pytest.mark.parametrize(
    ("ram", "vram", "weights", "where"),
    [(10**11, None, 10**10, "RAM"), (10**11, 2 * 10**10, 10**10, "GPU"), (10**9, None, 10**10, "no")],
)
def test_fits(ram, vram, weights, where):
    assert Machine(ram, vram).fits(weights) == where


def test_the_table_names_the_method(measured, monkeypatch, capsys):
    import huggingface_hub

    from quantmill.commands.fetching import list_branches
    from quantmill.console import Console

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: measured)
    list_branches("me/measured", Console())
    head, _, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["branch", "method", "bits"]
    assert first.split()[:4] == ["main", "gptq", "4", "128"]
