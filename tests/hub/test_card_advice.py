import dataclasses

import pytest

from branch_folders import eval_report
from quantmill.hub.card_advice import MEAN_KL, PERPLEXITY, advice, ranking
from quantmill.hub.card_facts import BranchFacts, read_repository
from quantmill.types import EvalReport, QuantConfig


def branch(name, size_bytes, kl=None, **changes):
    """A branch without a folder; kl None: not measured."""
    measured = None if kl is None else EvalReport(**eval_report(kl, **changes))
    return BranchFacts(
        name=name,
        folder=None,
        config=QuantConfig(),
        damp_percent=0.1,
        true_sequential=True,
        size_bytes=size_bytes,
        bits_per_weight=4.2,
        shapes=(),
        model={},
        measured=measured,
    )


def line(lines, start):
    (found,) = [text for text in lines if text.startswith(start)]
    return found


def test_the_grid_of_a_7b_model(repository):
    lines = advice(read_repository(repository).branches)
    assert line(lines, "**Smallest file**").startswith("**Smallest file**: `main`")
    assert "`gptq-8bit-32g-actorder_True`" in line(lines, "**Smallest loss**")
    assert "mean KL 0.0312. The rule: the smallest file whose mean KL" in line(lines, "**Best trade**")


def test_the_best_trade_is_the_smallest_that_is_good_enough():
    lines = advice([branch("a", 10**9, 0.2), branch("b", 2 * 10**9, 0.049), branch("c", 3 * 10**9, 0.001)])
    assert line(lines, "**Best trade**").startswith("**Best trade**: `b`, 2.00 GB, mean KL 0.049. The rule:")
    assert line(lines, "**Smallest file**") == "**Smallest file**: `a`, 1.00 GB."
    assert line(lines, "**Smallest loss**") == "**Smallest loss**: `c`, 3.00 GB, mean KL 0.001."


def test_no_branch_is_called_good_that_is_not():
    lines = advice([branch("a", 10**9, 0.5), branch("b", 2 * 10**9, 0.2)])
    assert line(lines, "**Best trade**").startswith("**Best trade**: none.")


def test_branches_that_noise_does_not_tell_apart_are_named():
    lines = advice([branch("a", 10**9, 0.0100), branch("b", 2 * 10**9, 0.0095), branch("c", 3 * 10**9, 0.5)])
    assert line(lines, "**Smallest loss**").endswith("does not tell it from `a`: their intervals overlap.")


def test_a_branch_that_another_beats_in_both():
    lines = advice([branch("a", 10**9, 0.01), branch("b", 2 * 10**9, 0.02)])
    assert "`b` is no smaller than `a` and loses no less." in lines


def test_unmeasured_branches_are_not_ranked():
    lines = advice([branch("a", 10**9), branch("b", 2 * 10**9, 0.02)])
    assert "Not measured, and so not compared: `a`." in lines
    assert "`b`" in line(lines, "**Smallest loss**")


def test_nothing_measured():
    assert advice([branch("a", 10**9)]) == (
        "**Smallest file**: `a`, 1.00 GB.",
        "Not measured, and so not compared: `a`.",
    )


def test_different_texts_are_not_compared():
    branches = [branch("a", 10**9, 0.1), branch("b", 2 * 10**9, 0.02, text_sha256="other")]
    assert ranking(branches) is None
    assert advice(branches)[1].startswith("The measurements were made on different texts")


@pytest.mark.parametrize(
    ("original", "expected"),
    [(5.25, "**Best trade**: `b`"), (4.0, "**Best trade**: none."), (None, None)],
)
def test_without_kl_perplexity_ranks(original, expected):
    plain = {"mean_kl": None, "mean_kl_ci": None, "original_perplexity": original}
    branches = [
        branch("a", 10**9, 0.1, perplexity=6.0, **plain),
        branch("b", 2 * 10**9, 0.1, perplexity=5.3, **plain),
    ]
    metric, ranked = ranking(branches)
    assert metric is PERPLEXITY
    assert [r.loss for r in ranked] == [6.0, 5.3]
    trades = [text for text in advice(branches) if text.startswith("**Best trade**")]
    assert [text.startswith(expected) for text in trades] == ([True] if expected else [])


def test_kl_ranks_only_where_every_branch_has_it():
    both = [branch("a", 10**9, 0.1), branch("b", 2 * 10**9, 0.02)]
    assert ranking(both)[0] is MEAN_KL
    without = dataclasses.replace(both[0].measured, mean_kl=None, mean_kl_ci=None)
    assert ranking([dataclasses.replace(both[0], measured=without), both[1]])[0] is PERPLEXITY
