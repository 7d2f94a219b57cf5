"""The same job by AutoRound 0.16 (rounding learnt block by block with signed gradients): seconds, and a folder.

Runs in an environment of its own, imports nothing of quantmill; benchmarks/peer_gptqmodel.py says how such an
environment is made, auto-round==0.16.0 and py-cpuinfo==9.0.0 go into it with --no-deps.

    .venv-peer/bin/python benchmarks/peer_autoround.py MODEL BLOCKS.npy --out FOLDER [--best] [--ext]

Its defaults, or with --best its own best settings (1000 steps instead of 200), or with --ext its experimental
second algorithm, meant for few bits. BLOCKS as in peer_gptqmodel.py. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a Transformers folder")
    parser.add_argument("blocks", type=Path, help=".npy (samples, seqlen) token ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--ext", action="store_true")
    parser.add_argument("--iters", type=int, help="steps per block, instead of its 200 or 1000")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np

    blocks = np.load(arguments.blocks).astype(np.int64)
    seconds = quantize(arguments, blocks)
    print(json.dumps({"peer": "AutoRound", "samples": len(blocks), "seqlen": blocks.shape[1], **seconds}))


def quantize(arguments: argparse.Namespace, blocks: Any) -> dict[str, float]:
    """Load and quantise, save; the seconds of each."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float16)
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(arguments.model),
        scheme="W4A16",
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=not arguments.asym,
        dataset=[torch.from_numpy(row)[None] for row in blocks],
        nsamples=len(blocks),
        seqlen=blocks.shape[1],
        iters=arguments.iters or (1000 if arguments.best else 200),
        device_map=arguments.device,
        enable_torch_compile=not arguments.eager,
        enable_alg_ext=arguments.ext,
    )
    began = time.perf_counter()
    rounder.quantize()
    middle = time.perf_counter()
    rounder.save_quantized(str(arguments.out), format="auto_gptq")
    return {"quantize_s": round(middle - began, 1), "save_s": round(time.perf_counter() - middle, 1)}


if __name__ == "__main__":
    main()
