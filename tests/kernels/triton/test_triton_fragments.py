"""The PTX that makes `wgmma`'s left operand, run for a quad of threads by a small interpreter."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton.language", reason="triton is not installed")

from quantmill.kernels.triton.codes import place, planes, words_in
from quantmill.kernels.triton.fragments import fields, fragment_ptx, turned_ptx
from quantmill.kernels.triton.wide import asked, pair_of_step, plane_of_step, unit_of_step, units_at_once

ALL = 0xFFFFFFFF
SCALES, ZEROS = (0.5, -0.25), (1.0, -2.0)  # of a row's upper and lower half


def half2(value):
    """The register that holds a float16 twice."""
    return int(np.float16(value).view(np.uint16)) * 0x10001


def halves(register):
    return np.array([register & 0xFFFF, register >> 16], np.uint16).view(np.float16)


def pairwise(op, a, b):
    both = (op(halves(a), halves(b))).astype(np.float16).view(np.uint16)
    return int(both[0]) | int(both[1]) << 16


def lop3(a, b, c, table):
    result = 0
    for bit in range(32):
        which = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> which & 1) << bit
    return result


def prmt(a, b, selector):
    eight = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    return sum(eight[selector >> 4 * i & 7] << 8 * i for i in range(4))


OPS = {
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "shf.l.wrap.b32": lambda low, high, by: (high << 32 | low) << (by & 31) >> 32,
    "shr.u32": lambda a, by: a >> by,
    "shl.b32": lambda a, by: a << by,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "mov.b32": lambda a: a,
    "add.rn.f16x2": lambda a, b: pairwise(np.add, a, b),
    "mul.rn.f16x2": lambda a, b: pairwise(np.multiply, a, b),
}


def run(ptx, quad):
    """Run the text for four threads at once; `quad`: what each holds by name, operands as "$0"."""
    for line in re.sub(r"[{}]", "", ptx).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.strip().split(" ", 1)
        to, *names = [n.strip() for n in rest.split(",")]
        found = [[held[n] if n in held else int(n, 0) for n in names if n != "-1"] for held in quad]
        if op.startswith("shfl"):
            results = [found[i ^ values[1]][0] for i, values in enumerate(found)]
        else:
            results = [OPS[op](*values) & ALL for values in found]
        for held, result in zip(quad, results, strict=True):
            held[to] = result


def packed(codes, bits):
    """(row half, column) codes -> for each thread of the quad its words: (word, register)."""
    words = np.zeros((4, words_in(bits), 4), np.int64)
    for t in range(4):
        for r in range(4):
            for plane in range(planes(bits)):
                for half in range(2):
                    column = 32 * (plane >> 1) + 8 * t + 4 * (plane & 1) + 2 * (r >> 1) + half
                    code = int(codes[r & 1, column])
                    word, at = place(plane, bits)
                    if word >= 0:
                        words[t, word, r] |= code << (at + 16 * half)
                        continue
                    for i in range(3):
                        words[t, i, r] |= (code >> i & 1) << (15 + 16 * half)
    return words


def masks(t, bits):
    stay = fields(bits, bool(t & 2))
    by = 32 - bits if t & 2 else bits
    return ALL * (t & 1), stay << 16 | stay, by << 16 | by, ALL * (t >> 1)


def turned(words, bits):
    count = words.shape[1]
    quad = []
    for t in range(4):
        held = {f"${4 * count + 4 * w + r}": int(words[t, w, r]) for w in range(count) for r in range(4)}
        held |= {f"${8 * count + 4 * i + r}": m for i, m in enumerate(masks(t, bits)) for r in range(4)}
        quad.append(held)
    run(turned_ptx(bits), quad)
    return [[[held[f"${4 * w + r}"] for r in range(4)] for w in range(count)] for held in quad]


@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes_hold_sixteen_neighbouring_columns(bits, has_zero):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, planes(bits) * 16))
    words = turned(packed(codes, bits), bits)
    for plane in range(planes(bits)):
        quad = []
        for own in words:
            held = {f"${12 + 4 * w + r}": word[r] for w, word in enumerate(own) for r in range(4)}
            held |= {f"${4 + r}": half2(SCALES[r & 1]) for r in range(4)}
            quad.append(held | {f"${8 + r}": half2(ZEROS[r & 1]) for r in range(4)})
        run(fragment_ptx(plane, bits, has_zero, False), quad)
        for t, held in enumerate(quad):
            for r in range(4):
                first = 16 * plane + 8 * (r >> 1) + 2 * t
                wanted = codes[r & 1, first : first + 2] - 2.0 ** (bits - 1) + has_zero * ZEROS[r & 1]
                assert np.array_equal(halves(held[f"${r}"]), wanted * SCALES[r & 1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_share_a_word_out(bits):
    even, odd = fields(bits, False), fields(bits, True)
    assert even | odd == 0xFFFF
    assert even & odd == (0xF000 if bits == 3 else 0), "the last four planes of 3 bits go by themselves"


@pytest.mark.parametrize("group_planes", [2, 8])
@pytest.mark.parametrize("reps", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_units_are_found_where_they_were_asked_for(bits, reps, group_planes):
    """The kernel's loops without their products: what they ask for is in the places where they look for it."""
    in_unit, together = planes(bits), units_at_once(planes(bits))
    ahead, of_unit = 16 // in_unit, max(1, in_unit // group_planes)
    first = [
        (i * together + u, rep)
        for i in range(ahead // together)
        for rep in range(reps)
        for u in range(together)
    ]
    again, pairs = [], [(*unit, g) for unit in first for g in range(of_unit)]
    for step in range(4):
        for rep in range(reps):
            for quarter in range(4):
                unit, plane = unit_of_step(step, quarter, in_unit), plane_of_step(step, quarter, in_unit)
                if plane == 0:
                    assert first[asked(unit, rep, in_unit, reps)] == (unit, rep)
                    again.append((unit, rep))
                found = pairs[pair_of_step(step, quarter, rep, in_unit, group_planes, reps)]
                assert found == (unit, rep, plane // group_planes % of_unit)
    assert again == first, "the next turn's lie as this one's"
