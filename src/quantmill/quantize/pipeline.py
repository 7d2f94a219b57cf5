"""The making lane: block by block, every variant on its own quantised upstream, one pass over the model.

    open the source -> embed the tokens -> for each block: for each variant: (collect H, solve, replace) x
    groups -> keep -> ... -> write

Reads a Transformers folder, writes one complete folder per variant. Knows no hub, no runtime, no terminal:
progress leaves as events.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from quantmill.architectures import LinearGroup
from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.errors import BadCheckpoint
from quantmill.formats.gptq import pack, unpack
from quantmill.quantize.folder import build_report, read_finished, write_variant
from quantmill.quantize.hessian import Hessian
from quantmill.quantize.job import BlockFinished, Finished, Job, ModuleSolved, OnEvent, RunStarted, rows_share
from quantmill.quantize.lanes import TappedBlock
from quantmill.quantize.shell import Shell
from quantmill.quantize.solver import dequantize, solve_group
from quantmill.quantize.work import SolvedBlock, WorkFolder
from quantmill.types import IntLinear, Json, ModuleReport, PackedLinear, QuantConfig, Variant

LANE_TOKENS = 4096  # tokens that run through a block at once


@dataclass
class Stream:
    """One variant under way: its hidden states, what it keeps on disk, what it has reported."""

    variant: Variant
    work: WorkFolder
    hidden: list[Tensor]
    reports: list[ModuleReport]
    seconds: float = 0.0


def quantize(job: Job, on_event: OnEvent) -> list[Finished]:
    """Make every variant of the job; one whose folder is complete is left alone when resuming."""
    checkpoint = open_checkpoint(job.source)
    shell = Shell(checkpoint, torch.device(job.device))
    finished = {v.branch: read_finished(job, v, _identity(job, v, checkpoint)) for v in job.variants}
    streams = [_open_stream(job, v, shell) for v in job.variants if finished[v.branch] is None]
    on_event(
        RunStarted(len(shell), len(shell.architecture.modules), tuple(s.variant.branch for s in streams))
    )
    with torch.inference_mode():
        for index in range(len(shell)) if streams else ():
            _quantize_block(shell, index, streams, on_event)
    for stream in streams:
        done = _write(job, checkpoint, stream, len(shell))
        on_event(done)
        finished[done.branch] = done
    return [done for done in finished.values() if done is not None]


def _open_stream(job: Job, variant: Variant, shell: Shell) -> Stream:
    identity = _identity(job, variant, shell.checkpoint)
    work = WorkFolder(job.out, variant.branch, identity, job.resume)
    rows = calibration_rows(job.calibration.blocks, variant.config)
    per_lane = max(1, LANE_TOKENS // rows.shape[1])
    return Stream(variant, work, [shell.embed(ids) for ids in torch.split(rows, per_lane)], [])


def calibration_rows(blocks: Tensor, config: QuantConfig) -> Tensor:
    """The rows of blocks (samples, seqlen) that a variant is calibrated on: all, or an even share."""
    keep = max(1, round(len(blocks) * rows_share(config)))
    return blocks[torch.arange(keep) * len(blocks) // keep]


def _quantize_block(shell: Shell, index: int, streams: Sequence[Stream], on_event: OnEvent) -> None:
    block = shell.load_block(index)
    prefix = f"{shell.architecture.blocks_prefix}.{index}."
    for stream in streams:
        began, kept = time.perf_counter(), stream.work.read(index)
        step = BlockStep(shell, block, prefix, stream, index)
        solved = step.replay(kept) if kept else step.solve(on_event)
        if not kept:
            stream.work.write(index, solved)
        stream.reports.extend(solved.reports)
        stream.seconds += time.perf_counter() - began
        on_event(BlockFinished(stream.variant.branch, index, resumed=kept is not None))
    shell.drop_block(index)


class BlockStep:
    """One block of one variant: either solved now, or sent through with the weights an earlier run kept."""

    def __init__(self, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int) -> None:
        self.stream, self.prefix, self.config = stream, prefix, stream.variant.config
        self.frames = [shell.frames(h, index) for h in stream.hidden]
        self.tapped = TappedBlock(block, shell.architecture.groups, matmul_dtype(shell.device))
        self.tensors: dict[str, Tensor] = {}
        self.reports: list[ModuleReport] = []

    def solve(self, on_event: OnEvent) -> SolvedBlock:
        """Solve every group on what the groups before it hand over: quantised ones, if true-sequential."""
        hessians: dict[str, Hessian] = {}
        with self.tapped as tapped:
            if not self.config.true_sequential:
                tapped.run(self.stream.hidden, self.frames, lambda g, h: hessians.update({g.name: h}))

            def at_group(group: LinearGroup, hessian: Hessian) -> None:
                for report in self._solve_group(group, hessians.get(group.name, hessian)):
                    on_event(ModuleSolved(self.stream.variant.branch, report))

            self.stream.hidden = tapped.run(self.stream.hidden, self.frames, at_group)
        return SolvedBlock(self.tensors, tuple(self.reports))

    def _solve_group(self, group: LinearGroup, hessian: Hessian) -> list[ModuleReport]:
        began = time.perf_counter()
        weights = [self.tapped.weight(m) for m in group.modules]
        try:
            solutions = solve_group(weights, hessian.mean(), self.config)
        except BadCheckpoint as e:
            raise BadCheckpoint(f"{self.prefix}{group.modules[0]}: {e}") from e
        for module, solution in zip(group.modules, solutions, strict=True):
            tap = self.tapped.taps[module]
            bias = None if tap.original.bias is None else tap.original.bias.half().cpu()
            packed = pack(_to_cpu(solution.linear), self.config, bias)
            self.tensors |= packed_tensors(self.prefix + module, packed)
            tap.use(dequantize(solution.linear))
        seconds = (time.perf_counter() - began) / len(solutions)
        new = [
            ModuleReport(self.prefix + m, s.loss, s.damp_percent, hessian.tokens, seconds, s.fallback)
            for m, s in zip(group.modules, solutions, strict=True)
        ]
        self.reports.extend(new)
        return new

    def replay(self, kept: SolvedBlock) -> SolvedBlock:
        """Send the hidden states through the packed weights of a finished block."""

        def at_group(group: LinearGroup, _: Hessian) -> None:
            for module in group.modules:
                linear = unpack(self._packed(kept, module))
                self.tapped.taps[module].use(dequantize(linear).to(self.stream.hidden[0].device))

        with self.tapped as tapped:
            self.stream.hidden = tapped.run(self.stream.hidden, self.frames, at_group)
        return kept

    def _packed(self, kept: SolvedBlock, module: str) -> PackedLinear:
        n, k = self.tapped.weight(module).shape
        part = {
            s: kept.tensors[f"{self.prefix}{module}.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx")
        }
        return PackedLinear(
            **part,
            bias=None,
            bits=self.config.bits,
            group_size=self.config.group_size,
            in_features=k,
            out_features=n,
            checkpoint_format=self.config.zero_format,
        )


def packed_tensors(name: str, packed: PackedLinear) -> dict[str, Tensor]:
    """A packed linear's tensors under their names in the file."""
    tensors = {s: getattr(packed, s) for s in ("qweight", "qzeros", "scales", "g_idx", "bias")}
    return {f"{name}.{suffix}": t for suffix, t in tensors.items() if t is not None}


