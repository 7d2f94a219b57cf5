"""Before a kernel is used for a kind of linear on a GPU, it multiplies one small linear of that kind there.

The kernel for many rows multiplies the linear itself, once for each cut and shape, beside a dense copy.

A path that does not compile with this Triton, or whose result is not its slow twin's, is left for the one that is
slower and simpler; a line of the log says so. Costs one compilation of each kernel, which Triton keeps on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from quantmill.formats.gptq import dequantize
from quantmill.kernels.triton.packing import TiledLinear, tile
from quantmill.types import CheckpointFormat, PackedLinear

LOG = logging.getLogger(__name__)
TOLERANCE = 0.01  # of the norm: far above rounding, far below a wrong result
Product = Callable[[Tensor], Tensor]
_faults: dict[tuple[object, ...], str | None] = {}
_unknown: dict[object, str] = {}  # paths whose source this Triton does not take, whatever the cut


def usable(
    path: str, linear: TiledLinear, dtype: torch.dtype, rows: tuple[int, ...], product: Callable[..., Tensor]
) -> bool:
    """Whether `product(x, runnable)` is right for linears of this kind, tried with so many rows of x each.

    Nothing can be tried while a CUDA graph is captured: then what was not tried before counts as right.
    """
    shape, device = linear.shape, linear.words.device
    key = (path, shape.bits, shape.narrow, linear.zeros is None, dtype, device)
    if key not in _faults:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True
        _faults[key] = _fault(sample(shape.bits, 16 if shape.narrow else 64, device), dtype, rows, product)
        if _faults[key] is not None:
            LOG.warning("the GPU's path %r for %d bits is not used: %s", path, shape.bits, _faults[key])
    return _faults[key] is None


def agree(key: tuple[object, ...], sample: Callable[[], Tensor], found: Product, wanted: Product) -> bool:
    """Whether `found(x)` is `wanted(x)` for x = sample(), tried once for a key, whose first part is a path's name.

    While a CUDA graph is captured nothing can be tried: what was not tried before is not used. A path whose source
    this Triton does not take is tried, and named in the log, once.
    """
    if key[0] in _unknown:
        return False
    if key not in _faults:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        _faults[key] = _difference(sample(), found, wanted, key[0])
        if key[0] in _unknown:
            LOG.warning("the GPU's path %r is not used: %s", key[0], _faults[key])
        elif _faults[key] is not None:
            LOG.warning("the GPU's path %r is not used for %s: %s", key[0], key[1:], _faults[key])
    return _faults[key] is None


def _difference(x: Tensor, found: Product, wanted: Product, path: object = None) -> str | None:
    """Why a product is not trusted, or None. `path`: kept where it cannot be compiled with any cut."""
    from triton.compiler.errors import CompilationError
    from triton.errors import TritonError

    try:
        y = found(x)
    except TritonError as error:  # a Triton older or newer than the kernels know
        fault = f"it does not compile with this triton ({type(error).__name__})"
        if isinstance(error, CompilationError) and path is not None:
            _unknown[path] = fault
        return fault
    right = wanted(x).float()
    wrong = float((y.float() - right).norm() / right.norm())
    return None if wrong < TOLERANCE else f"its result is wrong by {wrong:.2g}: report it"


def _fault(
    packed: PackedLinear, dtype: torch.dtype, rows: tuple[int, ...], product: Callable[..., Tensor]
) -> str | None:
    """Why a product is not trusted, or None."""
    from quantmill.kernels.triton.linear import RunnableLinear

    runnable = RunnableLinear.of(tile(packed))
    generator = torch.Generator(packed.qweight.device).manual_seed(0)
    weight = dequantize(packed, torch.float32)
    for m in rows:
        x = torch.randn(m, packed.in_features, device=weight.device, generator=generator).to(dtype)
        fault = _difference(x, lambda x: product(x, runnable), lambda x: x.float() @ weight.T)
        if fault is not None:
            return fault
    return None


def sample(bits: int, group: int, device: torch.device, *, ordered: bool = False) -> PackedLinear:
    """Random words, zero points and scales: 512 inputs in groups, 128 outputs."""
    k, n = 512, 128
    generator = torch.Generator(device).manual_seed(bits)

    def words(*shape: int) -> Tensor:
        return torch.randint(
            -(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device, generator=generator
        )

    g_idx = torch.arange(k, device=device) // group
    if ordered:
        g_idx = g_idx[torch.randperm(k, device=device, generator=generator)]
    return PackedLinear(
        qweight=words(k * bits // 32, n),
        qzeros=words(k // group, n * bits // 32),
        scales=(torch.rand(k // group, n, device=device, generator=generator) * 0.02 - 0.01).half(),
        g_idx=g_idx.int(),
        bias=None,
        bits=bits,
        group_size=group,
        in_features=k,
        out_features=n,
        checkpoint_format=CheckpointFormat.GPTQ_V2,
    )
