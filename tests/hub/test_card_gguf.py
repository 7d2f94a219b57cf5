"""The card of a GGUF repository, and what of it is published."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from branch_folders import eval_report, modules, quantize_report
from gptq_models import write_quantized
from quantmill.convert import convert
from quantmill.errors import BadCheckpoint
from quantmill.files import write_json
from quantmill.hub.card import Siblings
from quantmill.hub.card_gguf import read_files, write_gguf_card
from quantmill.hub.publish import read_branches
from quantmill.manifest import write_manifest
from quantmill.types import QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

SOURCE = "mistralai/Mistral-7B-Instruct-v0.1"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_0 and Q8_0 in a folder each, as `quantize --format gguf:Q4_0,Q8_0` leaves them."""
    root = tmp_path_factory.mktemp("made")
    for bits, kind in ((4, "Q4_0"), (8, "Q8_0")):
        model = root / f"model{bits}"
        write_quantized(model, tiny_model("llama"), QuantConfig(bits, 32))
        byte_level_tokenizer().save_pretrained(model)
        place = root / "gguf" / kind
        convert(model, "gguf", place / f"mistral.{kind}.gguf", lambda *_: None)
        config = QuantConfig(bits, 32)
        report = quantize_report(kind, config, modules(config), command="quantmill quantize SOURCE")
        write_json(place / "quantize_report.json", report)
        (place / "ORIGINAL_CARD.md").write_text("---\nlicense: apache-2.0\n---\nThe first card.\n")
        write_manifest(place)
    return root / "gguf"


@pytest.fixture
def folder(repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(repository, tmp_path / "gguf")


def test_files_are_told_by_their_headers(folder: Path) -> None:
    small, large = read_files(folder)
    assert (small.name, large.name) == ("Q4_0", "Q8_0")
    assert small.size_bytes < large.size_bytes
    assert small.parameters == large.parameters
    assert large.bits_per_weight == pytest.approx(8 * large.size_bytes / large.parameters)


def test_the_card_says_what_is_there(folder: Path) -> None:
    write_json(folder / "Q8_0" / "eval_report.json", eval_report(mean_kl=0.0123, perplexity=7.5))
    siblings = Siblings(gptq="me/Mistral-7B-Instruct-v0.1-GPTQ")
    text = write_gguf_card(folder, name="me/Mistral-7B-Instruct-v0.1-GGUF", siblings=siblings).read_text()
    card = ModelCard(text)
    assert card.data.base_model == SOURCE
    assert card.data.license == "apache-2.0"
    assert "gguf" in card.data.tags
    assert "# Mistral-7B-Instruct-v0.1 - GGUF" in text
    rows = [line for line in text.splitlines() if line.startswith("| `mistral.")]
    assert [r.split("|")[2].strip() for r in rows] == ["Q4_0", "Q8_0"]
    assert "not measured" in rows[0]
    assert "0.0123" in rows[1]
    assert "hf download me/Mistral-7B-Instruct-v0.1-GGUF" in text
    assert "GPTQ](" not in text.partition("## Repositories available")[0]
    assert "(https://huggingface.co/me/Mistral-7B-Instruct-v0.1-GPTQ)" in text
    assert "AWQ, for inference on GPUs: not made yet" in text
    assert "The first card." in text


def test_files_of_all_folders_lie_in_one_branch(folder: Path) -> None:
    with pytest.raises(BadCheckpoint, match="has no card: type quantmill card"):
        read_branches(folder)
    write_gguf_card(folder)
    (branch,) = read_branches(folder)
    assert branch.name == "main"
    assert {"README.md", "mistral.Q4_0.gguf", "mistral.Q8_0.gguf"} < set(branch.files)
    assert branch.files["mistral.Q4_0.quantize_report.json"] == folder / "Q4_0" / "quantize_report.json"
    assert set(branch.sums) == {"mistral.Q4_0.gguf", "mistral.Q8_0.gguf"}


def test_a_damaged_file_is_not_published(folder: Path) -> None:
    write_gguf_card(folder)
    path = folder / "Q4_0" / "mistral.Q4_0.gguf"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="bytes: fetch the file again"):
        read_branches(folder)
