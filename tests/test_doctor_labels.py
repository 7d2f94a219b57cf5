"""Labels, configs, what lies beside the weights; and who can read a folder."""

import json
import shutil
from pathlib import Path

import pytest

from doctor_folders import LOADERS, MODULE, V2, change, drop, errors, found, label, make, mended, put
from gptq_models import edit_json, write_quantized
from quantmill.checkpoint import open_checkpoint
from quantmill.doctor import check, fix
from quantmill.errors import UnsupportedModel
from quantmill.types import ActOrder, CheckpointFormat, Level, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model


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
