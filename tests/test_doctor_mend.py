"""`check --fix` on folders broken in one way each: sound afterwards, no weight changed, undone by one rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_models import edit_json, write_quantized
from quantmill import manifest
from quantmill.checkpoint import open_checkpoint
from quantmill.doctor import check, fix
from quantmill.errors import BadRequest, SourceNotFound
from quantmill.formats.gptq import dequantize
from quantmill.types import ActOrder, CheckpointFormat, Level, QuantConfig
from quantmill.weights import save_tensors
from tiny_models import byte_level_tokenizer, tiny_model

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mend") / "sound"
    write_quantized(folder, tiny_model("llama"), QuantConfig(group_size=32))
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every packed module, as its values."""
    checkpoint = open_checkpoint(folder)
    return {m: dequantize(checkpoint.packed(m), torch.float32) for m in checkpoint.quantized_modules()}


def same_weights(folder: Path, other: Path) -> bool:
    ours, theirs = weights(folder), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[m], theirs[m]) for m in ours)


def clean(folder: Path) -> bool:
    return {f.level for f in check(folder).findings} == {Level.OK}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)


def test_a_sound_folder_is_left_alone(folder: Path) -> None:
    before = {p.name: p.stat().st_ino for p in folder.iterdir()}
    assert fix(folder) == fix(folder)
    assert fix(folder).notes == ()
    assert fix(folder).backup is None
    assert {p.name: p.stat().st_ino for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_the_folder_as_it_was_is_kept_and_shares_its_bytes(folder: Path, original: Path) -> None:
    edit_json(folder / "quantize_config.json", bits=8)
    mended = fix(folder)
    assert mended.backup == folder.parent / ".model.before-fix"
    assert json.loads((mended.backup / "quantize_config.json").read_text())["bits"] == 8
    assert os.path.samefile(mended.backup / WEIGHTS, folder / WEIGHTS)
    assert clean(folder)
    shutil.rmtree(folder)
    mended.backup.rename(folder)
    assert not check(folder).ok
    assert fix(folder).backup == folder.parent / ".model.before-fix"


@pytest.mark.parametrize(("label", "stored"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_zeros_that_are_not_what_the_label_says(
    tmp_path: Path, original: Path, label: str, stored: str
) -> None:
    folder = tmp_path / "model"
    config = QuantConfig(group_size=32, checkpoint_format=CheckpointFormat(stored))
    write_quantized(folder, tiny_model("llama"), config)
    byte_level_tokenizer().save_pretrained(folder)
    before = (folder / WEIGHTS).read_bytes()
    for name in ("config.json", "quantize_config.json"):
        text = (folder / name).read_text().replace(f'format": "{stored}"', f'format": "{label}"')
        (folder / name).write_text(text)
    assert not check(folder).ok
    fix(folder)
    assert clean(folder)
    assert json.loads((folder / "quantize_config.json").read_text())["checkpoint_format"] == stored
    assert (folder / WEIGHTS).read_bytes() == before


def test_zeros_stored_in_both_ways(folder: Path, original: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{MODULE}.qzeros"] = tensors[f"{MODULE}.qzeros"] + 0x11111111
    save(folder, tensors)
    assert not check(folder).ok
    assert any("stored as gptq" in note for note in fix(folder).notes)
    assert clean(folder)
    assert same_weights(folder, original)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize(("key", "value"), [("bits", 8), ("group_size", 64), ("group_size", -1)])
def test_configs_that_contradict_the_tensors(
    folder: Path, original: Path, name: str, key: str, value: int
) -> None:
    config = json.loads((folder / name).read_text())
    (config["quantization_config"] if name == "config.json" else config)[key] = value
    (folder / name).write_text(json.dumps(config))
    assert not check(folder).ok
    fix(folder)
    assert clean(folder)
    assert same_weights(folder, original)


def test_both_configs_are_wrong(folder: Path, original: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"bits": 8, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    edit_json(folder / "quantize_config.json", bits=3, group_size=128)
    assert "bits 8 -> 4, group_size 64 -> 32" in fix(folder).notes[0]
    assert clean(folder)
    assert same_weights(folder, original)


def test_keys_that_only_the_older_file_has(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    fix(folder)
    assert clean(folder)


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "quantize_config.json").write_text("{")
    fix(folder)
    assert clean(folder)


def test_names_of_2023(folder: Path, original: Path) -> None:
    (folder / WEIGHTS).rename(folder / "gptq_model-4bit-32g.safetensors")
    (folder / "quantize_config.json").rename(folder / "quant_config.json")
    (folder / "chat_template.jinja").rename(folder / "chat-template.jinja")
    edit_json(folder / "config.json", quantization_config=None)
    notes = fix(folder).notes
    assert f"{WEIGHTS}: was called gptq_model-4bit-32g.safetensors" in notes
    assert clean(folder)
    assert same_weights(folder, original)


def test_shards_without_an_index(folder: Path, original: Path) -> None:
    checkpoint = open_checkpoint(original)
    (folder / WEIGHTS).unlink()
    save_tensors(folder, ((n, checkpoint.load(n)) for n in checkpoint.tensors), max_shard_bytes=100_000)
    (folder / "model.safetensors.index.json").unlink()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        shard.rename(shard.with_name(shard.name.replace("model-", "gptq_model-")))
    fix(folder)
    assert sorted(folder.glob("*.safetensors")) == shards
    assert clean(folder)
    assert same_weights(folder, original)


@pytest.mark.parametrize(
    "lost",
    [
        ("tokenizer.json",),
        ("tokenizer_config.json",),
        ("chat_template.jinja",),
        ("generation_config.json",),
        ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
    ],
    ids=len,
)
def test_companions_come_from_the_original(folder: Path, original: Path, lost: tuple[str, ...]) -> None:
    for name in lost:
        (folder / name).unlink()
    fix(folder, original)
    assert clean(folder)
    for name in lost:
        assert (folder / name).read_bytes() == (original / name).read_bytes()


def test_a_template_inside_the_originals_tokenizer_config(
    folder: Path, original: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "chat_template.jinja").unlink()
    assert fix(folder, base).notes == ("chat_template.jinja: taken from the original",)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_without_the_original_only_what_config_json_knows(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "config.json", eos_token_id=7)
    fix(folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 7
    assert not check(folder).ok


def test_g_idx_that_was_left_out(tmp_path: Path, original: Path) -> None:
    folder = tmp_path / "model"
    config = QuantConfig(group_size=32, act_order=ActOrder.NONE)
    write_quantized(folder, tiny_model("llama"), config)
    byte_level_tokenizer().save_pretrained(folder)
    kept = shutil.copytree(folder, tmp_path / "kept")
    save(folder, {n: t for n, t in load_file(folder / WEIGHTS).items() if not n.endswith("g_idx")})
    assert fix(folder).notes[0].startswith("weights: g_idx of 14 modules written")
    assert clean(folder)
    assert same_weights(folder, kept)


def renumber(tensors: dict[str, torch.Tensor], module: str) -> None:
    """Number the groups backwards: the same weights."""
    tensors[f"{module}.g_idx"] = (len(tensors[f"{module}.scales"]) - 1 - tensors[f"{module}.g_idx"]).int()
    for suffix in ("scales", "qzeros"):
        tensors[f"{module}.{suffix}"] = tensors[f"{module}.{suffix}"].flip(0)


def test_groups_numbered_out_of_order_lose_their_gather(folder: Path, original: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    for module in modules:
        renumber(tensors, module)
    save(folder, tensors)
    assert same_weights(folder, original)
    assert check(folder).loaders["vllm"] != "yes"
    assert fix(folder).notes[0].startswith("weights: groups of 14 modules put in the order of columns")
    assert clean(folder)
    assert check(folder).loaders["vllm"] == "yes"
    assert same_weights(folder, original)


def test_columns_that_lie_apart_keep_their_gather(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = QuantConfig(group_size=32, act_order=ActOrder.GROUPED)
    write_quantized(folder, tiny_model("llama"), config, shuffled=True)
    byte_level_tokenizer().save_pretrained(folder)
    notes = fix(folder).notes
    assert any("12 modules (gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj) keep" in n for n in notes)
    assert fix(folder).notes == ()
    for name in ("config.json", "quantize_config.json"):  # a false promise is corrected
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"static_groups": false', '"static_groups": true'))
    fix(folder)
    assert clean(folder)
    assert json.loads((folder / "quantize_config.json").read_text())["static_groups"] is False


def test_the_hashes_follow_what_was_mended_and_nothing_else(folder: Path) -> None:
    manifest.write_manifest(folder)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1  # damage that stays to be seen
    (folder / WEIGHTS).write_bytes(data)
    edit_json(folder / "quantize_config.json", bits=8)
    assert not check(folder).ok
    fix(folder)
    report = check(folder)
    assert [f.where for f in report.findings if f.level is Level.ERROR] == [WEIGHTS]
    assert "damaged or replaced" in next(f.message for f in report.findings if f.level is Level.ERROR)


def test_a_file_that_was_edited_is_a_warning_only(folder: Path) -> None:
    manifest.write_manifest(folder)
    assert clean(folder)
    edit_json(folder / "generation_config.json", temperature=0.5)
    report = check(folder)
    assert report.ok
    assert [f.where for f in report.findings if f.level is Level.WARNING] == ["generation_config.json"]
    (folder / manifest.NAME).write_text("nonsense\n")
    assert not check(folder).ok


def test_a_crash_leaves_the_folder_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json(folder / "quantize_config.json", bits=8)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def crash(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr("quantmill.doctor.mend._exchange", crash)
    with pytest.raises(InterruptedError):
        fix(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_shared_cache_is_nobodys_to_mend(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "blob")
    (folder / "config.json").symlink_to(tmp_path / "blob")
    with pytest.raises(BadRequest, match="--local-dir"):
        fix(folder)
    with pytest.raises(SourceNotFound):
        fix(tmp_path / "nowhere")
