"""`quantmill quantize`: source and data set -> plan -> pipeline -> folders, with progress."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from quantmill.architectures import module_names
from quantmill.commands.choosing import Target, choose_bits
from quantmill.commands.eventlog import also_to
from quantmill.commands.family import describe_family, fitting
from quantmill.commands.machine import memory_limit, pick_device, set_threads
from quantmill.console import Advance, Console, gigabytes, progress, seconds
from quantmill.errors import BadRequest
from quantmill.files import read_json
from quantmill.plots import loss_by_layer
from quantmill.quantize import calibration
from quantmill.quantize.containers import planned_bytes
from quantmill.quantize.job import BlockFinished, Event, Finished, Job, ModuleSolved
from quantmill.quantize.pipeline import peak_ram_bytes, peak_vram_bytes, quantize
from quantmill.quantize.presets import refuse_unknown
from quantmill.runtime.load import load_model, load_tokenizer
from quantmill.sources import resolve
from quantmill.types import CalibrationSet, Json, Variant

PICTURE = "loss_by_layer.png"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for."""

    source: str
    out: Path
    variants: tuple[Variant, ...]
    dataset: str
    seqlen: int
    samples: int
    seed: int
    preset: str
    resume: bool
    device: str
    threads: int | None
    command: str
    tune_blocks: bool = False
    distill: bool = False
    target: Target | None = None  # a limit on size or loss under which bits are chosen per part
    max_vram: str | None = None  # GPU memory that may be taken, such as 16GB
    max_ram: str | None = None  # host memory, likewise
    events: Path | None = None  # a file that gets a line of JSON for every event
    family: bool = False  # several repositories, each with its cards


@dataclass(frozen=True, slots=True)
class Made:
    """What came out."""

    variants: tuple[Finished, ...]
    seconds: float
    peak_ram_bytes: int
    peak_vram_bytes: tuple[int, int] | None = (
        None  # on a GPU: what tensors took, and what torch held for them
    )

    def to_json(self) -> Json:
        """The document that `--json` prints."""
        variants = [
            {
                "branch": f.branch,
                "folder": str(f.folder),
                "size_bytes": f.size_bytes,
                "modules": len(f.modules),
                "fallbacks": list(f.fallbacks),
            }
            for f in self.variants
        ]
        tensors, held = self.peak_vram_bytes or (None, None)
        return {
            "variants": variants,
            "seconds": round(self.seconds, 2),
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_vram_bytes": held,
            "peak_vram_tensors_bytes": tensors,
        }


