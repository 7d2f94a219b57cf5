"""Ways to spoil a quantised folder of `tiny_model("qwen2")`, and words of what is said then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gptq_models import edit_json

MODULE = "model.layers.0.self_attn.q_proj"


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def odd_quantization(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config=[4])


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def two_sets(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def half_a_set(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "w-00001-of-00002.safetensors")


def index_of(folder: Path, value: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def empty_index(folder: Path) -> None:
    index_of(folder, {"weight_map": {}})


def index_outside(folder: Path) -> None:
    index_of(folder, {"weight_map": {"a": "../model.safetensors"}})


def index_to_pickle(folder: Path) -> None:
    index_of(folder, {"weight_map": {"a": "pytorch_model.bin"}})


def missing_shard(folder: Path) -> None:
    names = ["model-00001-of-00001.safetensors", "model-00002-of-00002.safetensors"]
    index_of(folder, {"weight_map": dict(zip("ab", names, strict=True))})


def missing_tensor(folder: Path) -> None:
    index_of(folder, {"weight_map": {"nothing": "model-00001-of-00001.safetensors"}})


def doubled_tensor(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    index_of(folder, {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "other.safetensors"}})


def wrong_shape(tensors: dict) -> None:
    tensors[f"{MODULE}.qzeros"] = tensors[f"{MODULE}.qzeros"][:1]


def wrong_dtype(tensors: dict) -> None:
    tensors[f"{MODULE}.qweight"] = tensors[f"{MODULE}.qweight"].float()


def flat(tensors: dict) -> None:
    tensors[f"{MODULE}.qweight"] = tensors[f"{MODULE}.qweight"].flatten()


def no_scales(tensors: dict) -> None:
    del tensors[f"{MODULE}.scales"]


def wrong_bias(tensors: dict) -> None:
    tensors[f"{MODULE}.bias"] = tensors[f"{MODULE}.bias"][:5]


def far_group(tensors: dict) -> None:
    tensors[f"{MODULE}.g_idx"][3] = 2


def negative_group(tensors: dict) -> None:
    tensors[f"{MODULE}.g_idx"][3] = -1


def large_scale(tensors: dict) -> None:
    tensors[f"{MODULE}.scales"] = tensors[f"{MODULE}.scales"].float()
    tensors[f"{MODULE}.scales"][0, 0] = 1e6


FOLDERS = [
    (no_config, r"has no config\.json"),
    (broken_config, r"config\.json cannot be read"),
    (odd_quantization, "quantization_config is no JSON object"),
    (cut_weights, "truncated"),
    (no_weights, r"no \*\.safetensors"),
    (only_pickle, r"pytorch_model\.bin, a pickle"),
    (two_sets, r"unclear which weights are meant \(a\.safetensors, b\.safetensors\)"),
    (half_a_set, "unclear which weights"),
    (empty_index, "no weight_map"),
    (index_outside, r"names '\.\./model"),
    (index_to_pickle, r"names 'pytorch_model\.bin'"),
    (missing_shard, "1 of 2 weight files are missing, first model-00002"),
    (missing_tensor, "index names 1 tensors that no file has, first nothing"),
    (doubled_tensor, r"lies in model-00001-of-00001\.safetensors and other\.safetensors"),
]
MODULES = [
    (wrong_shape, r"qzeros is \(1, 8\); \(2, 8\) is needed for 4 bits and group size 32"),
    (wrong_dtype, "qweight is F32; I32 is needed"),
    (flat, r"qweight is \(512,\); two dimensions"),
    (no_scales, "scales is missing"),
    (wrong_bias, r"bias is \(5,\); \(64,\) is needed"),
    (far_group, "names groups 0 to 2 of 2"),
    (negative_group, "names groups -1 to 1 of 2"),
    (large_scale, "1 of its values overflow float16"),
]
