"""A path that is wrong, or does not compile, is found out before it is used."""

from __future__ import annotations

import ast
import logging

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed")

from triton.compiler.errors import CompilationError
from triton.errors import TritonError

from quantmill.formats.gptq import dequantize
from quantmill.kernels.triton import linear, packing, proof


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(proof, "_faults", {})
    monkeypatch.setattr(proof, "_unknown", {})


@pytest.fixture(scope="module")
def tiled():
    return packing.tile(proof.sample(4, 64, torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def right(x, runnable):
    return linear.dense_product(x, runnable.tiled)


def test_a_right_product_is_used_and_tried_once(tiled):
    calls = []

    def product(x, runnable):
        calls.append(x.shape[0])
        return right(x, runnable)

    for _ in range(3):
        assert proof.usable("few", tiled, torch.float16, (1, 3), product)
    assert calls == [1, 3]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_wrong_product_is_not_used_and_named(tiled, caplog, rows):
    def product(x, runnable):
        return right(x, runnable) * (1.5 if x.shape[0] == rows else 1.0)

    with caplog.at_level(logging.WARNING):
        assert not proof.usable("few", tiled, torch.float16, (1, 3), product)
    assert "'few' for 4 bits is not used: its result is wrong by 0.5" in caplog.text


def test_nan_is_wrong(tiled):
    assert not proof.usable("few", tiled, torch.float16, (1,), lambda x, r: right(x, r) * float("nan"))


def test_another_triton_is_no_crash(tiled, caplog):
    def product(x, runnable):
        raise TritonError("no such instruction")

    with caplog.at_level(logging.WARNING):
        assert not proof.usable("wide", tiled, torch.bfloat16, (1,), product)
    assert "does not compile with this triton (TritonError)" in caplog.text


def test_a_sample_is_a_linear_with_everything():
    packed = proof.sample(3, 16, torch.device("cuda" if torch.cuda.is_available() else "cpu"), ordered=True)
    assert dequantize(packed, torch.float32).shape == (128, 512)
    tiled = packing.tile(packed)
    assert tiled.order is not None
    assert tiled.zeros is not None


def test_two_ways_are_compared_once_for_a_key(caplog):
    calls = []

    def sample():
        calls.append(1)
        return torch.ones(2, 3)

    for _ in range(2):
        assert proof.agree(("wide", 1), sample, lambda x: x + 1e-4, lambda x: x)
        with caplog.at_level(logging.WARNING):
            assert not proof.agree(("wide", 2), sample, lambda x: -x, lambda x: x)
    assert len(calls) == 2
    assert "'wide' is not used for (2,): its result is wrong by 2" in caplog.text


def test_a_source_that_this_triton_does_not_take_is_tried_and_named_once(caplog):
    calls = []

    def refused(x):
        calls.append(1)
        raise CompilationError("", ast.Pass(lineno=1, col_offset=0), "another type in one branch")

    with caplog.at_level(logging.WARNING):
        for cut in range(3):
            assert not proof.agree(("wide", cut), lambda: torch.ones(1), refused, lambda x: x)
    assert len(calls) == 1
    assert caplog.text.count("'wide' is not used: it does not compile with this triton") == 1
    assert proof.agree(("few", 1), lambda: torch.ones(1), lambda x: x, lambda x: x), "other paths are"


def test_what_was_not_tried_is_not_used_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not proof.agree(("wide", 3), lambda: torch.ones(1), lambda x: x, lambda x: x)
    assert ("wide", 3) not in proof._faults
