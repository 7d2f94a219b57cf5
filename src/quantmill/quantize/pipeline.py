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
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.errors import BadRequest
from quantmill.quantize.best_step import BestStep, finish, lane_rows
from quantmill.quantize.block_step import BlockStep
from quantmill.quantize.containers import compares_streams, container_of, refuse_untrained
from quantmill.quantize.folder import build_report, read_finished
from quantmill.quantize.job import BlockFinished, Finished, Job, OnEvent, RunStarted, rows_share
from quantmill.quantize.memory import GPU_BASE, Residence, choose, lane_tokens, load_of
from quantmill.quantize.presets import recipe_of
from quantmill.quantize.ranks import Ranks, join, leave
from quantmill.quantize.shell import Shell
from quantmill.quantize.states import States
from quantmill.quantize.work import SolvedBlock, WorkFolder
from quantmill.types import Json, ModuleReport, QuantConfig, Variant


@dataclass
class Stream:
    """One variant under way: its hidden states, what it keeps on disk, what it has reported."""

    variant: Variant
    work: WorkFolder
    hidden: States
    residence: Residence
    reports: list[ModuleReport]
    seconds: float = 0.0
    ranks: Ranks = field(default_factory=Ranks)
    kept: int = 0  # blocks that an earlier run finished
    rows: int = 0  # of tokens, on all ranks
    unsaved: tuple[int, Future[None]] | None = None  # the block that is being written
    original: States | None = None  # the original's, where a recipe compares both


def quantize(job: Job, on_event: OnEvent) -> list[Finished]:
    """Make every variant of the job; one whose folder is complete is left alone when resuming.

    Started by torchrun, all ranks make them together; events come to rank 0 alone. Raises UserErrors.
    """
    if job.tune_blocks or job.distill:
        refuse_untrained(job.variants)
    ranks = join(job.device)
    tell = on_event if ranks.first else lambda _: None
    checkpoint = open_checkpoint(job.source)
    shell = Shell(checkpoint, torch.device(job.device))
    finished = {v.branch: read_finished(job, v, _identity(job, v, checkpoint)) for v in job.variants}
    to_do = [v for v in job.variants if finished[v.branch] is None]
    _refuse_unspread(job, to_do, ranks)
    residence = _residence(job, to_do or job.variants, checkpoint)
    with _memory_named(job):
        streams = [_open_stream(job, v, shell, residence, ranks) for v in to_do]
    tell(RunStarted(len(shell), len(shell.architecture.modules), tuple(s.variant.branch for s in streams)))
    for done in filter(None, finished.values()):  # by an earlier run
        tell(done)
    # block tuning turns gradients on for itself
    with _memory_named(job), torch.no_grad(), ThreadPoolExecutor(1) as writer:
        for index in range(len(shell)) if streams else ():
            _quantize_block(job, shell, index, streams, writer, tell)
        for stream in streams:
            _settle(stream, tell)
            for states in filter(None, (stream.hidden, stream.original)):
                states.release()
    for stream in streams if ranks.first else ():
        finish(job, checkpoint, stream, len(shell))
        done = _write(job, checkpoint, stream, len(shell))
        tell(done)
        finished[done.branch] = done
    made: list[Finished] = ranks.agreed([done for done in finished.values() if done is not None])
    leave(ranks)
    return made


OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED")  # what torch, CUDA, cuBLAS and cuSOLVER say


@contextmanager
def _memory_named(job: Job) -> Iterator[None]:
    """What torch raises when a GPU's memory runs out, as an error with a cure; the libraries beside it, too."""
    try:
        yield
    except RuntimeError as e:
        if not any(words in str(e) for words in OUT_OF_MEMORY):
            raise
        limit = "what is free" if job.max_vram is None else f"--max-vram {job.max_vram / 1e9:.1f}GB"
        raise BadRequest(
            f"the GPU's memory ran out within {limit} ({str(e).splitlines()[0][:100]}): finished blocks are "
            "kept, go on with --resume and a smaller --max-vram, which plans for less at a time"
        ) from e


def _refuse_unspread(job: Job, variants: Sequence[Variant], ranks: Ranks) -> None:
    """What several ranks cannot do together, or were not given alike."""
    if ranks.size == 1:
        return
    ranks.refuse_unless_alike(
        f"{job.calibration.fingerprint} {job.preset} {job.variants}", "tokens or settings"
    )
    if job.tune_blocks or job.distill:
        raise BadRequest("--tune-blocks and --distill train in one process: leave torchrun or them out")
    for v in variants:
        rows = len(calibration_rows(job.calibration.blocks, v.config))
        if compares_streams(v, job.preset) and rows < ranks.size:
            raise BadRequest(
                f"{v.branch}: {ranks.size} processes have {rows} rows of tokens: raise --samples, or start fewer"
            )


def _residence(job: Job, variants: Sequence[Variant], checkpoint: Checkpoint) -> Residence:
    """Within the limits asked for; without any, within what the GPU has free (and is then held to)."""
    device, vram = torch.device(job.device), job.max_vram
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        vram = min(free, vram or free)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, vram - GPU_BASE / 2) / total))
        _grow_in_place()
    samples, seqlen = job.calibration.blocks.shape
    paired = [compares_streams(v, job.preset) for v in variants]
    load = load_of(checkpoint.config, variants, samples, seqlen, device.type, paired)
    return choose(load, device.type, vram=vram, ram=job.max_ram)


