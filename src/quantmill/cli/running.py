"""`generate`, `chat` and `demo`: a model at work."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated

import typer

from quantmill.cli.app import app
from quantmill.cli.options import (
    SAMPLING,
    AsJson,
    Context,
    CpuExact,
    Device,
    DrawSeed,
    MaxNewTokens,
    Model,
    PromptLookup,
    RepetitionPenalty,
    Temperature,
    TensorParallel,
    Threads,
    TopK,
    TopP,
)
from quantmill.console import Console
from quantmill.types import SamplingParams


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="what to answer")],
    max_new_tokens: MaxNewTokens = SAMPLING.max_new_tokens,
    temperature: Temperature = SAMPLING.temperature,
    top_p: TopP = SAMPLING.top_p,
    top_k: TopK = SAMPLING.top_k,
    repetition_penalty: RepetitionPenalty = SAMPLING.repetition_penalty,
    seed: DrawSeed = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue the text as it is, without the chat template")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    cpu_exact: CpuExact = False,
    context: Context = None,
    tensor_parallel: TensorParallel = 1,
    prompt_lookup: PromptLookup = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt."""
    from quantmill.commands.running import open_model
    from quantmill.runtime.generate import generate as run

    console = Console(as_json)
    params = SamplingParams(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
    loaded, tokenizer = open_model(
        model,
        device,
        threads,
        console,
        exact=cpu_exact,
        context=context,
        tensor_parallel=tensor_parallel,
    )
    began = time.perf_counter()
    answer = run(
        loaded, tokenizer, prompt, params, on_text=console.stream, chat=not raw, lookup=prompt_lookup
    )
    console.stream("\n")
    speed = answer.completion_tokens / max(1e-9, time.perf_counter() - began)
    note = f"{answer.prompt_tokens} + {answer.completion_tokens} tokens, {speed:.1f} tok/s"
    document = {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "tok_s": round(speed, 2),
        "first_token_s": round(answer.first_token_s, 4),
    }
    if answer.guesses is not None:
        note += f", {answer.guesses.right} of {answer.guesses.guessed} guesses held"
        document |= {"guessed": answer.guesses.guessed, "held": answer.guesses.right}
    console.note(note)
    console.document(document)
    loaded.close()


@app.command()
def chat(
    model: Model,
    temperature: Temperature = SAMPLING.temperature,
    max_new_tokens: MaxNewTokens = SAMPLING.max_new_tokens,
    seed: DrawSeed = None,
    device: Device = "auto",
    threads: Threads = None,
    cpu_exact: CpuExact = False,
    context: Context = None,
    tensor_parallel: TensorParallel = 1,
    prompt_lookup: PromptLookup = False,
    as_json: AsJson = False,
) -> None:
    """Talk to a model in the terminal; with --json, what was said comes as a document in the end."""
    from quantmill.commands.running import open_model, remember_lines
    from quantmill.runtime.chat import chat_loop

    console = Console(as_json)
    params = dataclasses.replace(SAMPLING, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    loaded, tokenizer = open_model(
        model,
        device,
        threads,
        console,
        exact=cpu_exact,
        context=context,
        tensor_parallel=tensor_parallel,
    )
    console.note("/quit ends, /reset forgets, /system TEXT, /set temperature 0.7, /regen answers anew")
    console.note(
        'a line that ends in \\ goes on in the next; """ alone begins and ends a text of several lines'
    )
    remember_lines()
    ask = functools.partial(console.ask, "> ")
    talk = chat_loop(loaded, tokenizer, params, ask, console.stream, lookup=prompt_lookup)
    console.document({"system": talk.system, "messages": talk.messages})
    loaded.close()


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