def make(request: Request, console: Console) -> Made:
    """Quantise every variant of the request. Raises what the stages raise: a UserError says what to mend."""
    began = time.perf_counter()
    refuse_unknown(request.preset, request.tune_blocks or request.distill)
    set_threads(request.threads)
    device = pick_device(request.device)
    folder = resolve(request.source, notify=console.note)
    config = read_json(folder / "config.json")
    _refuse_quantised(request.source, config)
    if request.family:
        request = dataclasses.replace(request, variants=fitting(request.variants, config, console))
    if not request.target:
        _refuse_without_room(request, config, console)
    data = calibrate(request, folder, config, console)
    job = Job(
        source=folder,
        source_name=request.source,
        out=request.out,
        variants=request.variants,
        calibration=data,
        preset=request.preset,
        tune_blocks=request.tune_blocks,
        distill=request.distill,
        device=device,
        resume=request.resume,
        command=request.command,
        max_vram=memory_limit(request.max_vram, "--max-vram"),
        max_ram=memory_limit(request.max_ram, "--max-ram"),
    )
    if request.target is not None:
        job = _with_chosen_bits(job, request.target, console)
    total = len(module_names(config)) * len(job.variants)
    with nullcontext(_silent) if console.mute else progress("solving", total) as advance:
        follower = _Follower(advance, total // len(job.variants))
        with also_to(None if console.mute else request.events, follower) as follow:
            finished = quantize(job, follow)
    taken = time.perf_counter() - began
    made = Made(tuple(finished), taken, peak_ram_bytes(), peak_vram_bytes(device))
    if request.family and not console.mute:
        describe_family(request.out, None)
    if not console.mute:
        losses = {f.branch: [(m.name, m.loss) for m in f.modules] for f in finished}
        loss_by_layer(losses, request.out / PICTURE)
    summarise(made, request.source, console)
    return made


def _silent(steps: int, remark: str) -> None:
    """The progress of a process that does not speak."""


def _with_chosen_bits(job: Job, target: Target, console: Console) -> Job:
    if len(job.variants) != 1:
        raise BadRequest("a target chooses the bits of one variant: leave --grid and further --variant out")
    mix = choose_bits(job, job.variants[0].config, target, console)
    modules = ", ".join(f"{count} modules with {bits} bits" for bits, count in mix.bits.items())
    console.note(f"{mix.variant.branch}: {modules}; predicted KL {mix.predicted_kl:.4g} nats per token")
    return dataclasses.replace(job, variants=(mix.variant,))


def calibrate(request: Request, folder: Path, config: Json, console: Console) -> CalibrationSet:
    """The token blocks; says so when there are fewer than asked for."""
    positions = config.get("max_position_embeddings")
    seqlen = min(request.seqlen, positions) if isinstance(positions, int) else request.seqlen
    if seqlen < request.seqlen:
        console.note(f"the model takes {positions} tokens: blocks are cut to that length")
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
    model = load_model(folder, device=request.device) if request.dataset == "self" else None
    data = calibration.build(
        request.dataset, tokenizer, seqlen=seqlen, samples=request.samples, seed=request.seed, model=model
    )
    del model  # thousands of tokens have been written; the pipeline loads block by block
    drawn = f"{len(data.blocks)} blocks of {seqlen} tokens from {data.name} ({data.documents} documents"
    dropped = f", {data.dropped} not usable)" if data.dropped else ")"
    few = f"; {request.samples} were asked for" if len(data.blocks) < request.samples else ""
    console.note(f"calibrating on {drawn}{dropped}{few}")
    return data


def _refuse_without_room(request: Request, config: Json, console: Console) -> None:
    """Say how large the variants will be, and stop now where the disk cannot hold them."""
    planned = {v.branch: planned_bytes(config, v) for v in request.variants}
    for branch, size in planned.items():
        console.note(f"{branch}: will be {gigabytes(size)}")
    place = writable(request.out)
    free, needed = shutil.disk_usage(place).free, sum(planned.values())
    if free < needed and not request.resume:  # a resumed run has part of it there already
        raise BadRequest(
            f"{request.out} has room for {gigabytes(free)}, {gigabytes(needed)} are needed: make room, or give "
            "another --out"
        )


def writable(out: Path) -> Path:
    """The folder in which `out` lies or will be made. Raises BadRequest where nothing may be written there."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BadRequest(f"{place} is no folder that you may write to: give another --out")
    return place


def _refuse_quantised(source: str, config: Json) -> None:
    if config.get("quantization_config"):
        raise BadRequest(f"{source} is quantised already: start from the unquantised model")


class _Follower:
    """Turns pipeline events into progress."""

    def __init__(self, advance: Advance, modules: int) -> None:
        self.advance, self.modules = advance, modules
        self.blocks: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case ModuleSolved(branch, report):
                warning = f"  {report.fallback}" if report.fallback else ""
                short = report.name.removeprefix("model.layers.")
                self.advance(1, f"{branch} {short} loss {report.loss:.2e}{warning}")
            case BlockFinished(branch, index, resumed=True):
                self.advance(7, f"{branch} block {index} was done")
            case _:
                pass


def summarise(made: Made, source: str, console: Console) -> None:
    """What was made, where it is, and what is not as asked."""
    console.say()
    rows = [
        (f.branch, gigabytes(f.size_bytes), _mean_loss(f), str(len(f.fallbacks)), str(f.folder))
        for f in made.variants
    ]
    console.table(("branch", "size", "mean loss", "fallbacks", "folder"), rows)
    for line in _fallback_lines(made.variants):
        console.say(line)
    gpu = f" and {gigabytes(made.peak_vram_bytes[1])} of the GPU's" if made.peak_vram_bytes else ""
    console.say(f"\n{seconds(made.seconds)}, at most {gigabytes(made.peak_ram_bytes)} of memory{gpu}")
    example = made.variants[0].folder
    made_first, original = shlex.quote(str(example)), shlex.quote(source)
    console.say(
        f"next: quantmill eval {made_first} --against {original}, "
        f"or quantmill generate {made_first} --prompt 'Hello'"
    )


def _mean_loss(finished: Finished) -> str:
    losses = [m.loss for m in finished.modules]
    return f"{sum(losses) / max(1, len(losses)):.2e}"


def _fallback_lines(finished: Sequence[Finished]) -> list[str]:
    return [f"not as asked: {f.branch} {line}" for f in finished for line in f.fallbacks]
