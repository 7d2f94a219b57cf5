"""What this processor can do: the rows of instruction sets a kernel can be emitted for.

Knows names and requirements only; `dots.py` knows what each row emits. Nothing is probed at import:
`choose` looks at the processor and at QUANTMILL_CPU_ISA when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from quantmill.errors import BadRequest

VARIABLE = "QUANTMILL_CPU_ISA"


@dataclass(frozen=True, slots=True)
class Isa:
    """One row. `needs`: alternatives, each a set of LLVM feature names; one of them must be complete."""

    name: str
    needs: tuple[frozenset[str], ...]
    half_loads: bool  # the processor turns float16 into float32 by itself

    def missing(self, features: Mapping[str, bool]) -> str:
        """What stands in this row's way, or "" when nothing does."""
        lacks = [sorted(f for f in need if not features.get(f, False)) for need in self.needs]
        return "" if not all(lacks) else " or ".join("+".join(names) for names in lacks)


# Fastest first.
ISAS = (
    Isa("avx512vnni", (frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"}),), True),
    Isa(
        "avxvnni",
        (frozenset({"avx2", "avxvnni", "f16c", "fma"}), frozenset({"avx512vl", "avx512vnni", "f16c", "fma"})),
        True,
    ),
    Isa("avx2", (frozenset({"avx2", "f16c", "fma"}),), True),
    Isa("portable", (frozenset(),), False),
)


@cache
def host_features() -> dict[str, bool]:
    """LLVM's names of this processor's abilities."""
    from llvmlite.binding import get_host_cpu_features

    try:
        return dict(get_host_cpu_features())
    except RuntimeError:  # LLVM does not know how to ask this kind of processor
        return {}


def available() -> tuple[Isa, ...]:
    """The rows this processor can run, fastest first; the last is always `portable`."""
    return tuple(isa for isa in ISAS if not isa.missing(host_features()))


def choose(name: str | None = None) -> Isa:
    """The row called `name`, else the one in QUANTMILL_CPU_ISA, else the fastest this processor can run.

    Raises BadRequest for a name that is no row or that this processor cannot run.
    """
    name = name or os.environ.get(VARIABLE) or None
    if name is None:
        return available()[0]
    known = {isa.name: isa for isa in ISAS}
    usable = ", ".join(isa.name for isa in available())
    if name not in known:
        raise BadRequest(
            f"no CPU instruction set is called {name!r}; unset {VARIABLE} or use one of {usable}"
        )
    if missing := known[name].missing(host_features()):
        raise BadRequest(
            f"this processor lacks {missing} for {name}; unset {VARIABLE} or use one of {usable}"
        )
    return known[name]
