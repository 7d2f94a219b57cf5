"""AWQ folders: our scaling and solver against an AutoAWQ-style search with rounding to nearest, same tokens.

    python benchmarks/awq_quality.py --source FOLDER --blocks NPY --test NPY [--group 128] [--device cuda]
        [--made awq-best,awq,gptq-asym,gptq-sym]

The peer is a twin written here after AutoAWQ 0.2 (no longer installable beside a current Transformers): twenty
strengths per group of linears, scales = rms(x)^a / mean|w|^(1-a), chosen by the error of the linears' outputs
(AutoAWQ's is taken after the attention), min-max asymmetric grids, then a search for the best clipping of every
group of weights in twenty steps down to one half (not for q and k, as there), inputs from the unquantised model.
The model is the one of gguf_quality.py: SmolLM2-135M in another basis, 768 wide, so that groups of 128 divide.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gguf_quality import model_with, widen
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantmill import evaluate
from quantmill.checkpoint import open_checkpoint
from quantmill.formats.gptq import dequantize
from quantmill.quantize import calibration
from quantmill.quantize.job import Job
from quantmill.quantize.pipeline import quantize
from quantmill.types import CalibrationSet, CheckpointFormat, QuantConfig, Variant

GRID, SHRINKS = 20, 10  # strengths tried; clippings tried: 1 - i / 20 for i < 10
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
SCALED = ("qkv", "gate_up", "down")  # o_proj follows v_proj, which has fewer rows under grouped queries


def hessians(model: torch.nn.Module, blocks: Tensor, device: str) -> dict[str, Tensor]:
    """Mean of x x^T for every group of linears, by "layer.group"."""
    sums: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float().reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x / len(x)

        return hook

    hooks = [
        block.get_submodule(modules[0]).register_forward_pre_hook(listen(f"{i}.{group}"))
        for i, block in enumerate(model.model.layers)
        for group, modules in GROUPS.items()
    ]
    with torch.inference_mode():
        for ids in torch.split(blocks, 8):
            model(ids.to(device))
    for hook in hooks:
        hook.remove()
    return sums


def nearest(W: Tensor, group: int, shrink: Tensor | float = 1.0) -> Tensor:
    """Min-max asymmetric 4-bit rounding to nearest; `shrink` (N, groups) clips the range."""
    X = W.view(len(W), -1, group)
    shrink = shrink[..., None] if isinstance(shrink, Tensor) else shrink
    low, high = X.amin(2, keepdim=True) * shrink, X.amax(2, keepdim=True) * shrink
    scale = ((high - low) / 15).clamp_min(1e-5).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    return ((X / scale).round() + zero).clamp(0, 15).sub(zero).mul(scale).view_as(W)


def error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    E = W - Q
    return float(((E @ H) * E).sum())


def twin(weights: list[Tensor], H: Tensor, group: int, scaled: bool, clipped: list[bool]) -> list[Tensor]:
    """Effective weights of one group of linears as AutoAWQ would leave them."""
    x, W = H.diagonal().sqrt().clamp_min(1e-8), torch.cat(weights)
    share = W.view(len(W), -1, group).abs()
    mean = (share / share.amax(2, keepdim=True).clamp_min(1e-12)).view_as(W).mean(0)
    best, chosen = float("inf"), torch.ones_like(x)
    for i in range(GRID if scaled else 1):
        a = i / GRID
        s = (x**a / (mean ** (1 - a) + 1e-4)).clamp_min(1e-4) if scaled else torch.ones_like(x)
        s = s / (s.max() * s.min()).sqrt()
        loss = sum(error(w, nearest(w * s, group) / s, H) for w in weights)
        if loss < best:
            best, chosen = loss, s
    return [
        clip(w * chosen, H / chosen[:, None] / chosen, group, c) / chosen
        for w, c in zip(weights, clipped, strict=True)
    ]


def clip(W: Tensor, H: Tensor, group: int, wanted: bool) -> Tensor:
    """Rounded with the clipping that gives every group of weights the least error of its own output."""
    count = W.shape[1] // group
    shrink = torch.ones(len(W), count, device=W.device)
    if not wanted:
        return nearest(W, group)
    blocks = torch.stack([H[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(count)])
    best = torch.full_like(shrink, torch.inf)
    for i in range(SHRINKS):
        factor = 1 - i / GRID
        E = (nearest(W, group, factor) - W).view(len(W), count, group)
        loss = torch.einsum("ngi,gij,ngj->ng", E, blocks, E)
        shrink, best = torch.where(loss < best, factor, shrink), torch.minimum(loss, best)
    return nearest(W, group, shrink)


def peer(original: torch.nn.Module, sums: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    weights = {}
    for i, block in enumerate(original.model.layers):
        for name, modules in GROUPS.items():
            W = [block.get_submodule(m).weight.data for m in modules]
            clipped = [not m.endswith(("q_proj", "k_proj")) for m in modules]
            for m, Q in zip(
                modules, twin(W, sums[f"{i}.{name}"], group, name in SCALED, clipped), strict=True
            ):
                weights[f"model.layers.{i}.{m}.weight"] = Q
    return weights


def ours(
    source: Path, data: CalibrationSet, out: Path, variant: Variant, preset: str, device: str
) -> tuple[dict[str, Tensor], float]:
    began = time.perf_counter()
    done = quantize(Job(source, "model", out, (variant,), data, preset, device=device), lambda _: None)[0]
    took = time.perf_counter() - began
    opened = open_checkpoint(done.folder)
    weights = {f"{m}.weight": dequantize(opened.packed(m), torch.float32) for m in opened.quantized_modules()}
    weights |= {n: opened.load(n).float() for n in opened.tensors if n.endswith("norm.weight")}
    return weights, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--blocks", type=Path, required=True, help=".npy of token ids (samples, seqlen)")
    parser.add_argument("--test", type=Path, required=True, help=".npy of token ids (T,)")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--made", default="awq-best,awq,gptq-asym,gptq-sym")
    args = parser.parse_args()
    blocks = torch.from_numpy(np.load(args.blocks).astype(np.int64))
    ids = torch.from_numpy(np.load(args.test).astype(np.int64)).flatten()
    data = CalibrationSet(blocks, "wikitext", 0, calibration.fingerprint(blocks), len(blocks), 0)
    work = Path(tempfile.mkdtemp())
    source = widen(args.source, work / "wide")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(args.device).eval()
    asym = QuantConfig(4, args.group, sym=False, checkpoint_format=CheckpointFormat.GPTQ_V2)
    made = {
        "awq-best": (Variant("awq", asym, "awq"), "best"),
        "awq": (Variant("awq", asym, "awq"), "fast"),
        "gptq-asym": (Variant("gptq", asym), "fast"),
        "gptq-asym-best": (Variant("gptq", asym), "best"),
        "gptq-sym": (Variant("sym", QuantConfig(4, args.group)), "fast"),
    }
    began = time.perf_counter()
    with torch.inference_mode():
        theirs = peer(original, hessians(original, blocks, args.device), args.group)
    spent = {"autoawq-style": time.perf_counter() - began}
    twin_model = model_with(source, theirs, args.device)
    cut = evaluate.token_windows(ids, ctx=1024, windows=args.windows)
    print(
        f"4 bits, group {args.group}, {len(cut)} x 1024 tokens\n"
        f"{'what':<16}{'KL':>10}  of the peer's        top-1   seconds",
        flush=True,
    )
    for name in args.made.split(","):
        weights, spent[name] = ours(source, data, work / name, *made[name], args.device)
        pair = {name: model_with(source, weights, args.device), "autoawq-style": twin_model}
        scores = evaluate.score(pair, cut, original=original)
        for shown in pair:
            report = evaluate.report(scores[shown])
            ratio = evaluate.compare(scores[shown], scores["autoawq-style"]).kl_ratio
            interval = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            print(
                f"{shown:<16}{report.mean_kl:>10.5f}  {interval}  {report.top1_agreement:.4f}  {spent[shown]:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
