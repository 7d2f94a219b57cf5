"""Containers of one model: converted folders hold the same values, load, and say what they cannot hold."""

import json
import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_models import write_quantized
from quantmill.checkpoint import open_checkpoint
from quantmill.convert import TARGETS, convert
from quantmill.doctor import check
from quantmill.errors import BadCheckpoint, BadRequest, UnsupportedModel
from quantmill.formats.dialects import Layout
from quantmill.formats.gptq import dequantize
from quantmill.manifest import write_manifest
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

SYM, ASYM = QuantConfig(4, 32), QuantConfig(4, 32, sym=False)
IDS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(2))


def silent(_: int, __: str) -> None: ...


def make(folder: Path, config: QuantConfig, family: str = "mistral", **options) -> Path:
    write_quantized(folder, tiny_model(family), config, **options)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(folder)
    return {m: dequantize(opened.packed(m), torch.float32) for m in opened.quantized_modules()}


@pytest.mark.parametrize("config", [SYM, ASYM, QuantConfig(8, 32), QuantConfig(8, -1, sym=False)], ids=str)
@pytest.mark.parametrize("to", ["awq", "gptq", "gptq_v2", "compressed-tensors"])
def test_folders_hold_the_same_values(tmp_path: Path, config: QuantConfig, to: str) -> None:
    if to == "awq" and config.bits != 4:
        pytest.skip("AWQ has 4 bits")
    source = make(tmp_path / "source", config, "qwen2")
    converted = convert(source, to, tmp_path / "out", silent)
    assert converted.notes == ()
    assert converted.modules == 14
    opened = open_checkpoint(tmp_path / "out")
    assert opened.layout == {"awq": Layout.AWQ, "compressed-tensors": Layout.COMPRESSED}.get(to, Layout.GPTQ)
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[m], after[m]) for m in before)
    plain = open_checkpoint(source)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(opened.load(name), plain.load(name))
    for companion in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / companion).read_bytes() == (source / companion).read_bytes()


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "compressed-tensors"])
def test_symmetric_is_what_has_its_zero_points_in_the_middle(tmp_path: Path, to: str) -> None:
    """AWQ has no label for it; a folder with other zero points stays asymmetric, and they come along."""
    convert(make(tmp_path / "source", SYM), "awq", tmp_path / "awq", silent)
    convert(tmp_path / "awq", to, tmp_path / "sym", silent)
    assert open_checkpoint(tmp_path / "sym").quant_config.sym
    source = make(tmp_path / "asym", ASYM)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.qzeros"] -= 0x11111111  # every zero point 7 instead of 8
    save_file(tensors, source / "model.safetensors")
    convert(source, to, tmp_path / "out", silent)
    assert not open_checkpoint(tmp_path / "out").quant_config.sym
    before, after = weights(source), weights(tmp_path / "out")
    assert all(torch.equal(before[m], after[m]) for m in before)


def test_what_was_said_of_the_files_as_they_were_is_not_taken_along(tmp_path: Path) -> None:
    """Hashes of the source would call the new weights damaged."""
    source = make(tmp_path / "source", SYM)
    write_manifest(source)
    (source / "check_report.json").write_text("{}")
    convert(source, "gptq_v2", tmp_path / "out", silent)
    assert not (tmp_path / "out" / "check_report.json").exists()
    report = check(tmp_path / "out")
    assert report.ok
    assert any(f.where == "SHA256SUMS" and "hashes" in f.message for f in report.findings)


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transformers_runs_them_through_the_door(tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    from quantmill.runtime.adapter import registered

    source = make(tmp_path / "source", ASYM)
    convert(source, to, tmp_path / "out", silent)
    with registered():
        wanted = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        with torch.inference_mode():
            assert torch.equal(got(IDS).logits, wanted(IDS).logits)
            got.save_pretrained(tmp_path / "saved")
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
            assert torch.equal(again(IDS).logits, wanted(IDS).logits)
    assert open_checkpoint(tmp_path / "saved").layout is Layout.GPTQ


def test_there_and_back_is_the_same_folder(tmp_path: Path) -> None:
    source = make(tmp_path / "source", ASYM)
    convert(source, "awq", tmp_path / "awq", silent)
    convert(tmp_path / "awq", "gptq_v2", tmp_path / "back", silent)
    old, new = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(old.load(n), new.load(n)) for n in old.tensors)


