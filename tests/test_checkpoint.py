"""Model folders: whole, damaged, sharded, of the AutoGPTQ era, and as Transformers sees them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_models import edit_json, random_linear, write_quantized
from quantmill.checkpoint import modern_view, open_checkpoint, save_tensors
from quantmill.errors import BadCheckpoint, SourceNotFound
from quantmill.formats.gptq import dequantize, pack, unpack
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig
from spoilt import FOLDERS, MODULE, MODULES
from tiny_models import tiny_model

CONFIG = QuantConfig(group_size=32)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, write_quantized(folder, tiny_model("qwen2"), CONFIG)


@pytest.fixture
def folder(whole: tuple[Path, torch.nn.Module], tmp_path: Path) -> Path:
    """A quantised folder to spoil."""
    return Path(shutil.copytree(whole[0], tmp_path / "model"))


def change_tensors(folder: Path, change) -> None:
    """Load the weight file, let `change` have the dictionary, save it."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_every_module_is_what_was_packed(whole) -> None:
    folder, twin = whole
    checkpoint = open_checkpoint(folder)
    modules = checkpoint.quantized_modules()
    assert len(modules) == 14
    for name in modules:
        packed = checkpoint.packed(name)
        linear = twin.get_submodule(name)
        assert torch.equal(dequantize(packed, torch.float32), linear.weight)
        assert (packed.in_features, packed.out_features) == (linear.in_features, linear.out_features)
        assert (packed.bias is None) == (linear.bias is None)
        if linear.bias is not None:
            assert torch.equal(packed.bias.float(), linear.bias)
    assert torch.equal(checkpoint.load("model.norm.weight").float(), twin.model.norm.weight)
    assert checkpoint.files == (folder / "model.safetensors",)
    assert checkpoint.quant_config.zero_format is CheckpointFormat.GPTQ


def test_headers_are_enough_to_open(folder: Path) -> None:
    info = open_checkpoint(folder).tensors[f"{MODULE}.qweight"]
    assert (info.dtype, info.shape, info.nbytes) == ("I32", (8, 64), 2048)
    assert info.file == folder / "model.safetensors"


