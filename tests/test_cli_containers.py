"""`--format`, `--grid family` and `convert` on the command line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptq_models import write_quantized
from quantmill.cli import app
from quantmill.cli.containers import awq_variant, family, in_container
from quantmill.errors import BadRequest, UnsupportedModel
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
    with pytest.raises(UnsupportedModel, match="'IQ2_XXS': use Q4_1"):
        in_container(CHOICE, "gguf:IQ2_XXS")


def test_a_family_has_one_folder_each() -> None:
    names = [v.branch for v in family()]
    assert names == ["main", "awq-4bit-128g", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    assert len({v.branch for v in family()}) == len(names)


def test_convert_says_what_it_did(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", tiny_model("mistral"), QuantConfig(4, 32))
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    words = ["convert", str(tmp_path / "model"), "--to", "awq", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "14 linears repacked as awq" in done.output
    assert "bit for bit" in done.output
