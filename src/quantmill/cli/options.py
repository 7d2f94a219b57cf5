"""Arguments and options that several commands take; their defaults are those of the dataclasses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmill.types import QuantConfig, SamplingParams

DEFAULT, SAMPLING = QuantConfig(), SamplingParams()

Source = Annotated[str, typer.Argument(help="a folder, a .gguf file, owner/name or owner/name:branch")]
Model = Annotated[str, typer.Argument(help="a folder, a .gguf file, owner/name or owner/name:branch")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else there")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core")]
CpuExact = Annotated[
    bool, typer.Option("--cpu-exact", help="float32 activations and cache; slower, for comparison")
]
PromptLookup = Annotated[
    bool,
    typer.Option("--prompt-lookup", help="guess from the text so far: same answer, sooner where it repeats"),
]
Context = Annotated[
    int | None, typer.Option(min=1, help="positions to make room for; default: the model's, at most 32768")
]
TensorParallel = Annotated[
    int, typer.Option(min=1, help="processes that share every layer: one per GPU, or per part of the CPU")
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", help="4bit-128g, 8bit--1g, 3bit-64g-noact, 4bit-32g-asym; repeatable"),
]
GridName = Annotated[
    str | None, typer.Option("--grid", help="card: the classic four branches; family: GPTQ, AWQ, GGUF")
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

# How answers are drawn.
MaxNewTokens = Annotated[int, typer.Option(min=1, help="the longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(help="0: greedy; more: more surprising")]
TopP = Annotated[
    float, typer.Option(help="draw from the likeliest tokens that hold this probability; 1: all")
]
TopK = Annotated[int, typer.Option(help="draw from so many of the likeliest tokens; 0: all")]
RepetitionPenalty = Annotated[float, typer.Option(help="more than 1: avoid what was said; 1: do not")]
DrawSeed = Annotated[int | None, typer.Option(help="draws the same answer again; default: another each time")]

# What `quantize` alone takes.
Out = Annotated[Path, typer.Option(help="a folder; each variant becomes a folder in it, named by branch")]
TrueSequential = Annotated[bool, typer.Option(help="each linear sees its quantised predecessors")]
Seed = Annotated[int, typer.Option(help="draws the calibration blocks")]
PresetName = Annotated[str, typer.Option(help="fast, or best: several times the time, less loss")]
TuneBlocks = Annotated[
    bool,
    typer.Option("--tune-blocks", help="with best: train scales, norms, codes (2, 3 bits) block by block"),
]
TargetSize = Annotated[
    str | None, typer.Option(help="choose bits per module for weight files of this size, e.g. 4.2GB")
]
TargetKl = Annotated[
    float | None, typer.Option(help="choose bits per module for this many nats per token, e.g. 0.02")
]
Distill = Annotated[
    bool, typer.Option("--distill", help="with best: train the same on the original's logits")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on where an interrupted run stopped")]
MaxVram = Annotated[str | None, typer.Option(help="GPU memory that may be taken, e.g. 16GB")]
MaxRam = Annotated[str | None, typer.Option(help="host memory that may be taken, e.g. 12GB")]
Events = Annotated[Path | None, typer.Option(help="write a line of JSON for every event there")]

# What `serve` alone takes.
Served = Annotated[
    list[str] | None,
    typer.Argument(
        help="folders, .gguf files, owner/name or owner/name:branch; NAME=SOURCE gives another name"
    ),
]
Host = Annotated[str, typer.Option(help="the address to listen on; others than loopback need a key")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")]
ApiKeys = Annotated[
    list[str] | None, typer.Option(envvar="QUANTMILL_API_KEY", help="may ask the models; repeatable")
]
AdminKeys = Annotated[
    list[str] | None,
    typer.Option(envvar="QUANTMILL_ADMIN_KEY", help="may load and drop models, too; repeatable"),
]
NoAuth = Annotated[bool, typer.Option("--no-auth", help="let everybody in who reaches the address")]
WebUi = Annotated[bool, typer.Option("--ui", help="the web UI, too (needs quantmill[ui])")]
KvTokens = Annotated[int | None, typer.Option(min=64, help="tokens that a model's cache holds")]
Memory = Annotated[
    float | None,
    typer.Option(min=0.01, help="GB that all models may take; default: 80 % of the device's"),
]
MaxWaiting = Annotated[int, typer.Option(min=1, help="requests that may wait; then 429")]
MaxConcurrent = Annotated[int, typer.Option(min=1, help="requests under way; then 429")]
EngineProcess = Annotated[
    bool | None,
    typer.Option(
        "--engine-process/--engine-thread",
        help="run a model beside the server or inside it; default: beside it on a GPU",
        show_default=False,
    ),
]
FastBatches = Annotated[
    bool,
    typer.Option(
        "--fast-batches",
        help="on a GPU: faster with more than 32 answers at once, but what an answer says may then depend on "
        "the others",
    ),
]