def test_a_plain_model_opens_too(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    assert checkpoint.quant is None
    assert checkpoint.quantized_modules() == ()
    with pytest.raises(BadCheckpoint, match="quantmill quantize"):
        _ = checkpoint.quant_config


def test_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="is no folder"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(("spoil", "words"), FOLDERS)
def test_a_spoilt_folder_is_refused_in_one_line(folder: Path, spoil, words: str) -> None:
    spoil(folder)
    with pytest.raises(BadCheckpoint, match=words) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spoil", "words"), MODULES)
def test_a_spoilt_module_is_refused(folder: Path, spoil, words: str) -> None:
    change_tensors(folder, spoil)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(BadCheckpoint, match=words):
        checkpoint.packed(MODULE)
    assert checkpoint.packed("model.layers.1.mlp.up_proj").bits == 4


def test_a_name_that_is_not_there(folder: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"no tensor lm_head\.bias"):
        open_checkpoint(folder).load("lm_head.bias")


def test_a_file_that_goes_away(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight cannot be read"):
        checkpoint.load("model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_scales_are_rounded(folder: Path, dtype: torch.dtype) -> None:
    exact = open_checkpoint(folder).packed(MODULE).scales.clone()
    change_tensors(folder, lambda t: t.update({f"{MODULE}.scales": t[f"{MODULE}.scales"].to(dtype)}))
    packed = open_checkpoint(folder).packed(MODULE)
    assert packed.scales.dtype == torch.float16
    assert torch.equal(packed.scales, exact.to(dtype).half())


@pytest.mark.parametrize("stored", CheckpointFormat)
@pytest.mark.parametrize("label", CheckpointFormat)
def test_zeros_are_read_by_the_probe(
    tmp_path: Path, stored: CheckpointFormat, label: CheckpointFormat
) -> None:
    config = QuantConfig(group_size=32, checkpoint_format=stored)
    twin = write_quantized(tmp_path, tiny_model("llama"), config)
    quant = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "config.json", quantization_config=quant | {"checkpoint_format": str(label)})
    packed = open_checkpoint(tmp_path).packed(MODULE)
    assert packed.checkpoint_format is stored
    assert torch.equal(dequantize(packed, torch.float32), twin.get_submodule(MODULE).weight)


def drop_g_idx(tensors: dict) -> None:
    for name in [n for n in tensors if n.endswith(".g_idx")]:
        del tensors[name]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_missing_g_idx_is_made_up(tmp_path: Path, bits: int) -> None:
    twin = write_quantized(tmp_path, tiny_model("llama"), QuantConfig(bits=bits, group_size=32))
    change_tensors(tmp_path, drop_g_idx)
    packed = open_checkpoint(tmp_path).packed(MODULE)
    assert torch.equal(dequantize(packed, torch.float32), twin.get_submodule(MODULE).weight)


def test_a_lost_order_is_not_made_up(tmp_path: Path) -> None:
    config = QuantConfig(group_size=32, act_order=ActOrder.GROUPED)
    write_quantized(tmp_path, tiny_model("llama"), config, shuffled=True)
    change_tensors(tmp_path, drop_g_idx)
    with pytest.raises(BadCheckpoint, match="order is lost"):
        open_checkpoint(tmp_path).packed(MODULE)


def test_short_groups_and_odd_sizes(tmp_path: Path) -> None:
    config = QuantConfig(bits=3, group_size=128, sym=False)
    linear = random_linear(576, 70, config)
    packed = pack(linear, config)
    tensors = {s: getattr(packed, s) for s in ("qweight", "qzeros", "scales", "g_idx")}
    save_tensors(tmp_path, ((f"m.{s}", t) for s, t in tensors.items()))
    quant = {"bits": 3, "group_size": 128, "sym": False, "checkpoint_format": "gptq_v2"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quant}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.module_size("m") == (576, 70)
    back = unpack(checkpoint.packed("m"))
    assert torch.equal(back.codes, linear.codes)
    assert torch.equal(back.zeros, linear.zeros)


# --- names of the AutoGPTQ era, and the view that Transformers gets


def test_a_modern_folder_is_its_own_view(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert modern_view(folder, tmp_path / "cache") == folder
    assert modern_view(tiny_llama, tmp_path / "cache") == tiny_llama
    assert not (tmp_path / "cache").exists()


def age(folder: Path, weights_name: str) -> None:
    """Make a folder look like one of 2023."""
    (folder / "model.safetensors").rename(folder / weights_name)
    edit_json(folder / "config.json", quantization_config=None)
    quant = {"bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": False, "sym": True}
    quant |= {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}
    (folder / "quantize_config.json").write_text(json.dumps(quant))


@pytest.mark.parametrize("name", ["gptq_model-4bit-32g.safetensors", "model.safetensors"])
def test_a_folder_of_2023(whole, folder: Path, tmp_path: Path, name: str) -> None:
    age(folder, name)
    checkpoint = open_checkpoint(folder)
    assert torch.equal(
        dequantize(checkpoint.packed(MODULE), torch.float32), whole[1].get_submodule(MODULE).weight
    )
    view = modern_view(folder, tmp_path / "cache")
    assert view.parent == tmp_path / "cache" / "views"
    seen = open_checkpoint(view)
    assert seen.files == (view / "model.safetensors",)
    quant = seen.config["quantization_config"]
    assert quant["quant_method"] == "gptq"
    assert quant["checkpoint_format"] == "gptq"
    assert quant["model_file_base_name"] == "model"
    assert seen.config["hidden_size"] == checkpoint.config["hidden_size"]
    assert (view / "generation_config.json").samefile(folder / "generation_config.json")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_view_is_kept_until_the_folder_changes(folder: Path, tmp_path: Path) -> None:
    age(folder, "old.safetensors")
    view = modern_view(folder, tmp_path)
    (view / "mark").touch()
    assert modern_view(folder, tmp_path) == view
    assert (view / "mark").exists()
    edit_json(folder / "config.json", rms_norm_eps=1e-6)
    assert modern_view(folder, tmp_path) != view


def test_the_view_tells_the_truth_about_zeros(tmp_path: Path) -> None:
    config = QuantConfig(group_size=32, checkpoint_format=CheckpointFormat.GPTQ_V2)
    write_quantized(tmp_path / "model", tiny_model("llama"), config)
    path = tmp_path / "model" / "config.json"
    quant = json.loads(path.read_text())["quantization_config"]
    edit_json(path, quantization_config=quant | {"checkpoint_format": "gptq", "format": "gptq"})
    seen = open_checkpoint(modern_view(tmp_path / "model", tmp_path / "cache"))
    assert seen.config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert seen.config["quantization_config"]["format"] == "gptq_v2"


def test_the_view_adds_g_idx(whole, folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, drop_g_idx)
    view = modern_view(folder, tmp_path / "cache")
    seen = open_checkpoint(view)
    assert [f.name for f in seen.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert torch.equal(seen.load(f"{MODULE}.g_idx"), open_checkpoint(whole[0]).load(f"{MODULE}.g_idx"))
    assert modern_view(view, tmp_path / "cache") == view


def test_old_shards_in_a_view(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tensors = {n: checkpoint.load(n) for n in checkpoint.tensors}
    save_tensors(folder, tensors.items(), max_shard_bytes=60_000)
    count = len(list(folder.glob("model-*.safetensors")))
    assert count > 1
    for i, path in enumerate(sorted(folder.glob("model-*.safetensors"))):
        path.rename(folder / f"gptq_model-4bit-32g-{i + 1:05}-of-{count:05}.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(folder).files) == count  # a complete set needs no index
    seen = open_checkpoint(modern_view(folder, tmp_path / "cache"))
    assert seen.files[0].name == f"model-00001-of-{count:05}.safetensors"
    assert all(torch.equal(seen.load(n), t) for n, t in tensors.items())


def test_weights_by_the_name_in_the_config(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "decoy.safetensors")
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    with pytest.raises(BadCheckpoint, match="unclear"):
        open_checkpoint(folder)
    quant = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=quant | {"model_file_base_name": "mine"})
    assert open_checkpoint(folder).files == (folder / "mine.safetensors",)


def test_an_index_of_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    shutil.copy(folder / "w.safetensors", folder / "stray.safetensors")
    names = dict.fromkeys(open_checkpoint_names(folder / "w.safetensors"), "w.safetensors")
    (folder / "gptq.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert open_checkpoint(folder).files == (folder / "w.safetensors",)


def open_checkpoint_names(path: Path) -> list[str]:
    return list(load_file(path))


def test_other_methods_keep_their_config(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    (folder / "model.safetensors").rename(folder / "awq.safetensors")
    seen = open_checkpoint(modern_view(folder, tmp_path / "cache"))
    assert seen.quant == {"quant_method": "awq", "bits": 4}


def test_a_stray_quantize_config_beside_plain_weights(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "plain"))
    (copy / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert modern_view(copy, tmp_path / "cache") == copy


def test_transformers_reads_the_view(whole, folder: Path, tmp_path: Path) -> None:
    from quantmill.runtime.load import load_model

    age(folder, "gptq_model-4bit-32g.safetensors")
    tensors_without = folder / "gptq_model-4bit-32g.safetensors"
    tensors = {k: v.clone() for k, v in load_file(tensors_without).items()}
    drop_g_idx(tensors)
    save_file(tensors, tensors_without)
    ids = torch.randint(0, 320, (1, 12))
    with torch.no_grad():
        model = load_model(folder, device="cpu", cache=tmp_path / "cache")
        expected = whole[1](ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
