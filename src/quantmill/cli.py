"""The command line: one function per command. Above it, nothing; below it, both lanes.

Every command imports what it needs when it runs, so `quantmill --help` loads no torch.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from quantmill.console import Console, gigabytes, seconds
from quantmill.errors import BadRequest, QuantmillError
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig, SamplingParams, Variant

app = typer.Typer(
    name="quantmill",
    help="Make, check, publish, fetch and run GPTQ-quantised language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

DEFAULT, SAMPLING = QuantConfig(), SamplingParams()

Source = Annotated[str, typer.Argument(help="a folder, a .gguf file, owner/name or owner/name:branch")]
Model = Annotated[str, typer.Argument(help="a folder, a .gguf file, owner/name or owner/name:branch")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else there")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core")]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", help="4bit-128g, 8bit--1g, 3bit-64g-noact, 4bit-32g-asym; repeatable"),
]
GridName = Annotated[
    str | None, typer.Option("--grid", help="card: the four branches of a classic repository")
]
Bits = Annotated[int | None, typer.Option(help="2, 3, 4 or 8")]
GroupSize = Annotated[int | None, typer.Option(help="columns that share a scale; -1: one scale per row")]
ActOrderFlag = Annotated[
    bool | None, typer.Option("--act-order/--no-act-order", help="quantise the most active columns first")
]
Grouped = Annotated[bool, typer.Option("--grouped", help="let groups follow the act order (true g_idx)")]
Sym = Annotated[
    bool | None, typer.Option("--sym/--asym", help="a zero point fixed in the middle, or a free one")
]
Damp = Annotated[
    float | None, typer.Option(help=f"fraction of the mean diagonal; default {DEFAULT.damp_percent}")
]
Dataset = Annotated[
    str, typer.Option(help="python-docs, wikitext, c4, self, a .txt/.jsonl/.parquet file, or a hub id")
]
Samples = Annotated[int, typer.Option(min=1, help="calibration blocks")]
Seqlen = Annotated[int, typer.Option(min=8, help="tokens per block")]


@app.command()
def plan(
    source: Source,
    variant: Variants = None,
    grid: GridName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    as_json: AsJson = False,
) -> None:
    """Predict size, memory and time of each variant. Reads config.json, nothing else."""
    from quantmill.files import read_json
    from quantmill.quantize.plan import measure_flops, quantised_weights
    from quantmill.quantize.plan import plan as predict
    from quantmill.sources import resolve

    console = Console(as_json)
    config = read_json(resolve(source, files="config", notify=console.note) / "config.json")
    chosen = choose_variants(variant, grid, bits, group_size, default_grid="card")
    rows = predict(config, chosen, samples=samples, seqlen=seqlen, flops_per_second=measure_flops())
    console.say(f"{source}: {quantised_weights(config):,} weights to quantise, {samples} x {seqlen} tokens\n")
    head = ("branch", "bits", "group", "act order", "damp", "size", "bits/weight", "VRAM", "RAM", "time here")
    console.table(head, [_plan_row(r.to_json()) for r in rows])
    console.say("\nVRAM, RAM: to quantise on a GPU or on the CPU; to run, count the size and the KV cache.")
    console.document({"source": source, "variants": [r.to_json() for r in rows]})


def _plan_row(row: dict[str, object]) -> tuple[str, ...]:
    size, vram, ram = (
        gigabytes(float(str(row[k]))) for k in ("size_bytes", "peak_vram_bytes", "peak_ram_bytes")
    )
    act = "yes" if row["desc_act"] else "no"
    fixed = (row["branch"], row["bits"], row["group_size"], act, row["damp_percent"])
    return (
        *map(str, fixed),
        size,
        f"{row['bits_per_weight']}",
        vram,
        ram,
        seconds(float(str(row["seconds"]))),
    )


@app.command()
def quantize(
    source: Source,
    out: Annotated[Path, typer.Option(help="a folder; each variant becomes a folder in it, named by branch")],
    variant: Variants = None,
    grid: GridName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    act_order: ActOrderFlag = None,
    grouped: Grouped = False,
    sym: Sym = None,
    damp: Damp = None,
    true_sequential: Annotated[bool, typer.Option(help="each linear sees its quantised predecessors")] = True,
    dataset: Dataset = "python-docs",
    seqlen: Seqlen = 2048,
    samples: Samples = 128,
    seed: Annotated[int, typer.Option(help="draws the calibration blocks")] = 0,
    preset: Annotated[str, typer.Option(help="fast")] = "fast",
    resume: Annotated[bool, typer.Option("--resume", help="go on where an interrupted run stopped")] = False,
    device: Device = "auto",
    threads: Threads = None,
    format: Annotated[str | None, typer.Option(help="gptq (v1; default where symmetric) or gptq_v2")] = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a model: one complete folder per variant."""
    from quantmill.commands.making import Request, make

    console = Console(as_json)
    choice = choose_variants(variant, grid, bits, group_size, act_order, grouped, sym)
    request = Request(
        source=source,
        out=out,
        variants=tuple(Variant(v.branch, _changed(v.config, damp, true_sequential, format)) for v in choice),
        dataset=dataset,
        seqlen=seqlen,
        samples=samples,
        seed=seed,
        preset=preset,
        resume=resume,
        device=device,
        threads=threads,
        command=shlex.join(["quantmill", *sys.argv[1:]]),
    )
    made = make(request, console)
    console.document(made.to_json())


