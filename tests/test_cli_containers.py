"""`--format`, `--grid family` and `convert` on the command line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptq_models import write_quantized
from quantmill.cli import app
from quantmill.cli.containers import awq_variant, family, in_container
from quantmill.commands.family import fitting
from quantmill.console import Console
from quantmill.errors import BadRequest, UnsupportedModel
from quantmill.hub.publish import read_branches
from quantmill.types import CheckpointFormat, QuantConfig, Variant
from tiny_models import byte_level_tokenizer, tiny_model

CHOICE = (Variant("main", QuantConfig()),)


def test_gguf_types_become_variants_named_after_them() -> None:
    found = in_container(CHOICE, "gguf:Q4_K,q2_k")
    assert [(v.branch, v.container) for v in found] == [("Q4_K_M", "gguf:Q4_K_M"), ("Q2_K", "gguf:Q2_K")]


def test_awq_is_asymmetric_unless_told_otherwise() -> None:
    (variant,) = in_container(CHOICE, "awq")
    assert (variant.branch, variant.container) == ("awq-4bit-128g", "awq")
    assert not variant.config.sym
    assert awq_variant(QuantConfig(), sym=True).config.sym
    with pytest.raises(BadRequest, match="AWQ files have 4 bits, not 8"):
        awq_variant(QuantConfig(8))


@pytest.mark.parametrize("format", [None, "gptq", "gptq_v2"])
def test_gptq_keeps_its_branches(format: str | None) -> None:
    (variant,) = in_container(CHOICE, format)
    assert (variant.branch, variant.container) == ("main", "gptq")
    wanted = None if format is None else CheckpointFormat(format)
    assert variant.config.checkpoint_format == wanted


def test_what_is_not_written_is_refused_with_what_is() -> None:
    with pytest.raises(BadRequest, match="--format exl2 is not written: use one of gptq, gptq_v2, awq"):
        in_container(CHOICE, "exl2")
    with pytest.raises(UnsupportedModel, match="'IQ2_XXS': use gguf: and one of Q2_K"):
        in_container(CHOICE, "gguf:IQ2_XXS")


def test_a_family_has_one_folder_each() -> None:
    names = [v.branch for v in family()]
    mixes = [f"gguf/{m}" for m in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")]
    assert names == ["gptq/main", "awq/main", *mixes]


@pytest.mark.parametrize(("hidden", "group"), [(256, 128), (192, 64), (96, 32)])
def test_awq_of_a_family_gets_the_largest_group_that_fits(hidden: int, group: int) -> None:
    config = tiny_model("llama", hidden_size=hidden, intermediate_size=256, head_dim=32).config.to_dict()
    found = {v.branch: v for v in fitting(family(), config, Console(True))}
    assert found["awq/main"].config.group_size == group
    assert found["gptq/main"].config.group_size == 128


def test_a_family_without_awq_where_no_group_fits() -> None:
    config = tiny_model("llama", hidden_size=48, head_dim=12).config.to_dict()
    assert "awq/main" not in [v.branch for v in fitting(family(), config, Console(True))]


@pytest.mark.slow
def test_a_family_is_three_repositories_with_cards(tmp_path: Path) -> None:
    source, text, out = tmp_path / "Toy", tmp_path / "text.txt", tmp_path / "out"
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=256, intermediate_size=256, head_dim=32)
    model.half().save_pretrained(source)
    byte_level_tokenizer().save_pretrained(source)
    text.write_text("the cat sat on the mat and looked at the rain for a while\n\n" * 60)
    words = ["quantize", str(source), "--grid", "family", "--out", str(out), "--dataset", str(text)]
    done = CliRunner().invoke(app, [*words, "--samples", "2", "--seqlen", "32", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert not (out / ".quantmill-work").exists()
    assert sorted(p.name for p in (out / "gguf").iterdir() if p.is_dir())[0] == "Q2_K"
    done = CliRunner().invoke(app, ["card", str(out), "--name", "me/Toy"])
    assert done.exit_code == 0, done.output
    for name in ("gptq", "awq", "gguf"):
        card = (out / name / "README.md").read_text()
        assert f"# Toy - {name.upper()}" in card
        assert all(
            f"https://huggingface.co/me/Toy-{o.upper()}" in card for o in ("gptq", "awq", "gguf") if o != name
        )
    assert read_branches(out / "gguf")[0].name == "main"
    assert len([n for n in read_branches(out / "gguf")[0].files if n.endswith(".gguf")]) == 6
    assert [b.name for b in read_branches(out / "awq")] == ["main"]


def test_convert_says_what_it_did(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", tiny_model("mistral"), QuantConfig(4, 32))
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    words = ["convert", str(tmp_path / "model"), "--to", "awq", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "14 linears repacked as awq" in done.output
    assert "bit for bit" in done.output
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    refused = CliRunner().invoke(app, [*words[:3], "gptq_v2", *words[4:]])
    assert "holds a model already, and not as gptq_v2" in str(refused.exception)
