"""`quantmill bench`: any runtime, the same keys; plans that do not fit are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from quantmill.commands import benching
from quantmill.commands.benching import Plan, bench
from quantmill.console import Console
from quantmill.errors import BadRequest
from quantmill.runtime.interface import PAGE, Piece, RuntimeFacts

FACTS = RuntimeFacts("toy", 50, 4, 1024, None, 32, 128, 8, 10**6, 64 * 100, ())


class Toy:
    """Counts what it is asked; the next token is the last one plus one."""

    def __init__(self, facts: RuntimeFacts = FACTS) -> None:
        self.facts, self.seen = facts, []

    def forward(self, pieces: Sequence[Piece]) -> np.ndarray:
        assert sum(len(p.tokens) for p in pieces) <= self.facts.max_tokens
        held = [page for p in pieces for page in set(p.pages)]
        assert len(held) == len(set(held)), "no two sequences may share a page"
        assert max(held) < self.facts.pages
        self.seen.append([(len(p.tokens), p.start) for p in pieces])
        logits = np.zeros((len(pieces), 50), np.float32)
        for row, piece in zip(logits, pieces, strict=True):
            row[(piece.tokens[-1] + 1) % 50] = 1
        return logits


def test_what_is_measured_and_reported(capsys):
    toy = Toy()
    plan = Plan(prompt=300, tokens=5, contexts=(10,), batches=(2, 3))
    report = bench(toy, plan, 1.25, 1e9, Console(as_json=True))
    assert {
        "load_s",
        "prefill_tok_s",
        "decode_tok_s",
        "bandwidth_share",
        "contexts",
        "batches",
    } < report.keys()
    assert report["load_s"] == 1.25
    assert report["bandwidth_share"] == pytest.approx(
        report["decode_tok_s"] * (1e6 + 302.5 * 100) / 1e9, abs=1e-3
    )
    assert report["contexts"].keys() == {10}
    assert report["batches"].keys() == {2, 3}
    json.dumps(report)
    assert [(128, 0)] in toy.seen, "a prompt passes in parts that the runtime takes"
    assert [(1, 304)] * 1 in toy.seen
    assert [(1, 300), (1, 300), (1, 300)] in toy.seen
    said = capsys.readouterr()
    assert not said.out
    assert "tok/s" in said.err


def test_a_machine_whose_memory_nobody_measured():
    assert bench(Toy(), Plan(8, 2), 0.1, None, Console(True))["bandwidth_share"] is None


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan(prompt=1000, tokens=64), "--context 1065"),
        (Plan(prompt=500, tokens=12, batches=(4,)), "--kv-tokens"),
        (Plan(prompt=8, tokens=2, batches=(9,)), "fewer sequences"),
    ],
)
def test_plans_that_do_not_fit(plan, said):
    with pytest.raises(BadRequest, match=said):
        bench(Toy(), plan, 0.1, None, Console(True))


def test_pages_of_a_window_go_round():
    facts = RuntimeFacts("toy", 50, 4, 1024, 64, 6, 64, 8, 10**6, 6400, ())
    pages = benching._pages(Toy(facts), 1, 2, 10 * PAGE)
    assert set(pages) == {3, 4, 5}
    assert len(pages) == 10
