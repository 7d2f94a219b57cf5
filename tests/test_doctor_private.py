"""No path of the maker's disk in what is published: found, cut by `check --fix`, refused by `publish`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_models import edit_json
from hub_folders import branch_folder
from quantmill import manifest
from quantmill.doctor import check, fix
from quantmill.doctor.private import cleaned
from quantmill.errors import BadCheckpoint
from quantmill.hub.publish import read_branches
from quantmill.portable import public_json
from quantmill.types import Level, QuantConfig

OLD_REPORT = {
    "source": "/home/somebody/models/Mistral-7B",
    "command": "quantmill quantize '/home/somebody/my models/x' --out=/mnt/big/made --text ~/notes.txt",
    "calibration": {"dataset": "/home/somebody/texts/mine.jsonl", "seed": 7},
    "fallbacks": ["q_proj: see /var/tmp/logs/run.log, then a/b"],
    "modules": [{"name": "model.layers.0.self_attn.q_proj", "loss": 0.5}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    branch_folder(tmp_path / "made" / "main", QuantConfig(4, 128))
    return tmp_path / "made" / "main"


def warned(folder: Path) -> list[str]:
    return [f.where for f in check(folder).findings if f.level is Level.WARNING]


def test_a_report_of_an_older_run_is_found_mended_and_refused_meanwhile(folder: Path) -> None:
    (folder / "quantize_report.json").write_text(json.dumps(OLD_REPORT | {"fallbacks": []}))
    (folder / "eval_report.json").write_text(json.dumps({"text": "/data/texts/t.txt", "perplexity": 5.0}))
    edit_json(folder / "config.json", _name_or_path="/home/somebody/models/Mistral-7B")
    edit_json(folder / "tokenizer_config.json", tokenizer_file="/root/.cache/x/tokenizer.json")
    manifest.write_manifest(folder)
    assert any(where.startswith("4, first config.json") for where in warned(folder))
    with pytest.raises(BadCheckpoint, match=r"config\.json holds paths.*quantmill check --fix"):
        read_branches(folder.parent)
    assert len(fix(folder).notes) == 4
    assert warned(folder) == []
    everything = b"".join(p.read_bytes() for p in folder.iterdir() if p.suffix == ".json")
    for private in (b"somebody", b"/mnt", b"/data", b"~/", b"/root"):
        assert private not in everything
    report = json.loads((folder / "quantize_report.json").read_text())
    assert (report["source"], report["calibration"]) == ("Mistral-7B", {"dataset": "mine.jsonl", "seed": 7})
    assert report["command"] == "quantmill quantize x --out=made --text notes.txt"
    assert [b.name for b in read_branches(folder.parent)] == ["main"]


def test_a_card_that_names_this_disk_is_refused(folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text() + f"made in {folder.parent.resolve()}/main\n")
    assert warned(folder) == ["README.md"]
    with pytest.raises(
        BadCheckpoint, match=r"README\.md names a folder of this machine: type quantmill card"
    ):
        read_branches(folder.parent)


def test_texts_of_models_are_not_taken_for_paths(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template="{{ '</s>' }} /a/b ~/c", unk_token="/x/y")
    edit_json(folder / "config.json", _name_or_path="owner/name")
    (folder / "quantize_report.json").write_text("[1]")  # no object: another rule's business
    assert cleaned(folder) == {}


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("see https://example.org/a/b and a/b, 1/2", "see https://example.org/a/b and a/b, 1/2"),
        ("lies in /home/me/x.txt: gone", "lies in x.txt: gone"),
        ("C:\\Users\\me\\x.gguf is odd", "x.gguf is odd"),
        ({"source": "owner/name:branch"}, {"source": "owner/name:branch"}),
        ({"source": "../models/x"}, {"source": "x"}),
        ([{"command": "quantmill 'odd"}, 3, None], [{"command": "quantmill ''\"'\"'odd'"}, 3, None]),
        (OLD_REPORT, None),
    ],
)
def test_cutting_twice_cuts_nothing_more(value: object, public: object) -> None:
    once = public_json(value)
    assert public is None or once == public
    assert public_json(once) == once