def by_gguf_package(path: Path) -> tuple[dict[str, np.ndarray], gguf.GGUFReader]:
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}, reader


@pytest.mark.parametrize(
    ("config", "kind"), [(SYM, "Q4_0"), (QuantConfig(8, 32), "Q8_0"), (QuantConfig(4, -1), "Q4_0")], ids=str
)
@pytest.mark.parametrize("family", ["mistral", "llama", "qwen2", "qwen3"])
def test_gguf_holds_the_same_values_for_others(tmp_path: Path, config, kind: str, family: str) -> None:
    source = make(tmp_path / "source", config, family)
    converted = convert(source, "gguf", tmp_path / "out", silent)
    assert converted.path.name == f"source.{kind}.gguf"
    assert converted.notes == ()
    theirs, reader = by_gguf_package(converted.path)
    ours = weights(source)
    for module, name in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        wanted = ours[f"model.layers.1.{module}"]
        assert torch.equal(torch.from_numpy(theirs[f"blk.1.{name}.weight"]), wanted)
    q = ours["model.layers.0.self_attn.q_proj"]
    if family in ("mistral", "llama"):
        q = q.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    assert torch.equal(torch.from_numpy(theirs["blk.0.attn_q.weight"]), q)
    assert reader.get_field("general.architecture").contents() == ("llama" if family == "mistral" else family)
    assert reader.get_field("tokenizer.chat_template").contents()


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_gguf_read_back_gives_the_same_model(tmp_path: Path, family: str) -> None:
    """Through our own reader, which lets Transformers' do the work: tokenizer, template and logits."""
    from quantmill.runtime.load import load_model, load_tokenizer
    from quantmill.sources import resolve

    source = make(tmp_path / "source", SYM, family)
    path = convert(source, "gguf:Q4_0", tmp_path / "m.gguf", silent).path
    back = resolve(str(path), cache_dir=tmp_path / "cache")
    ours, theirs = load_tokenizer(source), load_tokenizer(back)
    text = "the cat sat on 12 mats"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template
    with torch.inference_mode():
        wanted = load_model(source, device="cpu")(IDS).logits
        got = load_model(back, device="cpu")(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)  # fp16 weights there


def test_a_vocabulary_of_bytes_is_one_whatever_it_says_of_fallback(tmp_path: Path) -> None:
    """Transformers 5.17 sets byte_fallback on what it reads from GGUF; SentencePiece's scores would be wrong."""
    source = make(tmp_path / "source", SYM)
    facts = json.loads((source / "tokenizer.json").read_text())
    facts["model"]["byte_fallback"] = True
    (source / "tokenizer.json").write_text(json.dumps(facts))
    fields = gguf.GGUFReader(convert(source, "gguf", tmp_path / "m.gguf", silent).path).fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert "tokenizer.ggml.merges" in fields


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "models.gguf").mkdir()
    made = convert(make(tmp_path / "source", SYM), "gguf", tmp_path / "models.gguf", silent).path
    assert made == tmp_path / "models.gguf" / "source.Q4_0.gguf"
    assert made.is_file()


def test_asymmetric_gguf_says_what_is_rounded(tmp_path: Path) -> None:
    source = make(tmp_path / "source", ASYM)
    converted = convert(source, "gguf:Q4_1", tmp_path / "out", silent)
    assert len(converted.notes) in (0, 1)
    theirs, _ = by_gguf_package(converted.path)
    wanted = weights(source)["model.layers.0.mlp.up_proj"]
    scale = open_checkpoint(source).load("model.layers.0.mlp.up_proj.scales").abs().max() * 15
    difference = (torch.from_numpy(theirs["blk.0.ffn_up.weight"]) - wanted).abs().max()
    assert difference <= scale * 2.0**-11


