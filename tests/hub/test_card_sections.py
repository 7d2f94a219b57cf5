import dataclasses

import pytest

from branch_folders import eval_report, modules, quantize_report
from quantmill.hub import card_sections as sections
from quantmill.hub.card_facts import read_branch, read_repository
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig


@pytest.mark.parametrize(
    ("config", "vllm", "exllama"),
    [
        (QuantConfig(), "yes", "yes"),
        (QuantConfig(8, 32), "yes", "takes 4 bits"),
        (QuantConfig(4, -1), "yes", "yes"),
        (QuantConfig(3, 128), "takes 4 and 8 bits", "takes 4 bits"),
        (QuantConfig(4, 16), "takes group sizes 32, 64, 128 and none", "yes"),
        (QuantConfig(sym=False), "takes symmetric files only", "takes the v1 format only"),
        (QuantConfig(act_order=ActOrder.GROUPED), "follows no grouped act order (g_idx)", "yes"),
        (QuantConfig(checkpoint_format=CheckpointFormat.GPTQ_V2), "yes", "takes the v1 format only"),
    ],
)
def test_general_verdicts(make_branch, config, vllm, exllama):
    verdicts = sections.verdicts(read_branch(make_branch("x", config)))
    assert verdicts["vllm"] == vllm
    assert verdicts["exllamav2"] == exllama
    assert verdicts["transformers+quantmill"] == "yes"


def test_exllama_needs_dimensions_in_steps_of_32(make_branch):
    facts = dataclasses.replace(read_branch(make_branch("x")), shapes=((64, 48),))
    assert not sections.reads(facts, "exllamav2")


def test_loaders_group_branches_by_reason(repository):
    lines = sections.loader_lines(read_repository(repository).branches)
    assert "**Transformers with quantmill**: every branch." in lines
    assert lines[-1] == (
        "**ExLlamaV2**: `main`, `gptq-4bit-32g-actorder_True`; not `gptq-8bit-128g-actorder_True`, "
        "`gptq-8bit-32g-actorder_True`: takes 4 bits."
    )


def test_act_order_in_the_table(make_branch):
    config = QuantConfig(act_order=ActOrder.GROUPED)
    table = sections.provided_files([read_branch(make_branch("x", config))])
    assert "| Yes, grouped |" in table


def test_runs_that_differ_in_settings_are_two_recipes(make_branch):
    config = QuantConfig()
    for name, seconds, seed in (("main", 10.0, 0), ("b", 20.0, 0), ("c", 30.0, 1)):
        report = quantize_report(name, config, modules(config), seconds=seconds)
        report["calibration"]["seed"] = seed
        folder = make_branch(name, config, report=report)
    recipes = sections.recipes(read_repository(folder.parent).branches)
    assert [recipe.branches for recipe in recipes] == [("main", "b"), ("c",)]
    assert dict(recipes[1].rows)["Seed"] == "1"


def test_what_a_report_leaves_out_is_not_recorded(make_branch):
    (recipe,) = sections.recipes([read_branch(make_branch("main", report={"quantmill": "0.1.0"}))])
    assert recipe.command is None
    values = dict(recipe.rows)
    assert values["Made with"] == "quantmill 0.1.0; other versions not recorded"
    assert values["Samples × sequence length"] == "not recorded × not recorded tokens"
    assert {values[k] for k in ("Seed", "Original", "Preset", "Calibration data")} == {"not recorded"}


def test_losses_per_layer(make_branch):
    config = QuantConfig()
    report = quantize_report("main", config, modules(config, 0.002))
    table = sections.layer_losses([read_branch(make_branch("main", config, report=report))])
    row = table.splitlines()[2]
    assert row == "| `main` | 4 | 0.005 | 0.008 | `model.layers.1.mlp.down_proj` | 3 min 20 s | 2.10 GB |"
    assert sections.layer_losses([read_branch(make_branch("other"))]) is None


def test_fallbacks_are_grouped_by_reason(make_branch):
    config = QuantConfig(damp_percent=0.1)
    reports = modules(config, m0=(0.3, "more damping"), m1=(0.3, "more damping"), m2=(0.1, "rounded"))
    facts = read_branch(make_branch("main", config, report=quantize_report("main", config, reports)))
    assert sections.fallback_lines([facts]) == (
        "`main`, more damping, damp 0.3 instead of 0.1: `model.layers.0.self_attn.q_proj`, "
        "`model.layers.0.mlp.down_proj`",
        "`main`, rounded: `model.layers.1.self_attn.q_proj`",
    )


def test_protocols_are_told_apart(make_branch):
    same = [read_branch(make_branch(name, evaluation=eval_report()), name) for name in ("main", "b")]
    assert len(sections.protocols(same)) == 1
    other = read_branch(make_branch("c", evaluation=eval_report(ctx=2048, original_perplexity=None)))
    lines = sections.protocols([*same, other])
    assert lines[0].startswith("`main`, `b`: Text wikitext-2-v1.test.txt")
    assert "windows of 2048 tokens" in lines[1]
    assert "The original was not measured beside it." in lines[1]
    assert sections.protocols([]) == ()


def test_tails_only_where_the_original_was_there(make_branch):
    alone = read_branch(make_branch("a", evaluation=eval_report(mean_kl=None, mean_kl_ci=None)))
    assert sections.tails([alone]) is None
    partly = read_branch(make_branch("b", evaluation=eval_report(max_kl=None)))
    assert "not measured" in sections.tails([partly])
    assert "2.2 %" in sections.tails([partly])


def test_a_row_says_in_words_what_sets_it_apart(repository):
    rows = sections.provided_files(read_repository(repository).branches).splitlines()
    assert rows[0].endswith("| Desc |")
    assert rows[2].endswith("| 4 bits, groups of 128, act order, the default, the smallest file |")
    assert rows[3].endswith("| 4 bits, groups of 32, act order |")
    assert rows[5].endswith("| 8 bits, groups of 32, act order, the least loss measured |")


def test_a_row_alone_is_compared_with_nothing(make_branch):
    config = QuantConfig(3, -1, act_order=ActOrder.NONE)
    table = sections.provided_files([read_branch(make_branch("x", config))])
    assert table.endswith("| 3 bits, one scale per row, no act order |")