def _changed(
    config: QuantConfig, damp: float | None, true_sequential: bool, format: str | None
) -> QuantConfig:
    """A variant's configuration with what was asked for all of them."""
    known = [str(f) for f in CheckpointFormat]
    if format is not None and format not in known:
        raise BadRequest(f"--format {format} is not written: use one of {', '.join(known)}")
    return dataclasses.replace(
        config,
        damp_percent=config.damp_percent if damp is None else damp,
        true_sequential=true_sequential,
        checkpoint_format=None if format is None else CheckpointFormat(format),
    )


def choose_variants(
    typed: list[str] | None,
    grid: str | None,
    bits: int | None = None,
    group_size: int | None = None,
    act_order: bool | None = None,
    grouped: bool = False,
    sym: bool | None = None,
    default_grid: str | None = None,
) -> tuple[Variant, ...]:
    """The variants that the flags ask for. Raises BadRequest when they ask twice, or for an unknown grid."""
    from quantmill.hub.variants import GRIDS, branch_name, parse_variant

    single = any(f is not None for f in (bits, group_size, act_order, sym)) or grouped
    if (typed is not None) + (grid is not None) + single > 1:
        raise BadRequest(
            "choose variants by --variant, by --grid or by --bits and its companions, not by two of them"
        )
    if not typed and not single:
        grid = grid or default_grid
    if grid is not None:
        if grid not in GRIDS:
            raise BadRequest(f"there is no grid {grid!r}: use --grid {' or '.join(GRIDS)}")
        return GRIDS[grid]
    if typed:
        chosen = tuple(parse_variant(text) for text in typed)
        if len({v.branch for v in chosen}) < len(chosen):
            raise BadRequest("two --variant options name the same branch: leave one out")
        return chosen
    order = ActOrder.GROUPED if grouped else ActOrder.NONE if act_order is False else ActOrder.STATIC
    config = QuantConfig(
        bits=DEFAULT.bits if bits is None else bits,
        group_size=DEFAULT.group_size if group_size is None else group_size,
        act_order=order,
        sym=DEFAULT.sym if sym is None else sym,
    )
    return (Variant(branch_name(config), config),)


