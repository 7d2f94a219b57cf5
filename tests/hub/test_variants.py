import itertools

import pytest

from quantmill.errors import BadRequest
from quantmill.hub.variants import CARD_GRID, GRIDS, branch_name, parse_branch, parse_variant
from quantmill.types import BITS, ActOrder, CheckpointFormat, QuantConfig

GROUPS = (-1, 8, 16, 32, 64, 128, 256, 576, 1024)
ALL = [
    QuantConfig(bits, group, order, sym)
    for bits, group, order, sym in itertools.product(BITS, GROUPS, ActOrder, (True, False))
]


def test_every_config_comes_back_from_its_name():
    for config in ALL:
        assert parse_branch(branch_name(config)) == config


def test_every_config_has_a_name_of_its_own():
    assert len({branch_name(config) for config in ALL}) == len(ALL)


def test_every_name_is_a_variant_on_the_command_line():
    for config in ALL:
        variant = parse_variant(branch_name(config))
        assert (variant.branch, variant.config) == (branch_name(config), config)


def test_every_variant_that_can_be_typed():
    orders = {
        "": ActOrder.STATIC,
        "-act": ActOrder.STATIC,
        "-noact": ActOrder.NONE,
        "-grouped": ActOrder.GROUPED,
    }
    for bits, group, order, sym in itertools.product(BITS, GROUPS, orders, ("", "-sym", "-asym")):
        expected = QuantConfig(bits, group, orders[order], sym != "-asym")
        for text in (f"{bits}bit-{group}g{order}{sym}", f"{bits}bit-{group}g{sym}{order}"):
            assert parse_variant(text).config == expected
            assert parse_variant(text).branch == branch_name(expected)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (QuantConfig(), "main"),
        (QuantConfig(group_size=32), "gptq-4bit-32g-actorder_True"),
        (QuantConfig(8, -1), "gptq-8bit--1g-actorder_True"),
        (QuantConfig(3, 128, ActOrder.NONE), "gptq-3bit-128g-actorder_False"),
        (QuantConfig(act_order=ActOrder.NONE), "gptq-4bit-128g-actorder_False"),
        (QuantConfig(act_order=ActOrder.GROUPED), "gptq-4bit-128g-actorder_True-grouped"),
        (QuantConfig(sym=False), "gptq-4bit-128g-actorder_True-asym"),
        (QuantConfig(2, 64, ActOrder.GROUPED, False), "gptq-2bit-64g-actorder_True-grouped-asym"),
    ],
)
def test_names(config, name):
    assert branch_name(config) == name


def test_what_a_name_leaves_out():
    quiet = QuantConfig(damp_percent=0.01, true_sequential=False, checkpoint_format=CheckpointFormat.GPTQ_V2)
    assert branch_name(quiet) == "main"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq-4bit-128g-actorder_True", QuantConfig()),
        ("gptq-4bit-32g-actorder_True", QuantConfig(4, 32)),
        ("gptq-8bit--1g-actorder_True", QuantConfig(8, -1)),
        ("gptq-8bit--1g-actorder_False", QuantConfig(8, -1, ActOrder.NONE)),
        ("gptq-3bit-128g-actorder_False", QuantConfig(3, 128, ActOrder.NONE)),
        ("gptq-3bit--1g-actorder_True", QuantConfig(3, -1)),
        ("4bit-128g", QuantConfig()),
        ("4-bit-128g", QuantConfig()),
        ("GPTQ-4bit-64g", QuantConfig(4, 64)),
        ("gptq-4bit-Noneg", QuantConfig(4, -1)),
        ("8bit-128g-4096", QuantConfig(8, 128)),
        ("4bit-32g-actorder", QuantConfig(4, 32)),
        ("4bit-128g-no-act-order", QuantConfig(act_order=ActOrder.NONE)),
        ("4bit-128g.no-act.order", QuantConfig(act_order=ActOrder.NONE)),
        ("4bit-128g-desc_act-false", QuantConfig(act_order=ActOrder.NONE)),
        ("8bit-groupsize64", QuantConfig(8, 64)),
        ("gptq_4bit_128g", QuantConfig()),
        ("w4g64-no-act-order", QuantConfig(4, 64, ActOrder.NONE)),
        ("int8-g32", QuantConfig(8, 32)),
        ("4bit-128g-asym", QuantConfig(sym=False)),
    ],
)
def test_names_that_other_makers_gave(name, config):
    assert parse_branch(name) == config


@pytest.mark.parametrize(
    "name",
    [
        "",
        "develop",
        "gptq",
        "4bit",
        "128g",
        "v1.0",
        "refs/pr/1",
        "awq-4bit-128g",
        "4.0bpw",
        "exl2-4bit-128g",
        "gguf-8bit-32g",
        "gptq-6bit-128g-actorder_True",  # no GPTQ file holds 6 bits
        "gptq-4bit-12g-actorder_True",
        "gptq-4bit-128g-actorder_False-grouped",
        "mistral-7b-instruct-v0.1",
    ],
)
def test_names_that_say_nothing(name):
    assert parse_branch(name) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4bit",
        "4bits-128g",
        "4bit128g",
        "128g",
        "5bit-128g",
        "4bit-12g",
        "4bit--2g",
        "4bit-128g-",
        "4bit-128g-fast",
        "4bit-128g-noact-grouped",
        "4bit-128g-asym-asym",
        "develop",
        "gptq-6bit-128g-actorder_True",
        "gptq-4bit-128g-actorder_False-grouped",
        "gptq-4bit-128g-actorder_true",
    ],
)
def test_unknown_variants_are_refused_with_an_example(text):
    with pytest.raises(BadRequest, match=r"4bit-\d+g") as error:
        parse_variant(text)
    assert repr(text) in str(error.value)


def test_the_grid_of_the_published_card():
    assert [v.branch for v in CARD_GRID] == [
        "main",
        "gptq-4bit-32g-actorder_True",
        "gptq-8bit-128g-actorder_True",
        "gptq-8bit-32g-actorder_True",
    ]
    assert all(v.config.damp_percent == 0.1 and v.config.desc_act and v.config.sym for v in CARD_GRID)
    assert GRIDS["card"] is CARD_GRID
