"""Config keys of every era, in and out."""

import itertools

import pytest

from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.formats.gptq import config_from_json, config_to_json
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig

WRITTEN = {
    "quant_method",
    "bits",
    "group_size",
    "desc_act",
    "sym",
    "checkpoint_format",
    "format",
    "lm_head",
    "true_sequential",
    "damp_percent",
    "static_groups",
    "model_file_base_name",
    "meta",
}
CONFIGS = [
    QuantConfig(bits, group, order, sym, damp, true_sequential)
    for bits, group, order, sym, damp, true_sequential in itertools.product(
        (2, 3, 4, 8), (-1, 32, 128), ActOrder, (True, False), (0.01, 0.1), (True, False)
    )
]


def same(one: QuantConfig, other: QuantConfig) -> bool:
    fields = ("bits", "group_size", "act_order", "sym", "damp_percent", "true_sequential", "zero_format")
    return all(getattr(one, f) == getattr(other, f) for f in fields)


def test_every_parameter_set_comes_back() -> None:
    for config in CONFIGS:
        written = config_to_json(config)
        assert written.keys() >= WRITTEN
        assert same(config_from_json(written), config)


def test_what_is_written() -> None:
    written = config_to_json(
        QuantConfig(), lm_head=True, model_file_base_name="m", meta={"dataset": "wikitext"}
    )
    assert written["desc_act"] is True
    assert written["static_groups"] is True
    assert written["lm_head"] is True
    assert written["checkpoint_format"] == written["format"] == "gptq"
    assert type(written["checkpoint_format"]) is str
    assert written["model_file_base_name"] == "m"
    assert written["meta"]["dataset"] == "wikitext"
    assert written["meta"]["quantizer"] == ["quantmill:0.1.0"]
    assert config_to_json(QuantConfig(sym=False))["checkpoint_format"] == "gptq_v2"
    assert config_to_json(QuantConfig(act_order=ActOrder.GROUPED))["static_groups"] is False
    assert config_to_json(QuantConfig(act_order=ActOrder.NONE))["desc_act"] is False


@pytest.mark.parametrize("config", CONFIGS[::17], ids=str)
def test_transformers_keeps_the_parameters(config: QuantConfig) -> None:
    from transformers.utils.quantization_config import GPTQConfig

    theirs = GPTQConfig.from_dict(config_to_json(config))
    assert (theirs.bits, theirs.group_size, theirs.sym) == (config.bits, config.group_size, config.sym)
    assert theirs.desc_act == config.desc_act
    assert theirs.damp_percent == config.damp_percent
    assert theirs.format == str(config.zero_format)
    back = config_from_json(theirs.to_dict())
    assert (back.bits, back.zero_format) == (config.bits, config.zero_format)


def test_autogptq_of_2023() -> None:
    old = {
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.1,
        "desc_act": True,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    config = config_from_json(old)
    expected = QuantConfig(
        act_order=ActOrder.GROUPED, damp_percent=0.1, checkpoint_format=CheckpointFormat.GPTQ
    )
    assert config == expected


def test_autogptq_with_static_groups_and_marlin_key() -> None:
    old = {"bits": 8, "group_size": 32, "desc_act": True, "static_groups": True, "sym": False}
    config = config_from_json(old | {"is_marlin_format": False, "quant_method": "gptq"})
    assert config.act_order is ActOrder.STATIC
    assert config.zero_format is CheckpointFormat.GPTQ  # no label in those days: v1, also asymmetric


def test_gptqmodel_keeps_the_solver_in_meta() -> None:
    theirs = {
        "bits": 4,
        "dynamic": {"-:.*lm_head": {}, ".*down_proj": {"damp_percent": 0.2}, "+:.*o_proj": None},
        "group_size": 128,
        "desc_act": False,
        "lm_head": False,
        "method": "gptq",
        "quant_method": "gptq",
        "format": "gptq_v2",
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "sym": True,
        "damp_percent": None,
        "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "true_sequential": False},
    }
    config = config_from_json(theirs)
    assert config == QuantConfig(
        act_order=ActOrder.NONE,
        damp_percent=0.05,
        true_sequential=False,
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ({"bits": None, "w_bit": 8}, "bits", 8),
        ({"group_size": None}, "group_size", -1),
        ({"format": "gptq_v2"}, "zero_format", CheckpointFormat.GPTQ_V2),
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, "zero_format", CheckpointFormat.GPTQ),
        ({"damp_percent": 10}, "damp_percent", QuantConfig().damp_percent),
        ({"damp_percent": "auto"}, "damp_percent", QuantConfig().damp_percent),
        ({"meta": "none"}, "bits", 4),
        ({"sym": None, "desc_act": None}, "sym", True),
    ],
)
def test_odd_values_that_can_be_read(keys, field, value) -> None:
    assert getattr(config_from_json({"bits": 4, "group_size": 128} | keys), field) == value


def test_synonyms_of_group_size() -> None:
    assert config_from_json({"wbits": 4, "groupsize": 64}).group_size == 64
    assert config_from_json({"w_bit": 4, "q_group_size": 32}).group_size == 32


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"quant_method": "bitsandbytes"}, UnsupportedModel, "quant_method is 'bitsandbytes'"),
        ({"method": "fp8"}, UnsupportedModel, "'fp8'"),
        ({"checkpoint_format": "marlin"}, UnsupportedModel, "gptq and gptq_v2"),
        ({"is_marlin_format": True}, UnsupportedModel, "Marlin"),
        ({"pack_dtype": "int16"}, UnsupportedModel, "int32"),
        ({"quant_method": "awq", "version": "gemv"}, UnsupportedModel, "AWQ version is 'gemv'"),
        ({"quant_method": "auto-round"}, UnsupportedModel, "its own format"),
        ({"quant_method": "compressed-tensors"}, UnsupportedModel, "pack-quantized"),
        ({"bits": 5}, UnsupportedModel, "bits is 5"),
        ({"bits": "4"}, UnsupportedModel, "bits is '4'"),
        ({"bits": True}, UnsupportedModel, "bits is True"),
        ({"bits": None}, BadCheckpoint, "no 'bits'"),
        ({"group_size": 0}, BadCheckpoint, "group_size is 0"),
        ({"group_size": 100}, BadCheckpoint, "multiple of 8"),
        ({"group_size": "128"}, BadCheckpoint, "group_size is '128'"),
        ({"sym": "yes"}, BadCheckpoint, "sym is 'yes'"),
        ({"desc_act": 1}, BadCheckpoint, "desc_act is 1"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(keys, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        config_from_json({"bits": 4, "group_size": 128} | keys)
    assert "\n" not in str(caught.value)


def test_group_size_must_be_there() -> None:
    with pytest.raises(BadCheckpoint, match="no 'group_size'"):
        config_from_json({"bits": 4})
