"""Every rule about tensors once kept and once broken, on tiny folders."""

from pathlib import Path

import pytest
import torch

from doctor_folders import LOADERS, MODULE, Change, change, drop, errors, found, make, put
from quantmill.doctor import check
from quantmill.errors import SourceNotFound
from quantmill.types import Level, QuantConfig


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_sound_folder(tmp_path: Path, family: str, tied: bool) -> None:
    settings = {"tie_word_embeddings": tied, "pad_token_id": 1, "eos_token_id": 1}
    report = check(make(tmp_path, QuantConfig(group_size=32), family, **settings))
    assert report.ok
    assert {f.level for f in report.findings} == {Level.OK}
    assert report.loaders == dict.fromkeys(LOADERS, "yes")
    said = " ".join(f.message for f in report.findings)
    for fact in (
        "headers are sound",
        "linears are there",
        "shapes and dtypes",
        "agree with the label",
        "finite",
    ):
        assert fact in said
    assert all("\n" not in f.message + f.where for f in report.findings)


def test_many_modules_make_one_line(folder: Path) -> None:
    change(folder, lambda t: [t[n].fill_(float("nan")) for n in t if n.endswith(".scales")])
    report = check(folder)
    where = found(report, Level.ERROR, "NaN or infinite scales")
    assert len(where) == 1
    assert where[0].startswith("14, first model.layers.0.")
    assert len(report.findings) < 20


def test_no_folder_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        check(tmp_path / "nowhere")
    report = check(tmp_path)
    assert not report.ok
    assert len(report.findings) == 1
    assert "config.json" in report.findings[0].message
    assert set(report.loaders.values()) == {"the folder cannot be opened"}


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "truncated" in errors(check(folder))[0]


def test_an_unquantised_model(tiny_llama: Path) -> None:
    report = check(tiny_llama)
    assert report.ok
    assert found(report, Level.WARNING, "not a quantised model")
    assert set(report.loaders.values()) == {"not a quantised model"}


# --- tensors: what is done to them, the level of the finding, words of it


def retype(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def too_large(tensors: dict[str, torch.Tensor]) -> None:
    name = f"{MODULE}.scales"
    tensors[name] = tensors[name].float()
    tensors[name][0, 0] = 1e9


def swapped_columns(tensors: dict[str, torch.Tensor]) -> None:
    g_idx = tensors[f"{MODULE}.g_idx"]
    g_idx[0], g_idx[-1] = 1, 0


def narrower(tensors: dict[str, torch.Tensor]) -> None:
    for suffix, columns in (("qweight", 32), ("qzeros", 4), ("scales", 32), ("bias", 32)):
        name = f"{MODULE}.{suffix}"
        tensors[name] = tensors[name][..., :columns].contiguous()


def without_module(tensors: dict[str, torch.Tensor]) -> None:
    for suffix in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        del tensors[f"{MODULE}.{suffix}"]


def plain_module(tensors: dict[str, torch.Tensor]) -> None:
    bias = tensors[f"{MODULE}.bias"]
    without_module(tensors)
    tensors |= {f"{MODULE}.weight": torch.zeros(64, 64, dtype=torch.float16), f"{MODULE}.bias": bias}


def both_kinds(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.weight"] = torch.zeros(64, 64, dtype=torch.float16)


def unknown_module(tensors: dict[str, torch.Tensor]) -> None:
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"model.layers.0.adapter.{suffix}"] = tensors[f"{MODULE}.{suffix}"].clone()


TENSORS: dict[str, tuple[Change, Level, str]] = {
    "nan scale": (put("scales", float("nan")), Level.ERROR, "NaN or infinite scales"),
    "infinite scale": (put("scales", float("inf")), Level.ERROR, "NaN or infinite scales"),
    "nan bias": (put("bias", float("nan")), Level.ERROR, "NaN or infinite biases"),
    "zero scale": (put("scales", 0), Level.WARNING, "1 groups have scale 0"),
    "large scale": (too_large, Level.ERROR, "overflow float16"),
    "bf16 scales": (retype(f"{MODULE}.scales", torch.bfloat16), Level.WARNING, "scales are BF16"),
    "f64 scales": (retype(f"{MODULE}.scales", torch.float64), Level.ERROR, "scales is F64"),
    "float codes": (retype(f"{MODULE}.qweight", torch.float32), Level.ERROR, "qweight is F32; I32"),
    "no qzeros": (drop(f"{MODULE}.qzeros"), Level.ERROR, "qzeros is missing"),
    "far group": (put("g_idx", 9), Level.ERROR, "groups that are not there"),
    "negative group": (put("g_idx", -1), Level.ERROR, "groups that are not there"),
    "uneven groups": (put("g_idx", 1), Level.WARNING, "unequal sizes"),
    "swapped columns": (swapped_columns, Level.WARNING, "static_groups is true"),
    "no g_idx": (drop(f"{MODULE}.g_idx"), Level.WARNING, "consecutive groups are supposed"),
    "narrower": (narrower, Level.ERROR, "are (64, 32); config.json asks for (64, 64)"),
    "no module": (without_module, Level.ERROR, "neither packed nor plain"),
    "plain module": (plain_module, Level.WARNING, "not quantised: loaders that fuse"),
    "both kinds": (both_kinds, Level.WARNING, "packed and plain weights both"),
    "unknown module": (unknown_module, Level.WARNING, "no linear of a qwen2"),
    "no bias": (drop(f"{MODULE}.bias"), Level.ERROR, "the bias is missing"),
    "no norm": (drop("model.norm.weight"), Level.ERROR, "missing: download"),
    "no head": (drop("lm_head.weight"), Level.ERROR, "missing: download"),
    "nan norm": (put("weight", float("nan"), "model.norm"), Level.ERROR, "NaN or infinite values"),
    "other zero": (put("qzeros", 0), Level.ERROR, "sym is true, yet zeros differ from 8"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_spoilt_tensors(folder: Path, kind: str) -> None:
    edit, level, words = TENSORS[kind]
    change(folder, edit)
    report = check(folder)
    assert found(report, level, words), [f"{f.where}: {f.message}" for f in report.findings]
    assert report.ok == (level is not Level.ERROR)
    assert (report.loaders["transformers+quantmill"] == "yes") == report.ok
    if level is Level.ERROR and kind != "other zero":
        assert "yes" not in report.loaders.values()


def test_a_flat_tensor_is_a_fault_of_its_module(folder: Path) -> None:
    name = f"{MODULE}.qweight"
    change(folder, lambda t: t.update({name: t[name].flatten()}))
    assert found(check(folder), Level.ERROR, "qweight is (512,); two dimensions") == [MODULE]


def test_large_tensors_are_searched_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantmill.doctor.facts.ELEMENTS_AT_ONCE", 10)
    change(folder, lambda t: t["model.embed_tokens.weight"].view(-1)[-1:].fill_(float("inf")))
    assert found(check(folder), Level.ERROR, "NaN or infinite values") == ["model.embed_tokens.weight"]


def test_a_tied_head_that_is_stored(tmp_path: Path) -> None:
    make(tmp_path, QuantConfig(group_size=32), "llama", tie_word_embeddings=True)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    report = check(tmp_path)
    assert report.ok
    assert found(report, Level.WARNING, "tie_word_embeddings") == ["lm_head"]
