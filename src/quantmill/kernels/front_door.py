"""Front door of the kernels: y = x Wᵀ + bias for a packed linear, through the best backend of one table.

`plan` picks a backend for each bracket of rows, `prepare` gets a layer ready once, `matmul` is for a
single call, and `explain` says what was chosen and why the rows above it were not. Where nobody names a
backend, $QUANTMILL_BACKEND or `force` may. Knows no model and no
file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantmill.errors import BadRequest
from quantmill.kernels.backend import Backend, LinearSpec, spec_of
from quantmill.kernels.cpu.backend import CPU, CPU_EXACT
from quantmill.kernels.reference import DENSE, REFERENCE
from quantmill.kernels.triton.backend import TRITON
from quantmill.types import PackedLinear

__all__ = [
    "BACKENDS",
    "Backend",
    "LinearSpec",
    "Plan",
    "Prepared",
    "explain",
    "matmul",
    "plan",
    "prepare",
    "spec_of",
]

# Best first: the first row that does not refuse is used. A row whose kernels need triton or numba imports them
# inside its three functions.
BACKENDS: tuple[Backend, ...] = (TRITON, CPU, CPU_EXACT, DENSE, REFERENCE)

VARIABLE = "QUANTMILL_BACKEND"

# One backend is chosen for calls of up to so many rows: decoding, small batches, short and long prompts.
ROW_BRACKETS = (1, 16, 256, 1 << 20)

Plan = tuple[tuple[int, Backend], ...]  # (most rows, backend), fewest rows first


_forced: str | None = None


def force(backend: str | None) -> None:
    """In this process, `backend` is the only row used where nobody names another; None: any again.

    Raises BadRequest for a name that no row has.
    """
    global _forced
    _check_name(backend)
    _forced = backend


def plan(spec: LinearSpec, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Plan:
    """Which backend serves calls of how many rows. `backend` names the only row allowed.

    Raises BadRequest where no row serves, with every reason.
    """
    steps: list[tuple[int, Backend]] = []
    for rows in ROW_BRACKETS:
        row = _choose(spec, device, dtype, rows, backend)
        if steps and steps[-1][1] is row:
            steps.pop()
        steps.append((rows, row))
    return tuple(steps)


def explain(
    spec: LinearSpec, device: torch.device, dtype: torch.dtype, rows: int, backend: str | None = None
) -> str:
    """One line: the backend for calls of `rows` rows, and why each better one was passed over."""
    row = _choose(spec, device, dtype, rows, backend)
    passed = []
    for other in BACKENDS[: BACKENDS.index(row)] if backend is None else ():
        if reason := other.supports(spec, device, dtype, rows):
            passed.append(f"not {other.name}: {reason}")
    name = str(dtype).removeprefix("torch.")
    return "; ".join([f"{row.name} on {device}, {name}, {rows} rows: {row.summary}", *passed])


@dataclass(frozen=True, slots=True)
class Prepared:
    """A linear ready for use with activations of one dtype. Call it with x (..., K); gives (..., N)."""

    in_features: int
    dtype: torch.dtype
    steps: tuple[tuple[int, Backend, Any], ...]  # (most rows, backend, its state)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features or x.dtype != self.dtype:
            found = f"{x.dtype} with {x.shape[-1]} columns"
            raise BadRequest(f"x is {found}; this linear is ready for {self.dtype} with {self.in_features}")
        flat = x.reshape(-1, self.in_features)
        rows = flat.shape[0]
        _, backend, state = next((step for step in self.steps if rows <= step[0]), self.steps[-1])
        y = backend.matmul(flat, state)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def prepare(
    packed: PackedLinear,
    dtype: torch.dtype,
    *,
    kept_weights: int | None = None,
    backend: str | None = None,
    steps: Plan | None = None,
) -> Prepared:
    """Get a linear ready for activations of `dtype` on the device where its tensors lie.

    `kept_weights`: quantised weights that are kept prepared along with this one (a model's; default: this
    linear's own), by which a backend that spends memory judges. `steps`: a plan made earlier, so that the
    layers of one model are not judged by memory that their neighbours have just taken. Raises BadRequest
    where no backend serves.
    """
    if steps is None:
        kept = packed.in_features * packed.out_features if kept_weights is None else kept_weights
        steps = plan(spec_of(packed, kept), packed.qweight.device, dtype, backend)
    states: dict[str, Any] = {}
    ready = []
    for most, row in steps:
        if row.name not in states:
            states[row.name] = row.prepare(packed, dtype)
        ready.append((most, row, states[row.name]))
    return Prepared(packed.in_features, dtype, tuple(ready))


def matmul(x: Tensor, packed: PackedLinear, *, backend: str | None = None) -> Tensor:
    """x (..., K) floating -> (..., N) in x's dtype, bias added; a single call, nothing is kept.

    For a layer that is used again, call `prepare` once and its result each time.
    """
    rows = max(1, x.numel() // max(1, x.shape[-1]))
    row = _choose(spec_of(packed), x.device, x.dtype, rows, backend)
    return prepare(packed, x.dtype, steps=((rows, row),))(x)


def _choose(
    spec: LinearSpec, device: torch.device, dtype: torch.dtype, rows: int, backend: str | None
) -> Backend:
    backend = backend or _forced or os.environ.get(VARIABLE) or None
    _check_name(backend)
    refusals = []
    for row in BACKENDS:
        if backend is not None and row.name != backend:
            continue
        reason = row.supports(spec, device, dtype, rows)
        if reason is None:
            return row
        refusals.append(f"{row.name}: {reason}")
    raise BadRequest(
        f"no backend multiplies {spec.bits} bits by {dtype} on {device} ({'; '.join(refusals)}): "
        "use float16 or float32"
    )


def _check_name(backend: str | None) -> None:
    if backend is not None and backend not in {row.name for row in BACKENDS}:
        raise BadRequest(f"no backend is called {backend!r}; there are {', '.join(r.name for r in BACKENDS)}")