def _grow_in_place() -> None:
    """Let torch's segments grow: what it holds of a GPU's memory is then what tensors take, not a fifth more."""
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (setter or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def _open_stream(job: Job, variant: Variant, shell: Shell, residence: Residence, ranks: Ranks) -> Stream:
    identity = _identity(job, variant, shell.checkpoint)
    if ranks.first:
        work = WorkFolder(job.out, variant.branch, identity, job.resume)
    kept = ranks.agreed(work.finished() if ranks.first else 0)
    if not ranks.first:
        work = WorkFolder(job.out, variant.branch, identity, resume=True)
    rows = calibration_rows(job.calibration.blocks, variant.config)
    per_lane = lane_tokens(shell.device.type, rows.shape[1]) // rows.shape[1]
    two = compares_streams(variant, job.preset)
    per_lane = (
        lane_rows(len(rows) // ranks.size, per_lane) if two else min(per_lane, -(-len(rows) // ranks.size))
    )
    lanes = ranks.mine(torch.split(rows, per_lane))

    def states(on_host: bool) -> States:
        return States((shell.embed(ids) for ids in lanes), shell.device, on_host=on_host)

    original = states(residence.originals_on_host) if two else None
    hidden = states(residence.on_host)
    return Stream(
        variant, work, hidden, residence, [], ranks=ranks, kept=kept, rows=len(rows), original=original
    )


def calibration_rows(blocks: Tensor, config: QuantConfig) -> Tensor:
    """The rows of blocks (samples, seqlen) that a variant is calibrated on: all, or an even share."""
    keep = max(1, round(len(blocks) * rows_share(config)))
    return blocks[torch.arange(keep) * len(blocks) // keep]


def _quantize_block(
    job: Job, shell: Shell, index: int, streams: Sequence[Stream], writer: Executor, on_event: OnEvent
) -> None:
    block = shell.load_block(index)
    prefix = f"{shell.architecture.blocks_prefix}.{index}."
    for stream in streams:
        began = time.perf_counter()
        kept = stream.work.read(index) if index < stream.kept else None
        step = _step(job, shell, block, prefix, stream, index)
        solved = step.replay(kept) if kept else step.solve(on_event)
        stream.reports.extend(solved.reports)
        if kept:
            on_event(BlockFinished(stream.variant.branch, index, resumed=True))
        elif stream.ranks.first:
            _settle(stream, on_event)
            stream.unsaved = (index, writer.submit(stream.work.write, index, solved))
            if shell.device.type == "cpu":  # nothing to overlap with
                _settle(stream, on_event)
        stream.seconds += time.perf_counter() - began
    shell.drop_block(index)


def _settle(stream: Stream, on_event: OnEvent) -> None:
    """Wait until the stream's last solved block is on disk, and say so."""
    if stream.unsaved is not None:
        index, written = stream.unsaved
        stream.unsaved = None
        written.result()
        on_event(BlockFinished(stream.variant.branch, index, resumed=False))


def _step(job: Job, shell: Shell, block: nn.Module, prefix: str, stream: Stream, index: int) -> Step:
    """What solves a block of this variant: its container's step, else by the recipe of its preset."""
    row, recipe = container_of(stream.variant), recipe_of(job.preset, stream.variant)
    if row.best is not None and stream.original is not None:
        return row.best(shell, block, prefix, stream, index, recipe)
    if row.step is not None:
        return row.step(shell, block, prefix, stream, index)
    if not recipe.two_streams:
        return BlockStep(shell, block, prefix, stream, index)
    frames = [shell.frames_for(shape, index) for shape in stream.hidden.shapes]
    tune = job.tune_blocks
    return BestStep(block, shell.architecture.groups, prefix, stream, frames, recipe, tune=tune)


class Step(Protocol):
    """One block of one variant: either solved now, or sent through with the weights an earlier run kept."""

    def solve(self, on_event: OnEvent) -> SolvedBlock: ...
    def replay(self, kept: SolvedBlock) -> SolvedBlock: ...


def _identity(job: Job, variant: Variant, checkpoint: Checkpoint) -> Json:
    """Everything that decides a variant's bytes."""
    return {
        "source": source_fingerprint(checkpoint),
        "calibration": job.calibration.fingerprint,
        "config": dataclasses.asdict(variant.config),
        "preset": job.preset,
        "device": job.device,
        **({"container": variant.container} if variant.container != "gptq" else {}),
        **({"dynamic": [[m, dataclasses.asdict(c)] for m, c in variant.dynamic]} if variant.dynamic else {}),
        **({"tune_blocks": True} if job.tune_blocks else {}),
        **({"distill": True} if job.distill else {}),
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
        last = stream.work.read(blocks)  # what distillation changed, if there was one
        changed = {} if last is None else last.tensors
        for index in range(blocks):
            block = stream.work.read(index)
            assert block is not None, "a block was lost between solving and writing"
            yield from ((n, t) for n, t in block.tensors.items() if n not in changed)
        yield from changed.items()

    report = build_report(
        job,
        stream.variant,
        stream.reports,
        rows=stream.rows,
        identity=_identity(job, stream.variant, checkpoint),
        seconds=stream.seconds,
        peak_ram_bytes=peak_ram_bytes(),
    )
    done = container_of(stream.variant).write(job, stream.variant, checkpoint, solved(), report)
    stream.work.remove()
    return done


def peak_ram_bytes() -> int:
    """The most memory this process has held, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_vram_bytes(device: str) -> tuple[int, int] | None:
    """The most that tensors took of a GPU's memory, and that torch held for them, in bytes; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
