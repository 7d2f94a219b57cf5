"""One block of a GGUF variant: every linear solved on its own type's grid, from one calibration.

    lanes -> Hessian -> factor once per group -> each linear on its type -> the lanes go on with what is stored

The types come from the mix (gguf_mix.py), so linears of one group may differ. What is kept is a block's raw
bytes, as the file will hold them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.formats import gguf
from quantmill.quantize.block_step import BlockStep
from quantmill.quantize.gguf_mix import tensor_types
from quantmill.quantize.gguf_solve import BlockLinear, solve_blocks
from quantmill.quantize.hessian import Hessian
from quantmill.quantize.shell import Shell
from quantmill.quantize.solver import factorise, refuse_non_finite, relative_loss
from quantmill.quantize.work import SolvedBlock
from quantmill.types import ModuleReport

if TYPE_CHECKING:
    from quantmill.quantize.pipeline import Stream

BLOCKS = "blocks"  # suffix of the raw bytes (N, row bytes) uint8


class GgufStep(BlockStep):
    """Solves a block for a GGUF mix. The variant's container names it: "gguf:Q4_K_M"."""

    def __init__(self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int) -> None:
        super().__init__(shell, block, prefix, stream, index)
        self.types = tensor_types(shell.checkpoint.config, stream.variant.container.partition(":")[2])

    def _solve_group(self, group: LinearGroup, hessian: Hessian) -> list[ModuleReport]:
        began, tokens = time.perf_counter(), hessian.tokens
        H = hessian.mean()
        weights = [self.tapped.weight(m) for m in group.modules]
        refuse_non_finite(torch.cat(weights), H)
        factor, fallback = factorise(H, self.config)
        losses = []
        for module, W in zip(group.modules, weights, strict=True):
            linear = solve_blocks(W, factor, self.types[self.prefix + module])
            stored = linear.weight
            losses.append(relative_loss(W, stored, H))
            tap = self.tapped.taps[module]
            self.tensors[f"{self.prefix}{module}.{BLOCKS}"] = to_bytes(linear)
            if tap.original.bias is not None:
                self.tensors[f"{self.prefix}{module}.bias"] = tap.original.bias.float().cpu()
            tap.use(stored)
        seconds = (time.perf_counter() - began) / len(weights)
        new = [
            ModuleReport(self.prefix + m, loss, factor.damp_percent, tokens, seconds, fallback)
            for m, loss in zip(group.modules, losses, strict=True)
        ]
        self.reports.extend(new)
        return new

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        hidden, device = self.stream.hidden, self.stream.hidden.device
        with self.tapped as tapped:
            for module, tap in tapped.taps.items():
                raw = kept.tensors[f"{self.prefix}{module}.{BLOCKS}"].numpy()
                tap.use(torch.from_numpy(gguf.dequantize(self.types[self.prefix + module], raw)).to(device))
            tapped.forward(hidden, self.frames, hidden.__setitem__)
        return kept


def to_bytes(linear: BlockLinear) -> Tensor:
    """The rows of a file, (N, row bytes) uint8, on the CPU."""
    grid, rows = linear.grid, len(linear.codes)

    def flat(tensor: Tensor, dtype: type) -> np.ndarray:
        return tensor.cpu().numpy().astype(dtype).reshape(-1)

    per_block = grid.kind.block // grid.kind.group
    blocks = gguf.Blocks(
        codes=linear.codes.cpu().numpy().reshape(-1, grid.kind.block),
        d=flat(grid.d, np.float16),
        m=None if grid.m is None else flat(grid.m, np.float16),
        scales=None if grid.scales is None else flat(grid.scales, np.int8).reshape(-1, per_block),
        mins=None if grid.mins is None else flat(grid.mins, np.int8).reshape(-1, per_block),
    )
    return torch.from_numpy(gguf.pack(grid.kind, blocks).reshape(rows, -1))