@pytest.mark.parametrize(
    ("config", "to", "words"),
    [
        (QuantConfig(3, 32), "gguf", "proj: no GGUF type holds 3-bit"),
        (QuantConfig(8, 32), "awq", "proj: AWQ cannot hold it: it has 8 bits"),
        (QuantConfig(8, 32), "gguf:Q4_0", "fits Q8_0, not Q4_0: use --to gguf:Q8_0"),
        (QuantConfig(3, 32), "compressed-tensors", "3 bits"),
    ],
)
def test_what_a_container_cannot_hold_is_refused(tmp_path: Path, config, to: str, words: str) -> None:
    source = make(tmp_path / "source", config)
    with pytest.raises(UnsupportedModel, match=words):
        convert(source, to, tmp_path / "out", silent)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".partial", ".gguf"))]


@pytest.mark.parametrize("missing", [1, 300, 5000])
def test_a_file_that_does_not_fit_is_told_wherever_it_ends(tmp_path: Path, missing: int) -> None:
    """The last norms are smaller than a buffer: what is lost of them is known only when the buffer is written."""
    source = make(tmp_path / "source", SYM)
    whole = convert(source, "gguf", tmp_path / "whole.gguf", silent).path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole - missing, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            convert(source, "gguf", tmp_path / "cut.gguf", silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "cut.gguf")
    assert [p.name for p in tmp_path.glob("*.gguf")] == ["whole.gguf"]


def test_zero_points_of_zero_do_not_fit_v1(tmp_path: Path) -> None:
    source = make(tmp_path / "source", ASYM)
    opened = open_checkpoint(source)
    tensors = {n: opened.load(n) for n in opened.tensors}
    name = "model.layers.0.mlp.up_proj.qzeros"
    tensors[name] = torch.zeros_like(tensors[name])
    from quantmill.checkpoint import save_tensors

    save_tensors(source, tensors.items())
    with pytest.raises(UnsupportedModel, match="up_proj: a zero point is 0"):
        convert(source, "gptq", tmp_path / "out", silent)


def test_other_refusals(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no packed linears"):
        convert(tiny_llama, "awq", tmp_path / "out", silent)
    source = make(tmp_path / "source", SYM)
    with pytest.raises(BadRequest, match=r"no container 'exl2': use --to gguf:Q4_0"):
        convert(source, "exl2", tmp_path / "out", silent)
    with pytest.raises(BadRequest, match="the model itself"):
        convert(source, "awq", source, silent)


def test_act_order_in_g_idx_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "source", QuantConfig(4, 32, ActOrder.GROUPED), shuffled=True)
    for to in ("awq", "gguf:Q4_0", "compressed-tensors"):
        with pytest.raises(UnsupportedModel, match="act order"):
            convert(source, to, tmp_path / "out", silent)


def test_v1_and_v2_labels_change_with_the_zeros(tmp_path: Path) -> None:
    source = make(tmp_path / "source", SYM)
    convert(source, "gptq_v2", tmp_path / "v2", silent)
    opened = open_checkpoint(tmp_path / "v2")
    assert opened.quant_config.zero_format is CheckpointFormat.GPTQ_V2
    assert opened.packed(opened.quantized_modules()[0]).checkpoint_format is CheckpointFormat.GPTQ_V2
    assert json.loads((tmp_path / "v2" / "quantize_config.json").read_text())["bits"] == 4


def test_every_target_is_listed() -> None:
    assert TARGETS[:4] == ("gguf:Q4_0", "gguf:Q4_1", "gguf:Q8_0", "gguf")
    assert {"awq", "gptq", "gptq_v2", "compressed-tensors"} <= set(TARGETS)
