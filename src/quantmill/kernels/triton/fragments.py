"""Words of codes -> the registers of `wgmma`'s left operand, in x's own order of columns, as PTX.

A quad of threads holds 32 neighbouring columns of a row, eight a thread (packing.py). `wgmma` reads x from shared
memory and wants of every eight columns two in each thread. That is a transposition of 4 x 4 pairs of codes inside
the quad: between the two bits of the thread's number, the register and the place within the word. It is done on
the packed codes, four to eight at once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton

from quantmill.kernels.triton.codes import pair, plane_ptx, power


@triton.constexpr_function
def fields(bits, odd):
    """16 bits that cover the codes of even planes, or of odd ones: 0x0f0f for 4 bits. 3 bits: of the first twelve
    planes, and the places of the last four, which go by themselves.
    """
    here = range(bits if odd else 0, 12 if bits == 3 else 16, 2 * bits)
    return sum(((1 << bits) - 1) << at for at in here) | (0xF000 if bits == 3 else 0)


@triton.constexpr_function
def _numbered(text, **names):
    """The names of a text, in braces, as operands."""
    for name, number in names.items():
        text = text.replace("{" + name + "}", f"${number}")
    return text


# The last planes of 3 bits: e holds 12 and 14, o 13 and 15; one of them goes to the other thread and comes back.
_LAST_PLANES = (
    "shr.u32 e, c, 3; and.b32 e, e, 0x0e000e00; lop3.b32 e, a, 0x70007000, e, 0xea; "
    "shr.u32 o, a, 6; and.b32 o, o, 0x02000200; lop3.b32 o, b, 0x70007000, o, 0xea; "
    "shr.u32 s, b, 5; lop3.b32 o, s, 0x04000400, o, 0xea; shr.u32 s, c, 4; lop3.b32 o, s, 0x08000800, o, 0xea; "
    "lop3.b32 s, e, o, {upper}, 0xe4; shfl.sync.bfly.b32 s, s, 2, 0x1f, -1; "
    "lop3.b32 e, s, e, {upper}, 0xe4; lop3.b32 o, o, s, {upper}, 0xe4; "
    "and.b32 a, a, 0x0fff0fff; lop3.b32 a, e, 0x70007000, a, 0xea; "
    "and.b32 b, b, 0x0fff0fff; lop3.b32 b, o, 0x70007000, b, 0xea; "
    "and.b32 c, c, 0x0fff0fff; shl.b32 s, e, 3; lop3.b32 c, s, 0x70007000, c, 0xea; "
    "shl.b32 s, o, 6; lop3.b32 a, s, 0x80008000, a, 0xea; shl.b32 s, o, 5; lop3.b32 b, s, 0x80008000, b, 0xea; "
    "shl.b32 s, o, 4; lop3.b32 c, s, 0x80008000, c, 0xea; "
)


@triton.constexpr_function
def turned_ptx(bits):
    """A thread's words with their codes exchanged within the quad: four registers, 3 bits three times four.

    Operands: the results, the words, then four registers each (all equal) of masks: all ones in odd threads; the
    fields that stay; by how much the others turn; 3 bits: all ones in the quad's upper threads.
    """
    words = 3 if bits == 3 else 1
    odd, stay, by, upper = (8 * words + 4 * i for i in range(4))
    text = ".reg .b32 w<12>, a, b, c, e, o, s; "
    for word in range(words):
        for row in (0, 1):
            text += _numbered(
                "lop3.b32 s, {a}, {b}, {odd}, 0xe4; shfl.sync.bfly.b32 s, s, 1, 0x1f, -1; "
                f"lop3.b32 w{4 * word + row}, s, {{a}}, {{odd}}, 0xe4; "
                f"lop3.b32 w{4 * word + row + 2}, {{b}}, s, {{odd}}, 0xe4; ",
                a=4 * words + 4 * word + row, b=4 * words + 4 * word + row + 2, odd=odd,
            )  # fmt: skip
    for r in range(4):
        for word, name in zip(range(words), "abc", strict=False):
            text += _numbered(
                f"shfl.sync.bfly.b32 s, w{4 * word + r}, 2, 0x1f, -1; shf.l.wrap.b32 s, s, s, {{by}}; "
                f"lop3.b32 {name}, w{4 * word + r}, s, {{stay}}, 0xe4; ",
                by=by, stay=stay,
            )  # fmt: skip
        if bits == 3:
            text += _numbered(_LAST_PLANES, upper=upper)
        for word, name in zip(range(words), "abc", strict=False):
            text += f"mov.b32 ${4 * word + r}, {name}; "
    return "{ " + text + "}"


@triton.constexpr_function
def fragment_ptx(plane, bits, has_zero, bf16):
    """$0-3: a plane of the words as four registers of A, times the scales, rounded once.

    Operands after the results: the scales, the middle less the zero points, the words, four registers each.
    """
    code = plane_ptx(plane, bits, False)
    minus = f"0x{pair(-(2.0 ** power(plane, bits, False) + 2 ** (bits - 1)), False):08x}"
    less = "add.rn.f16x2 v, v, {zero}; " if has_zero else ""
    last = "mul.rn.f16x2 {to}, v, {scale}; "
    if bf16:
        last = (
            "mul.rn.f16x2 v, v, {scale}; { .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, v; "
            "cvt.f32.f16 a, l; cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 {to}, b, a; } "
        )
    text = ""
    for r in range(4):
        here = code.replace("$0", "v").replace("$1", "n")
        for word, name in ((0, "A"), (1, "B"), (2, "C")):
            here = here.replace(f"${2 + word}", name)
        for word, name in ((0, "A"), (1, "B"), (2, "C")):
            here = here.replace(name, f"${12 + 4 * word + r}")
        text += here + " " + _numbered(less + last, to=r, scale=4 + r, zero=8 + r)
    return "{ .reg .b32 v, n; " + f"mov.b32 n, {minus}; " + text + "}"
