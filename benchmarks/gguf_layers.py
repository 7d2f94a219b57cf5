"""Single linears onto GGUF types: error of their outputs on held-out text, ours beside llama.cpp's own quantiser.

    python benchmarks/gguf_layers.py --ggml LIBRARY --source FOLDER --valid TXT --test TXT [--types Q4_0,Q2_K]

The cheap companion of gguf_quality.py (which says what LIBRARY is, and why channels are shuffled and spread):
q, v, up and down of blocks 3 and 15 of SmolLM2-135M, inputs of 24 x 512 tokens of one text to solve with (for
llama.cpp's quantiser: their mean squares as importance), of 8 x 512 tokens of another to score with. The error
is tr(E H E^T) / tr(W H W^T) with the other text's H; the last column is ours over theirs, and its geometric
mean per type.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from gguf_quality import Ggml, put, spread
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantmill.formats.gguf import TYPES
from quantmill.quantize.gguf_solve import solve_blocks
from quantmill.quantize.solver import factorise, relative_loss
from quantmill.types import QuantConfig

BLOCKS = (3, 15)
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
SEQLEN = 512


def moments(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Mean of x x^T of every linear that is looked at; ids (rows, SEQLEN)."""
    sums: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x / ids.numel()

        return hook

    names = [f"model.layers.{b}.{m}" for b in BLOCKS for m in MODULES]
    hooks = [model.get_submodule(n).register_forward_pre_hook(listen(n)) for n in names]
    with torch.inference_mode():
        for part in torch.split(ids, 4):
            model.model(part)
    for hook in hooks:
        hook.remove()
    return sums


def another_basis(W: Tensor, *squares: Tensor) -> list[Tensor]:
    """Input channels shuffled, and where 256 does not divide them, 64 zeros behind every 192."""
    K = W.shape[1]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    place, size = (order, K) if K % 256 == 0 else (spread(K)[order], K // 192 * 256)
    return [put(W, place, size, 1), *(put(put(H, place, size, 0), place, size, 1) for H in squares)]


def tokens(tokenizer, text: Path, rows: int) -> Tensor:
    ids = tokenizer(text.read_text()[: rows * SEQLEN * 12], return_tensors="pt").input_ids[0]
    return ids[: rows * SEQLEN].view(rows, SEQLEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ggml", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--types", default="Q4_0,Q4_K,Q3_K,Q2_K")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[: max(BLOCKS) + 1]
    tokenizer, ggml = AutoTokenizer.from_pretrained(args.source), Ggml(args.ggml)
    fit, held = (
        moments(model, tokens(tokenizer, args.valid, 24)),
        moments(model, tokens(tokenizer, args.test, 8)),
    )
    print(f"{'type':<6}{'linear':<34}{'ours':>10}{'llama.cpp':>11}{'ratio':>8}")
    for name in args.types.split(","):
        ratios = []
        for module in fit:
            W, H, other = another_basis(model.get_submodule(module).weight.data, fit[module], held[module])
            factor, _ = factorise(H, QuantConfig(4, 32))
            mine = relative_loss(W, solve_blocks(W, factor, TYPES[name]).weight, other)
            theirs = relative_loss(W, ggml(W, TYPES[name], H.diagonal()), other)
            ratios.append(mine / theirs)
            print(
                f"{name:<6}{module.removeprefix('model.'):<34}{mine:>10.2e}{theirs:>11.2e}{ratios[-1]:>8.3f}",
                flush=True,
            )
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{name:<6}{'geometric mean':<34}{'':>21}{mean:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
