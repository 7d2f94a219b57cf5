"""A GPU's kernels tried beside their torch twins, once per process, before a result depends on them.

A kernel that fails to compile or gives something else is not used, and a warning says so. Large enough for
many programs at once: what goes wrong then (a race, say) does not show in a handful of rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from quantmill.quantize.columns import round_columns_torch
from quantmill.quantize.descent import descend_block_torch
from quantmill.quantize.grids import SYM, fit_groups_torch, shrink_factors

log = logging.getLogger(__name__)

ROWS, COLUMNS = 4096, 128
Block = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def columns_agree(kernel: Block, device: str = "cuda", rows: int = ROWS) -> bool:
    """Whether the column loop rounds as `round_columns_torch` does."""
    w, carried, scale, zero = _block(device, rows)
    lower = _randn(COLUMNS, COLUMNS, device=device).tril(-1) * 0.1 + torch.eye(COLUMNS, device=device)
    feedback = lower.T  # as it comes: torch's Cholesky factors lie by columns
    return _same_blocks("columns", kernel, round_columns_torch, (w, carried, feedback, scale, zero, 15))


def descent_agrees(kernel: Block, device: str = "cuda", rows: int = ROWS) -> bool:
    """Whether coordinate descent moves as `descend_block_torch` does."""
    w, gradient, scale, zero = _block(device, rows)
    x = _randn(3 * COLUMNS, COLUMNS, device=device)
    H = x.T @ x / len(x)
    return _same_blocks("descent", kernel, descend_block_torch, (w, gradient, H, scale, zero, 15))


def grids_agree(
    kernel: Callable[..., tuple[Tensor, Tensor]], device: str = "cuda", rows: int = ROWS // 8
) -> bool:
    """Whether the grid search finds what `fit_groups_torch` finds."""
    w, c = _randn(rows, 256, device=device), _randn(256, device=device).square() + 1e-3
    arguments = (w, c, 64, 15, SYM, shrink_factors(4))

    def try_it() -> bool:
        found, expected = kernel(*arguments), fit_groups_torch(*arguments)
        return bool((found[0] == expected[0]).float().mean() > 0.98)

    return _tried("grids", try_it)


def products_agree(width: int, device: str = "cuda", rows: int = ROWS) -> bool:
    """Whether the products of groups of `width` columns are what they should be: to float32, three times over."""
    from quantmill.quantize.refit_triton import WIDEST, group_products, split

    if width > WIDEST:
        return False
    x = _randn(512, 4 * width, device=device)
    H = x.T @ x / len(x)
    q = _randn(rows, 4 * width, device=device).mul(4).round().clamp(-15, 15)
    spread = q.double().view(rows, 4, width)
    wide = H.double().view(4, width, 4, width)
    expected = torch.einsum("nia,iajb,njb->nij", spread, wide, spread)

    def try_it() -> bool:
        found = [group_products(split(H), q.bfloat16(), width) for _ in range(3)]
        return all(float((f - expected).norm() / expected.norm()) < 1e-5 for f in found)

    return _tried(f"group products of {width}", try_it)


def _same_blocks(
    name: str, kernel: Block, twin: Block, arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]
) -> bool:
    def try_it() -> bool:
        (codes, values), (own_codes, own_values) = twin(*arguments), kernel(*arguments)
        rows = (codes == own_codes).all(1)  # a tie rounded the other way changes what follows it in that row
        close = torch.allclose(values[rows], own_values[rows], atol=1e-4)
        return bool(rows.float().mean() > 0.95) and close

    return _tried(name, try_it)


def _tried(name: str, try_it: Callable[[], bool]) -> bool:
    """Whether a trial passes; one that raises has failed. The kernel is then replaced by its twin."""
    from triton.errors import TritonError

    try:
        fine, why = try_it(), "gives other results here than its torch twin"
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError, ValueError, TypeError) as e:  # what compilers and launchers raise
        fine, why = False, f"does not run here ({type(e).__name__}: {str(e)[:120]})"
    if not fine:
        log.warning("the kernel for %s %s: the slow twin serves instead", name, why)
    return fine


def _block(device: str, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, something to add, scales and zeros of a block, with contiguous columns."""
    w, more, size = (_randn(COLUMNS, rows, device=device, seed=i).T for i in range(3))
    scale = size.abs() + 0.2
    return w, 0.1 * more, scale, torch.full_like(scale, 8.0)


def _randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, device=device)
