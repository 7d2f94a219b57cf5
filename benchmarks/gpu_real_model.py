"""A small real model, rounded to 4 bits here, on the GPU decoder beside Transformers. Needs one NVIDIA GPU.

    PYTHONPATH=src:tests python benchmarks/gpu_real_model.py MODEL [--keep DIR] [--only text|fused|windows|nothing]

MODEL: a Transformers folder of a Llama with a tokenizer. Prints relative errors of logits and shares of equal first
choices: on prompts of 300 and 2000 tokens, behind sliding windows of 256 and 4096 with the pages before them given
away, with the cache in 16 and 8 bits; then greedy text, 20 prompts of 512 tokens in one batch: tokens that are not
the reference's first choice and the widest gap there, and whether one prompt alone gives the same tokens.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill.runtime.gpu.decoder import GpuRuntime
from quantmill.runtime.interface import PAGE, Piece
from quantmill.runtime.tokenizer import open_tokenizer
from quantmill.types import QuantConfig

TEXTS = ("docs/design.md", "README.md", "docs/formats.md")
PROMPTS, ANSWER = 20, 512


def pages(tokens: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + -(-tokens // PAGE)))


def reference(model: Any, ids: list[int], last: int = 0) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids]).cuda(), logits_to_keep=last).logits[0].float()
    return logits


def said(what: str, found: Tensor, wanted: Tensor) -> None:
    error = float((found - wanted).norm() / wanted.norm())
    same = float((found.argmax(1) == wanted.argmax(1)).float().mean())
    print(f"{what:42} error {error:.1e}, first choices alike {same:.4f}", flush=True)


def behind_window(runtime: GpuRuntime, ids: list[int], window: int) -> Tensor:
    """Logits of the last 130 tokens: 120 in one piece, 10 one by one; pages before the window are gone."""
    count = len(ids)

    def kept(at: int) -> tuple[int, ...]:
        gone = max(0, at - window + 1) // PAGE
        return (-1,) * gone + pages(count)[gone:]

    runtime.forward([Piece(ids[:-130], 0, pages(count))])
    found = [runtime.forward([Piece(ids[-130:-10], count - 130, kept(count - 130), True)]).clone()]
    found += [runtime.forward([Piece([ids[at]], at, kept(at))]).clone() for at in range(count - 10, count)]
    return torch.cat(found)


def greedy(runtime: GpuRuntime, prompts: list[list[int]], lines: list[tuple[int, ...]]) -> list[list[int]]:
    """Prompts and their answers."""
    texts = [list(p) for p in prompts]
    logits = runtime.forward([Piece(p, 0, line) for p, line in zip(prompts, lines, strict=True)])
    for _ in range(ANSWER):
        tokens = logits.argmax(1).tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        pieces = [Piece(t[-1:], len(t) - 1, line) for t, line in zip(texts, lines, strict=True)]
        logits = runtime.forward(pieces)
    return texts


def text_beside(runtime: GpuRuntime, model: Any, ids: list[int]) -> None:
    prompts = [ids[i * 250 : i * 250 + 40 + 3 * i] for i in range(PROMPTS)]
    per = -(-(100 + ANSWER + PAGE) // PAGE)
    lines = [tuple(range(i * per, (i + 1) * per)) for i in range(PROMPTS)]
    texts = greedy(runtime, prompts, lines)
    others, widest = 0, 0.0
    for text, prompt in zip(texts, prompts, strict=True):
        wanted = reference(model, text[:-1])[len(prompt) - 1 :]
        mine = torch.tensor(text[len(prompt) :]).cuda()
        gap = wanted.max(1).values - wanted.gather(1, mine[:, None])[:, 0]
        others, widest = others + int((gap > 0).sum()), max(widest, float(gap.max()))
    total = PROMPTS * ANSWER
    print(f"greedy: {others} of {total} tokens are not the reference's first choice, widest gap {widest:.4f}")
    alone = greedy(runtime, prompts[3:4], lines[3:4])[0]
    print(f"greedy: one prompt alone gives the batch's tokens: {alone == texts[3]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "real_model")
    parser.add_argument("--only", choices=("text", "fused", "windows", "nothing"))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to compare")
        return
    from transformers import AutoConfig, AutoModelForCausalLM, MistralForCausalLM

    from gptq_models import edit_json, write_quantized

    torch.backends.cuda.matmul.allow_tf32 = False
    plain = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    twin: Any = write_quantized(asked.keep, plain, QuantConfig(bits=4, group_size=64)).cuda()
    for file in asked.model.glob("tokenizer*"):
        shutil.copy(file, asked.keep)
    ids = open_tokenizer(asked.model).encode("".join(Path(t).read_text() for t in TEXTS))
    if asked.only == "nothing":  # the folder alone, for other benchmarks
        return
    for fused in {"windows": (), "fused": (True,)}.get(asked.only, (False, True)):
        runtime = GpuRuntime.from_folder(asked.keep, context=8192, kv_tokens=40960, fused=fused)
        for count in (300, 2000):
            piece = Piece(ids[:count], 0, pages(count), True)
            said(f"fused {fused}, {count} tokens", runtime.forward([piece]), reference(twin, ids[:count]))
        text_beside(runtime, twin, ids)
        runtime.close()
    original = (asked.keep / "config.json").read_text()
    for window, count in () if asked.only in ("text", "fused") else ((256, 1000), (4096, 5000)):
        edit_json(
            asked.keep / "config.json",
            model_type="mistral",
            sliding_window=window,
            max_position_embeddings=8192,
        )
        config = AutoConfig.from_pretrained(asked.keep)
        del config.quantization_config
        model = MistralForCausalLM(config).cuda().eval()
        model.load_state_dict(twin.state_dict())
        for kind in ("fp16", "fp8"):
            runtime = GpuRuntime.from_folder(asked.keep, context=8192, kv_tokens=16384, kv_dtype=kind)
            found = behind_window(runtime, ids[:count], window)
            said(f"window {window}, {count} tokens, cache {kind}", found, reference(model, ids[:count], 130))
            runtime.close()
        (asked.keep / "config.json").write_text(original)


if __name__ == "__main__":
    main()
