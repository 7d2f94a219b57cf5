"""The same job by AutoRound 0.16 (rounding learnt block by block with signed gradients): seconds, and a folder.

Runs in an environment of its own, imports nothing of quantmill; benchmarks/peer_gptqmodel.py says how such an
environment is made, auto-round==0.16.0 and py-cpuinfo==9.0.0 go into it with --no-deps.

    .venv-peer/bin/python benchmarks/peer_autoround.py MODEL BLOCKS.npy --out FOLDER [--best] [--ext]

Its defaults, or with --best its own best settings (1000 steps instead of 200), or with --ext its experimental
second algorithm, meant for few bits. BLOCKS as in peer_gptqmodel.py. The last line is JSON and names the steps
that the blocks got. With --deadline FILE, once that file is there and holds a time (seconds since 1970), the
blocks that are left share what time is left: fewer steps than asked for, if need be.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

LEAST_STEPS = 20


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
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which it leaves off")
    parser.add_argument("--deadline", type=Path)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np

    blocks = np.load(arguments.blocks).astype(np.int64)
    found = quantize(arguments, blocks)
    print(json.dumps({"peer": "AutoRound", "samples": len(blocks), "seqlen": blocks.shape[1], **found}))


def quantize(arguments: argparse.Namespace, blocks: Any) -> dict[str, Any]:
    """Load and quantise, save; the seconds of each, and runs of (steps, blocks)."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spare_collecting()
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
        enable_torch_compile=arguments.compile,
        enable_alg_ext=arguments.ext,
    )
    steps = watch_time(arguments.deadline, model.config.num_hidden_layers)
    began = time.perf_counter()
    rounder.quantize()
    middle = time.perf_counter()
    rounder.save_quantized(str(arguments.out), format="auto_gptq")
    runs = [[n, len(list(same))] for n, same in itertools.groupby(steps)]
    return {
        "quantize_s": round(middle - began, 1),
        "save_s": round(time.perf_counter() - middle, 1),
        "steps": runs,
    }


def spare_collecting() -> None:
    """Leave out its garbage collections, some six for a block, which change no result.

    Each walks all objects of all libraries, which for a small model takes longer than the tuning does.
    """
    from auto_round.utils.device_manager import ClearMemory

    gc.freeze()
    ClearMemory.__call__ = lambda *_, **__: None


def watch_time(deadline: Path | None, count: int) -> list[int]:
    """A list that gets the steps of every block as it is begun; fewer than asked for where time is short.

    The first block begun after the deadline is known shows the pace.
    """
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    usual = SignRoundQuantizer.quantize_block
    steps: list[int] = []
    pace: list[float] = []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked, hurried = self.iters, deadline is not None and deadline.exists()
        if pace and deadline is not None:
            left = float(deadline.read_text()) - time.time()
            asked = min(asked, max(LEAST_STEPS, int(left / (count - len(steps)) / min(pace[-3:]))))
        usual_steps = self.iters
        self.iters = self._config.iters = asked  # its learning rates follow: 1 / steps
        steps.append(asked)
        began = time.perf_counter()
        try:
            return usual(self, *args, **kwargs)
        finally:
            took = time.perf_counter() - began
            self.iters = self._config.iters = usual_steps
            if hurried:
                pace.append(took / asked)
            print(f"block {len(steps)} of {count}: {asked} steps in {took:.1f} s", flush=True)

    SignRoundQuantizer.quantize_block = timed
    return steps


if __name__ == "__main__":
    main()
