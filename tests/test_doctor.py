"""Every rule once kept and once broken, on tiny folders; and who can read them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_models import edit_json, write_quantized
from quantmill.checkpoint import open_checkpoint
from quantmill.doctor import check, fix
from quantmill.errors import SourceNotFound, UnsupportedModel
from quantmill.types import ActOrder, CheckpointFormat, CheckReport, Level, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

V2 = CheckpointFormat.GPTQ_V2
MODULE = "model.layers.0.self_attn.q_proj"
LOADERS = ("transformers+quantmill", "vllm", "gptqmodel", "exllamav2")
Change = Callable[[dict[str, torch.Tensor]], object]


def make(
    folder: Path, config: QuantConfig, family: str = "qwen2", *, shuffled: bool = False, **settings
) -> Path:
    write_quantized(folder, tiny_model(family, **settings), config, shuffled=shuffled)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sound"), QuantConfig(group_size=32))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change(folder: Path, edit: Change) -> None:
    """Let `edit` have every tensor of the weight file."""
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def label(folder: Path, **keys: object) -> None:
    """Set keys of both configs; None takes a key out."""
    quant = json.loads((folder / "quantize_config.json").read_text()) | keys
    quant = {k: v for k, v in quant.items() if v is not None}
    (folder / "quantize_config.json").write_text(json.dumps(quant))
    edit_json(folder / "config.json", quantization_config=quant)


def found(report: CheckReport, level: Level, words: str) -> list[str]:
    """Where the findings of a level are that hold these words."""
    return [f.where for f in report.findings if f.level is level and words in f.message]


def mended(folder: Path) -> list[str]:
    """The files that were mended."""
    return [note.partition(":")[0] for note in fix(folder).notes]


def errors(report: CheckReport) -> list[str]:
    return [f"{f.where}: {f.message}" for f in report.findings if f.level is Level.ERROR]


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


def put(suffix: str, value: float, name: str = MODULE) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.{suffix}"].view(-1)[0] = value

    return edit


def drop(*names: str) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return edit


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


# --- labels and configs


def test_v2_zeros_under_a_v1_label_and_the_fix(tmp_path: Path) -> None:
    make(tmp_path, QuantConfig(group_size=32, checkpoint_format=V2), "llama")
    report = check(tmp_path)
    assert report.ok
    assert "gptq_v2" in report.loaders["vllm"]
    assert "gptq_v2" in report.loaders["exllamav2"]
    assert report.loaders["gptqmodel"] == "yes"
    label(tmp_path, checkpoint_format="gptq", format="gptq")
    report = check(tmp_path)
    assert found(report, Level.ERROR, "stored as gptq_v2, the label says gptq")
    assert report.loaders["gptqmodel"] == "labelled gptq, but zeros are stored as gptq_v2"
    assert mended(tmp_path) == ["config.json", "quantize_config.json"]
    assert check(tmp_path).ok
    assert mended(tmp_path) == []


def test_v1_zeros_under_a_v2_label(folder: Path) -> None:
    label(folder, checkpoint_format="gptq_v2")
    assert found(check(folder), Level.ERROR, "stored as gptq, the label says gptq_v2")


def test_both_kinds_of_zeros_have_no_true_label(folder: Path) -> None:
    change(folder, lambda t: t[f"{MODULE}.qzeros"].fill_(0x88888888 - 2**32))
    assert found(check(folder), Level.ERROR, "quantise again") == [MODULE]


def test_asymmetric_zeros_of_v1(tmp_path: Path) -> None:
    config = QuantConfig(group_size=32, checkpoint_format=CheckpointFormat.GPTQ)
    make(tmp_path, config, "llama")
    label(tmp_path, sym=False)
    report = check(tmp_path)
    assert report.ok
    assert found(report, Level.OK, "asymmetric zeros agree")
    assert report.loaders["vllm"].startswith("asymmetric")
    change(tmp_path, lambda t: t[f"{MODULE}.qzeros"].fill_(-1))
    report = check(tmp_path)
    assert found(report, Level.WARNING, "readers disagree") == [MODULE]
    assert report.ok


def test_a_true_group_order(tmp_path: Path) -> None:
    make(tmp_path, QuantConfig(group_size=32, act_order=ActOrder.GROUPED), "llama", shuffled=True)
    report = check(tmp_path)
    assert report.ok
    assert found(report, Level.OK, "permutes the groups") == ["14 modules"]
    assert "g_idx" in report.loaders["vllm"]
    assert report.loaders["exllamav2"] == "yes"
    label(tmp_path, desc_act=False)
    report = check(tmp_path)
    assert found(report, Level.ERROR, "yet desc_act is false")
    label(tmp_path, desc_act=True)
    change(tmp_path, drop(f"{MODULE}.g_idx"))
    assert found(check(tmp_path), Level.ERROR, "no g_idx, yet desc_act is true") == [MODULE]


def test_the_two_configs_drift(folder: Path) -> None:
    edit_json(folder / "quantize_config.json", bits=8, damp_percent=0.01)
    report = check(folder)
    assert found(report, Level.ERROR, "bits is 8, config.json says 4") == ["quantize_config.json"]
    assert found(report, Level.WARNING, "damp_percent is 0.01") == ["quantize_config.json"]
    assert mended(folder) == ["quantize_config.json"]
    assert check(folder).ok


def test_missing_keys_are_told_and_filled_in(folder: Path) -> None:
    label(folder, desc_act=None, quant_method=None)
    report = check(folder)
    assert found(report, Level.WARNING, "lacks quant_method, desc_act") == ["config.json"]
    assert "lacks desc_act" in report.loaders["vllm"]
    fix(folder)
    assert {f.level for f in check(folder).findings} == {Level.OK}


def test_a_folder_of_2023(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config=None)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    report = check(folder)
    assert report.ok
    assert found(report, Level.WARNING, "no quantization_config")
    (folder / "quantize_config.json").unlink()
    report = check(folder)
    assert found(report, Level.ERROR, "no config says how")
    assert "no config says how" in report.loaders["vllm"]


def test_no_quantize_config(folder: Path) -> None:
    (folder / "quantize_config.json").unlink()
    assert found(check(folder), Level.WARNING, "older loaders look for it")
    assert mended(folder) == ["quantize_config.json"]
    assert found(check(folder), Level.OK, "agrees with config.json")


def test_a_broken_quantize_config(folder: Path) -> None:
    (folder / "quantize_config.json").write_text("{")
    assert found(check(folder), Level.ERROR, "cannot be read") == ["quantize_config.json"]


def test_other_methods(folder: Path) -> None:
    label(folder, quant_method="aqlm")
    report = check(folder)
    assert found(report, Level.ERROR, "quant_method is 'aqlm'") == ["config.json"]
    assert all("awq" in verdict for verdict in report.loaders.values())
    with pytest.raises(UnsupportedModel):
        fix(folder)


def test_a_config_that_names_no_model(folder: Path) -> None:
    edit_json(folder / "config.json", model_type=None)
    report = check(folder)
    assert any("no model_type" in line for line in errors(report))
    assert "no model_type" in report.loaders["transformers+quantmill"]


def test_a_config_without_packed_weights(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "plain"))
    (copy / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    report = check(copy)
    assert found(report, Level.ERROR, "no module is packed")
    assert "yes" not in report.loaders.values()


def test_an_architecture_without_a_row(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mamba")
    report = check(folder)
    assert report.ok
    assert found(report, Level.WARNING, "was not checked")


def test_the_output_head(folder: Path, tmp_path: Path) -> None:
    label(folder, lm_head=True)
    assert found(check(folder), Level.ERROR, "the output head is not packed") == ["lm_head"]
    packed = tmp_path / "packed"
    write_quantized(packed, tiny_model("llama"), QuantConfig(group_size=32), head=True)
    byte_level_tokenizer().save_pretrained(packed)
    assert check(packed).ok
    label(packed, lm_head=False)
    assert found(check(packed), Level.ERROR, "the output head is packed")


# --- what lies beside the weights


@pytest.mark.parametrize(
    ("name", "level", "where"),
    [
        ("tokenizer.json", Level.ERROR, "tokenizer"),
        ("tokenizer_config.json", Level.WARNING, "tokenizer_config.json"),
        ("chat_template.jinja", Level.WARNING, "chat template"),
        ("generation_config.json", Level.WARNING, "generation_config.json"),
    ],
)
def test_missing_companions(folder: Path, name: str, level: Level, where: str) -> None:
    (folder / name).unlink()
    assert [f.where for f in check(folder).findings if f.level is level] == [where]


def test_other_places_of_tokenizer_and_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    (folder / "merges.txt").touch()
    assert {f.level for f in check(folder).findings} == {Level.OK}


def test_strays_and_pickles(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
    (folder / "pytorch_model.bin").touch()
    report = check(folder)
    assert found(report, Level.WARNING, "not read: remove them") == ["old.safetensors"]
    assert found(report, Level.WARNING, "run code when opened") == ["pytorch_model.bin"]


def test_the_makers_report_is_heeded(folder: Path) -> None:
    path = folder / "quantize_report.json"
    path.write_text(json.dumps({"fallbacks": []}))
    assert {f.level for f in check(folder).findings} == {Level.OK}
    path.write_text(json.dumps({"fallbacks": ["model.layers.0.mlp.up_proj: rounding to nearest"]}))
    assert found(check(folder), Level.WARNING, "not quantised as asked: model.layers.0.mlp.up_proj")
    path.write_text("{")
    assert found(check(folder), Level.WARNING, "cannot be read") == ["quantize_report.json"]


def test_the_weights_stay_as_they_are(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    edit_json(folder / "config.json", quantization_config=None)
    assert mended(folder) == ["config.json"]
    assert (folder / "model.safetensors").read_bytes() == before
    assert open_checkpoint(folder).config["quantization_config"]["bits"] == 4


# --- who can read it


@pytest.mark.parametrize(
    ("config", "settings", "refusals"),
    [
        (QuantConfig(bits=8, group_size=32), {}, {"exllamav2": "8 bits"}),
        (QuantConfig(bits=3, group_size=32), {}, {"vllm": "3 bits", "exllamav2": "3 bits"}),
        (QuantConfig(bits=2, group_size=32), {}, {"vllm": "2 bits, it reads 4 and 8", "exllamav2": "2 bits"}),
        (QuantConfig(group_size=-1), {}, {}),
        (QuantConfig(group_size=16), {}, {"vllm": "group size 16"}),
        (QuantConfig(group_size=32, sym=False), {}, {"vllm": "asymmetric", "exllamav2": "gptq_v2"}),
        (QuantConfig(group_size=64), {}, {"vllm": "96 inputs, no multiple of group size 64"}),
        (QuantConfig(group_size=24), {}, {"vllm": "group size 24", "exllamav2": "guess another group size"}),
        (
            QuantConfig(bits=3, group_size=8),
            {"intermediate_size": 72},
            {"vllm": "3 bits", "exllamav2": "3 bits", "gptqmodel": "multiples of 32"},
        ),
        (
            QuantConfig(group_size=-1),
            {"intermediate_size": 72},
            {"exllamav2": "multiples of 32"},
        ),
    ],
    ids=str,
)
def test_verdicts_follow_the_tensors(
    tmp_path: Path, config: QuantConfig, settings: dict, refusals: dict
) -> None:
    if config.sym:
        make(tmp_path, config, "llama", **settings)
    else:
        make(tmp_path, QuantConfig(group_size=config.group_size, checkpoint_format=V2), "llama", **settings)
        label(tmp_path, sym=False)
    report = check(tmp_path)
    assert report.ok
    for loader in LOADERS:
        if loader in refusals:
            assert refusals[loader] in report.loaders[loader]
        else:
            assert report.loaders[loader] == "yes"


def test_uneven_groups_and_exllama(folder: Path) -> None:
    change(folder, put("g_idx", 1))
    report = check(folder)
    assert "unequal sizes" in report.loaders["exllamav2"]
    assert "uneven" in report.loaders["vllm"]


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_folders_of_the_other_layouts(folder: Path, tmp_path: Path, to: str) -> None:
    from quantmill.convert import convert

    convert(folder, to, tmp_path / "out", lambda *_: None)
    report = check(tmp_path / "out")
    assert report.ok, errors(report)
    assert report.loaders["transformers+quantmill"] == "yes"
    assert "GPTQ" in report.loaders["exllamav2"]
    assert not [f for f in report.findings if f.level is Level.WARNING and "config.json" in f.where]
    assert fix(tmp_path / "out").notes == ()