def matmul_dtype(device: torch.device) -> torch.dtype:
    """What calibration multiplies in: bfloat16 where the machine has it, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16
    from llvmlite.binding import get_host_cpu_features

    return torch.bfloat16 if get_host_cpu_features().get("avx512bf16") else torch.float32


def _to_cpu(linear: IntLinear) -> IntLinear:
    return IntLinear(linear.codes.cpu(), linear.scales.cpu(), linear.zeros.cpu(), linear.g_idx.cpu())


def _identity(job: Job, variant: Variant, checkpoint: Checkpoint) -> Json:
    """Everything that decides a variant's bytes."""
    return {
        "source": source_fingerprint(checkpoint),
        "calibration": job.calibration.fingerprint,
        "config": dataclasses.asdict(variant.config),
        "preset": job.preset,
        "device": job.device,
    }


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over config, tensor names, shapes and the last megabyte of every weight file: quick, yet distinct."""
    digest = hashlib.sha256(repr(sorted(checkpoint.config.items(), key=str)).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name}{info.dtype}{info.shape}".encode())
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        with open(file, "rb") as f:
            size = f.seek(0, 2)
            f.seek(max(0, size - (1 << 20)))
            digest.update(f.read())
    return digest.hexdigest()


def _write(job: Job, checkpoint: Checkpoint, stream: Stream, blocks: int) -> Finished:
    def solved() -> Iterator[tuple[str, Tensor]]:
        for index in range(blocks):
            block = stream.work.read(index)
            assert block is not None, "a block was lost between solving and writing"
            yield from block.tensors.items()

    report = build_report(
        job,
        stream.variant,
        stream.reports,
        rows=sum(len(h) for h in stream.hidden),
        identity=_identity(job, stream.variant, checkpoint),
        seconds=stream.seconds,
        peak_ram_bytes=peak_ram_bytes(),
    )
    done = write_variant(job, stream.variant, checkpoint, solved(), report)
    stream.work.remove()
    return done


def peak_ram_bytes() -> int:
    """The most memory this process has held, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
