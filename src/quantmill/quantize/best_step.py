"""Preset best in the pipeline: `pipeline.BlockStep`'s face over `best`, block tuning, distillation; all resumable.

What it keeps in the work folder is what is written: packed linears, norms that training changed in float16,
and, as one block more than the model has, what distillation changed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from quantmill.architectures import LinearGroup, dimensions
from quantmill.checkpoint import Checkpoint
from quantmill.quantize.best import held_lanes, replay_block, solve_block
from quantmill.quantize.block_tuning import tune_block
from quantmill.quantize.distill import affordable, distill
from quantmill.quantize.job import Job, ModuleSolved, OnEvent
from quantmill.quantize.kept import packed_tensors, unpacked
from quantmill.quantize.paired_step import Pairs, products_dtype
from quantmill.quantize.presets import DISTILL, OWN_TEXT, TUNE, Recipe, lowest_bits
from quantmill.quantize.self_text import go_on
from quantmill.quantize.two_streams import Pair
from quantmill.quantize.work import SolvedBlock
from quantmill.types import IntLinear, QuantConfig, Variant

if TYPE_CHECKING:
    from quantmill.quantize.pipeline import Stream

HELD_ROWS = 0.1  # of the rows judge distillation
LANES = 10  # at least so many pairs where the rows allow: a tenth of them can be held out


def lane_rows(rows: int, at_most: int) -> int:
    """Rows of tokens per lane."""
    return max(1, min(at_most, rows // LANES))


class BestStep:
    """One block of one variant under preset best."""

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[LinearGroup],
        prefix: str,
        stream: Stream,
        frames: Sequence[Mapping[str, Any]],
        recipe: Recipe,
        *,
        tune: bool,
    ) -> None:
        self.block, self.groups, self.prefix, self.stream = block, groups, prefix, stream
        self.frames, self.recipe, self.tune = frames, recipe, tune
        self.config = stream.variant.config
        assert stream.original is not None, "this recipe compares two streams"
        self.original = stream.original
        self.matmul_dtype = products_dtype(stream.hidden.device)
        self.pairs = Pairs(stream.hidden, self.original)

    def solve(self, on_event: OnEvent) -> SolvedBlock:
        """Solve every group, tune the block if asked to, send both streams on."""
        branch = self.stream.variant.branch
        solved = solve_block(
            self.block,
            self.groups,
            self.pairs,
            self.frames,
            self._config_of,
            self.recipe,
            lambda report: on_event(ModuleSolved(branch, report)),
            self.prefix,
            self.matmul_dtype,
            keep=None if self.tune else self.pairs.keep,  # tuning needs what came in, too
            waiting=self.stream.residence.waiting,
            ranks=self.stream.ranks,
        )
        linears, norms, reports, after = solved.linears, {}, solved.reports, solved.pairs
        if self.tune:
            held = held_lanes(len(self.pairs), self.recipe.heldout)
            inputs, wanted = [p.quantised for p in self.pairs], [p.original for p in after]
            tuned = tune_block(
                self.block,
                linears,
                inputs,
                wanted,
                self.frames,
                held,
                TUNE[lowest_bits(self.stream.variant)],
                {m: self._config_of(m).max_code for m in linears},
            )
            linears, norms = tuned.linears, tuned.norms
            gain = f"block tuned {tuned.tuned.before:.3g} -> {tuned.tuned.after:.3g}"
            reports = tuple(replace(r, choice=f"{r.choice}, {gain}") for r in reports)
            self._go_on(self._send(linears, norms, wanted))
        return SolvedBlock(self._tensors(linears, norms), reports)

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        """Send both streams through a finished block: the original's norms for one, the kept ones for the other."""
        modules = [m for group in self.groups for m in group.modules]
        device = self.stream.hidden.device
        linears = {m: unpacked(kept.tensors, self.prefix + m, self._config_of(m), device) for m in modules}
        norms = {
            name.removeprefix(self.prefix).removesuffix(".weight"): tensor
            for name, tensor in kept.tensors.items()
            if name.endswith(".weight")
        }
        keep = None if norms else self.pairs.keep
        after = replay_block(
            self.block, self.groups, self.pairs, self.frames, linears, self.matmul_dtype, keep=keep
        )
        if norms:
            self._go_on(self._send(linears, norms, [p.original for p in after]))
        return kept

    def _send(
        self, linears: Mapping[str, IntLinear], norms: Mapping[str, Tensor], originals: Sequence[Tensor]
    ) -> list[Pair]:
        """The quantised stream through tuned scales and norms; the original's outputs are known."""
        before = {name: self.block.get_parameter(f"{name}.weight").detach() for name in norms}
        for name, weight in norms.items():
            _set_weight(self.block, name, weight.float().to(before[name].device))
        after = replay_block(self.block, self.groups, self.pairs, self.frames, linears, self.matmul_dtype)
        for name, weight in before.items():
            _set_weight(self.block, name, weight)
        return [Pair(a.quantised, o) for a, o in zip(after, originals, strict=True)]

    def _config_of(self, module: str) -> QuantConfig:
        return self.stream.variant.config_of(self.prefix + module)

    def _go_on(self, after: Sequence[Pair]) -> None:
        for i, pair in enumerate(after):
            self.pairs.keep(i, pair)

    def _tensors(self, linears: Mapping[str, IntLinear], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {f"{self.prefix}{name}.weight": w.half().cpu() for name, w in norms.items()}
        for module, linear in linears.items():
            bias = dict(self.block.named_parameters()).get(f"{module}.bias")
            tensors |= packed_tensors(self.prefix + module, linear, self._config_of(module), bias)
        return tensors


def _set_weight(block: nn.Module, name: str, weight: Tensor) -> None:
    block.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


def finish(job: Job, checkpoint: Checkpoint, stream: Stream, blocks: int) -> None:
    """Distil a variant whose blocks are all solved, if asked to; what an earlier run distilled is kept."""
    if not job.distill or stream.original is None:
        return
    kept = stream.work.read(blocks)
    if kept is None:
        kept = _distil(job, checkpoint, stream, blocks)
        stream.work.write(blocks, kept)
    stream.reports[:] = kept.reports


def _distil(job: Job, checkpoint: Checkpoint, stream: Stream, blocks: int) -> SolvedBlock:
    """Scales, norms and codes that distillation changed, and all reports with what it brought."""
    solved = [block for i in range(blocks) if (block := stream.work.read(i)) is not None]
    tensors = {name: t for block in solved for name, t in block.tensors.items()}
    original, rows = _whole_model(checkpoint, torch.device(job.device)), job.calibration.blocks
    student = copy.deepcopy(original, memo={id(p): p for p in original.parameters()})
    linears = _linears(tensors, stream.variant, torch.device(job.device))
    for name in [n for n in tensors if n.endswith(".weight")]:
        _set_weight(student, name.removesuffix(".weight"), tensors[name].float().to(job.device))
    held = max(1, round(HELD_ROWS * len(rows)))
    if copies := OWN_TEXT[lowest_bits(stream.variant)]:
        at_once = max(1, _free_bytes(job) // 4 // _writing_bytes(checkpoint, rows.shape[1]))
        own = go_on(original, rows[:-held], copies, seed=job.calibration.seed, at_once=min(512, at_once))
        rows = torch.cat([own, rows])
    configs = {name: stream.variant.config_of(name) for name in linears}
    codes = {name: c.max_code for name, c in configs.items()}
    count = sum(q.codes.numel() for q in linears.values())
    schedules, remark = affordable(DISTILL[lowest_bits(stream.variant)], count, _free_bytes(job))
    done = distill(student, original, linears, rows, held, schedules, codes)
    changed = {
        key: tensor
        for name, q in done.linears.items()
        for key, tensor in packed_tensors(name, q, configs[name], None).items()
        if key.endswith((".qweight", ".scales"))
    }
    changed |= {f"{name}.weight": w.half().cpu() for name, w in done.norms.items()}
    gain = f"distilled {done.tuned.before:.4g} -> {done.tuned.after:.4g}{remark}"
    return SolvedBlock(changed, tuple(replace(r, choice=f"{r.choice}, {gain}") for r in stream.reports))


def _writing_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Bytes of one row while the model writes: keys and values in float32, a row of logits four times."""
    d = dimensions(checkpoint.config)
    return 4 * (2 * d.layers * d.kv_heads * d.head_dim * tokens + 4 * d.vocab)


def _free_bytes(job: Job) -> int:
    """Memory that training may still take on the device."""
    if not job.device.startswith("cuda"):
        free = int(psutil.virtual_memory().available)
        return free if job.max_ram is None else min(free, job.max_ram)
    free = int(torch.cuda.mem_get_info()[0])
    return free if job.max_vram is None else min(free, job.max_vram - torch.cuda.memory_allocated())


def _linears(tensors: Mapping[str, Tensor], variant: Variant, device: torch.device) -> dict[str, IntLinear]:
    """Every packed linear, by full name."""
    names = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    return {n: unpacked(tensors, n, variant.config_of(n), device) for n in names}


def _whole_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained  # untyped in Transformers
    model: nn.Module = load(checkpoint.folder, dtype=torch.float32, attn_implementation="sdpa").to(device)
    return model.eval().requires_grad_(False)