@app.command()
def check(
    model: Model,
    fix: Annotated[
        bool, typer.Option("--fix", help="mend what can be told from the files: the two configs")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Examine a quantised folder: tensors, configs, zero points, companions, and who can load it."""
    from quantmill.commands.describing import check_to_json
    from quantmill.doctor import check as examine
    from quantmill.doctor import fix as mend
    from quantmill.sources import resolve

    console = Console(as_json)
    folder = resolve(model, notify=console.note)
    for name in mend(folder) if fix else ():
        console.say(f"mended  {name}")
    report = examine(folder)
    for f in report.findings:
        console.say(f"{f.level:<8}{f.where}: {f.message}")
    console.say()
    for loader, verdict in report.loaders.items():
        console.say(f"{loader}: {verdict}")
    console.document(check_to_json(report))
    if not report.ok:
        raise typer.Exit(2)


@app.command("eval")
def eval_(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="the original model, to measure the divergence from")
    ] = None,
    text: Annotated[str, typer.Option(help="a text file, or a data set as for --dataset")] = "python-library",
    ctx: Annotated[int, typer.Option(min=2, help="tokens per window")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="windows to score")] = 16,
    save: Annotated[
        bool, typer.Option(help="keep the result as eval_report.json in the model's folder")
    ] = True,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and, against the original, KL divergence and top-1 agreement."""
    from quantmill.commands.measuring import Protocol, measure, report_lines

    console = Console(as_json)
    protocol = Protocol(text, ctx, windows, device, threads, save)
    report = measure({model: model}, against, protocol, console)[model]
    for line in report_lines(report):
        console.say(line)
    console.document({k: v for k, v in dataclasses.asdict(report).items() if v is not None})


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="the folder that holds one folder per branch")],
    name: Annotated[str | None, typer.Option(help="the repository's name, as owner/name")] = None,
    as_json: AsJson = False,
) -> None:
    """Write README.md from the reports found, with pictures of size against loss and loss by layer."""
    from quantmill.commands.describing import describe

    console = Console(as_json)
    path = describe(folder, name)
    console.say(f"wrote {path}")
    console.document({"card": str(path)})


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="what to answer")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = SAMPLING.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = SAMPLING.temperature,
    top_p: float = SAMPLING.top_p,
    top_k: int = SAMPLING.top_k,
    repetition_penalty: float = SAMPLING.repetition_penalty,
    seed: int | None = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue the text as it is, without the chat template")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt."""
    from quantmill.commands.running import open_model
    from quantmill.runtime.generate import generate as run

    console = Console(as_json)
    params = SamplingParams(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
    loaded, tokenizer = open_model(model, device, threads, console)
    began = time.perf_counter()
    answer = run(loaded, tokenizer, prompt, params, on_text=console.stream, chat=not raw)
    console.stream("\n")
    speed = answer.completion_tokens / max(1e-9, time.perf_counter() - began)
    console.note(f"{answer.prompt_tokens} + {answer.completion_tokens} tokens, {speed:.1f} tok/s")
    counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    console.document({"text": answer.text, **counts, "tok_s": round(speed, 2)})


@app.command()
def chat(
    model: Model,
    temperature: float = SAMPLING.temperature,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = SAMPLING.max_new_tokens,
    seed: int | None = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Talk to a model in the terminal."""
    from quantmill.commands.running import open_model
    from quantmill.runtime.chat import chat_loop

    console = Console()
    params = dataclasses.replace(SAMPLING, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    loaded, tokenizer = open_model(model, device, threads, console)
    console.note("/quit ends, /reset forgets, /system TEXT, /set temperature 0.7, /regen answers anew")
    chat_loop(loaded, tokenizer, params, lambda: input("> "), console.stream)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where everything goes")] = Path("demo"),
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """All of it on a small real model, offline, on a CPU: quantise, check, measure, describe, answer."""
    from quantmill.demo import run

    console = Console(as_json)
    console.document(run(out, threads, console))


def main() -> None:
    """Entry point: a user's mistake is one line and exit 2, our own failure exit 1."""
    try:
        app()
    except QuantmillError as e:
        print(f"quantmill: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("quantmill: interrupted; add --resume to the same command to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
