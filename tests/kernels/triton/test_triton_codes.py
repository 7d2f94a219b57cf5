"""The PTX of the inner step, run by a small interpreter: every plane of every kind gives the codes, exactly."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton.language", reason="triton is not installed")

from quantmill.kernels.triton import codes

WORDS = 64  # random ones, side by side


def halves(word, bf16):
    """(words, 2) float64 of registers."""
    both = np.stack([word & 0xFFFF, word >> 16], -1).astype(np.uint32)
    if bf16:
        return (both << 16).view(np.float32).astype(np.float64)
    return both.astype(np.uint16).view(np.float16).astype(np.float64)


def register(values, bf16):
    """The other way; the values have to be exact."""
    if bf16:
        bits = values.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), "exact in bfloat16"
        both = bits >> 16
    else:
        both = values.astype(np.float16).view(np.uint16).astype(np.uint32)
        assert np.array_equal(values, values.astype(np.float16)), "exact in float16"
    return both[:, 0] | both[:, 1] << 16


def select(a, b, selector):
    """prmt: each nibble of the selector names a byte of b:a."""
    eight = [(a >> 8 * i) & 0xFF for i in range(4)] + [np.full_like(a, b >> 8 * i & 0xFF) for i in range(4)]
    return sum((eight[selector >> 4 * i & 7] << 8 * i for i in range(4)), np.zeros_like(a)).astype(np.uint32)


def run(ptx, inputs):
    """What $0 holds afterwards; inputs are $1, $2 ... Understands what codes.py writes and nothing else."""
    held = {f"${i + 1}": word for i, word in enumerate(inputs)}

    def value(name):
        return np.uint32(int(name, 0)) if name[0].isdigit() else held[name]

    for line in re.sub(r"[{}]", "", ptx.replace("{l, h}", "lh")).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.strip().split(" ", 1)
        to, *names = [n.strip() for n in rest.split(",")]
        if to == "lh":
            held["l"], held["h"] = (halves(held["t"], False)[:, i] for i in range(2))
            continue
        args = [held[n] if n in held else value(n) for n in names]
        held[to] = result(op, args)
    return held["$0"]


def result(op, args):
    if op == "prmt.b32":
        return select(args[0], int(args[1]), int(args[2]))
    if op == "lop3.b32":
        assert args[3] == 0xEA
    return {
        "mov.b32": lambda a: np.broadcast_to(a, (WORDS,)).astype(np.uint32),
        "shr.u32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "lop3.b32": lambda a, b, c, _: (a & b) | c,
        "add.rn.f16x2": lambda a, b: register(halves(a, False) + halves(b, False), False),
        "fma.rn.bf16x2": lambda a, b, c: register(halves(a, True) * halves(b, True) + halves(c, True), True),
        "cvt.f32.f16": lambda a: a,
        "cvt.rn.bf16x2.f32": lambda a, b: register(np.stack([b, a], -1), True),
    }[op](*args)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_plane_gives_its_codes(bits, bf16):
    rng = np.random.default_rng(bits)
    words = [rng.integers(0, 2**32, WORDS, dtype=np.uint32) for _ in range(codes.words_in(bits))]
    for plane in range(codes.planes(bits)):
        word, at = codes.place(plane, bits)
        stored = np.zeros((WORDS, 2), np.int64)
        for half in range(2):
            if word < 0:
                for i in range(3):
                    stored[:, half] |= (words[i].astype(np.int64) >> (16 * half + 15) & 1) << i
            else:
                stored[:, half] = words[word].astype(np.int64) >> (16 * half + at) & (2**bits - 1)
        minus = np.full(
            WORDS, codes.minus_pair(codes.power(plane, bits, bf16), bits, bf16) % 2**32, np.uint32
        )
        got = halves(run(codes.plane_ptx(plane, bits, bf16), [minus, *words]), bf16)
        assert np.array_equal(got, stored - 2 ** (bits - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_bit_of_the_words_holds_one_code(bits):
    taken = [codes.place(p, bits) for p in range(codes.planes(bits))]
    covered = {(w, at + i) for w, at in taken if w >= 0 for i in range(bits)}
    if bits == 3:
        covered |= {(w, 15) for w in range(3)}
    assert len(covered) == 16 * codes.words_in(bits)
