import json

import pytest

from branch_folders import K, N, eval_report, modules, quantize_report
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.hub.card_facts import Source, branch_folders, parse_card, read_branch, read_repository
from quantmill.hub.variants import CARD_GRID, branch_name
from quantmill.types import ActOrder, EvalReport, QuantConfig


@pytest.mark.parametrize(
    "config", [QuantConfig(4, 32), QuantConfig(8, -1), QuantConfig(3, 32), QuantConfig(2, 16)]
)
def test_bits_per_weight_count_every_stored_byte(make_branch, config):
    facts = read_branch(make_branch("x", config))
    groups = config.groups(K)
    stored = K * N * config.bits + groups * N * 16 + groups * N * config.bits + 32 * K
    assert facts.bits_per_weight == pytest.approx(stored / (K * N))
    assert facts.size_bytes == (facts.folder / "model.safetensors").stat().st_size
    assert facts.shapes == ((K, N),)


def test_a_branch_as_it_was_made_and_measured(make_branch):
    config = QuantConfig(4, 32, damp_percent=0.05, true_sequential=False)
    report = quantize_report("b", config, modules(config))
    facts = read_branch(make_branch("b", config, report=report, evaluation=eval_report()))
    assert facts.config.group_size == 32
    assert (facts.damp_percent, facts.true_sequential) == (0.05, False)
    assert facts.calibration.tokens == 32768
    assert facts.making.modules == tuple(modules(config))
    assert facts.making.versions == (("torch", "2.13.0"), ("transformers", "5.23.0"))
    assert isinstance(facts.measured, EvalReport)
    assert facts.measured.mean_kl_ci == (0.027, 0.033)
    assert facts.loaders is None


def test_the_name_of_a_folder_alone(make_branch):
    config = QuantConfig(8, 32)
    assert read_branch(make_branch("a", config)).name == branch_name(config)
    report = quantize_report("mine", config, [])
    assert read_branch(make_branch("b", config, report=report)).name == "mine"


def test_main_comes_first_then_bits_then_coarse_groups(make_branch):
    for bits, group in ((8, 32), (4, 32), (8, 128), (4, -1), (3, 64), (4, 128)):
        config = QuantConfig(bits, group)
        folder = make_branch(branch_name(config), config)
    names = [b.name for b in read_repository(folder.parent).branches]
    order = [
        "main",
        *(f"gptq-{x}-actorder_True" for x in ("3bit-64g", "4bit--1g", "4bit-32g", "8bit-128g", "8bit-32g")),
    ]
    assert names == order


@pytest.mark.parametrize(
    ("quant", "damp", "sequential", "dataset"),
    [
        ({"bits": 4, "group_size": 128, "desc_act": True, "damp_percent": 0.01}, 0.01, None, None),
        (
            {"bits": 4, "group_size": 128, "meta": {"damp_percent": 0.05, "true_sequential": True}},
            0.05,
            True,
            None,
        ),
        ({"bits": 4, "group_size": 128, "dataset": "c4", "model_seqlen": 2048}, None, None, "c4"),
    ],
)
def test_folders_of_other_makers(make_branch, quant, damp, sequential, dataset):
    facts = read_branch(make_branch("x", QuantConfig(act_order=ActOrder.NONE), quant=quant))
    assert (facts.damp_percent, facts.true_sequential) == (damp, sequential)
    assert facts.calibration.dataset == dataset
    assert facts.making is None
    assert facts.measured is None


def test_branches_of_different_sources_have_none_in_common(make_branch):
    config = QuantConfig()
    for name, source in (("main", "a/one"), ("other", "a/two")):
        folder = make_branch(name, config, report=quantize_report(name, config, [], source=source))
    assert read_repository(folder.parent).source is None


@pytest.mark.parametrize(
    ("typed", "hub_id", "name"),
    [
        (
            "mistralai/Mistral-7B-Instruct-v0.1",
            "mistralai/Mistral-7B-Instruct-v0.1",
            "Mistral-7B-Instruct-v0.1",
        ),
        ("me/model:branch/x", "me/model", "model"),
        ("/data/models/smol/", None, "smol"),
        ("./smol", None, "smol"),
        ("smol", None, "smol"),
        ("models/smol.q4.gguf", None, "smol.q4"),
        ("a/b/c", None, "c"),
    ],
)
def test_where_a_source_lies(typed, hub_id, name):
    source = Source(typed)
    assert (source.hub_id, source.name) == (hub_id, name)


def test_a_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "smol").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert Source("models/smol").hub_id is None


def test_an_unquantised_folder_is_no_branch(make_branch):
    folder = make_branch("main")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    with pytest.raises(BadCheckpoint, match="quantization_config"):
        read_repository(folder.parent)


def test_another_method_is_refused(make_branch):
    folder = make_branch("main", quant={"quant_method": "aqlm", "bits": 4, "group_size": 128})
    with pytest.raises(UnsupportedModel, match="aqlm"):
        read_repository(folder.parent)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("eval_report.json", "{", "eval_report.json"),
        ("eval_report.json", '{"perplexity": 5.0}', "has no tokens: run `quantmill eval"),
        ("quantize_report.json", "[]", "quantize_report.json"),
        ("quantize_report.json", '{"modules": [{"nam": 1}]}', "an entry of modules"),
    ],
)
def test_damaged_reports(make_branch, file, text, message):
    folder = make_branch("main")
    (folder / file).write_text(text)
    with pytest.raises(BadCheckpoint, match=message):
        read_branch(folder)


def test_keys_of_later_versions_are_left_alone(make_branch):
    facts = read_branch(make_branch("main", evaluation=eval_report() | {"seconds": 3}, report={"unknown": 1}))
    assert facts.measured.perplexity == 5.301
    assert facts.making.command is None
    assert facts.making.calibration.dataset is None


@pytest.mark.parametrize(
    ("text", "header", "body"),
    [
        ("---\nlicense: mit\n---\nHello\n", {"license": "mit"}, "Hello"),
        ("---\r\nlicense: mit\r\n---\r\nHello", {"license": "mit"}, "Hello"),
        ("Hello\n\n---\nmore", {}, "Hello\n\n---\nmore"),
        ("---\nlicense: [mit\n---\nHello", {}, "Hello"),
        ("---\n- a list\n---\nHello", {}, "Hello"),
    ],
)
def test_cards_in_two_parts(text, header, body):
    card = parse_card(text)
    assert (card.header, card.text) == (header, body)


def test_a_branch_folder_is_itself(make_branch):
    folder = make_branch("main")
    assert branch_folders(folder) == (folder,)
    assert branch_folders(folder.parent) == (folder,)


def test_the_grid_is_read_whole(repository):
    facts = read_repository(repository)
    assert [b.config.bits for b in facts.branches] == [v.config.bits for v in CARD_GRID]
    assert facts.source == Source("mistralai/Mistral-7B-Instruct-v0.1")
    assert facts.original is None
