"""What the leading quantiser of today, GPTQModel 7.7.0, takes for the same job: seconds, and a folder.

Runs in an environment of its own and imports nothing of quantmill: GPTQModel asks for a newer torch, which it
does without on a CPU, and for build tools that only its GPU kernels use. That environment (two minutes):

    python3 -m venv .venv-peer
    .venv-peer/bin/pip install torch==2.13.0
    .venv-peer/bin/pip install --no-deps gptqmodel==7.7.0
    .venv-peer/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 \
        pyarrow==26.0.1 dill==0.4.1 numpy==2.4.6 safetensors==0.8.0 tokenicer==0.0.14 pypcre==0.6.4 \
        logbar==0.4.15 device-smi==0.5.7 defuser==0.0.28 threadpoolctl==3.8.0 protobuf==7.36.2 \
        pillow==13.0.0 ninja==1.13.2

BLOCKS is a .npy file (samples, seqlen) of int64 token ids, the very ones that quantmill calibrated on:

    .venv-peer/bin/python benchmarks/peer_gptqmodel.py MODEL BLOCKS.npy --out FOLDER [--group-size 64]

The time that counts is that of `quantize()`; loading and saving stand beside it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    arguments = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on 2 cores is 1, which it refuses
    import numpy as np
    import torch

    torch.set_num_threads(arguments.threads)
    blocks = np.load(arguments.blocks)
    if arguments.samples:
        blocks = blocks[: arguments.samples]
    seconds = quantize(arguments, blocks)
    print(json.dumps({"peer": "GPTQModel", "samples": len(blocks), "seqlen": blocks.shape[1], **seconds}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a Transformers folder")
    parser.add_argument("blocks", type=Path, help=".npy (samples, seqlen) int64")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--damp", type=float, default=0.1)
    parser.add_argument("--gar", action="store_true", help="group-aware order instead of act order")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument(
        "--mse", type=float, default=0.0, help="power of its grid search; 0: none, its default"
    )
    parser.add_argument("--gptaq", type=float, help="strength of its correction for earlier layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, help="only the first so many blocks")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def quantize(arguments: argparse.Namespace, blocks: Any) -> dict[str, float]:
    """Load, quantise, save; the seconds of each."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    config = QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        desc_act=not arguments.gar,
        act_group_aware=arguments.gar,
        sym=not arguments.asym,
        damp_percent=arguments.damp,
        mse=arguments.mse,
        gptaq=None if arguments.gptaq is None else GPTAQConfig(alpha=arguments.gptaq),
        offload_to_disk=False,
    )
    times = [time.perf_counter()]
    model = GPTQModel.load(str(arguments.model), config, device=arguments.device, backend=BACKEND.AUTO)
    times.append(time.perf_counter())
    ones = [1] * blocks.shape[1]
    model.quantize([{"input_ids": ids.tolist(), "attention_mask": ones} for ids in blocks], batch_size=1)
    times.append(time.perf_counter())
    model.save(str(arguments.out))
    times.append(time.perf_counter())
    names = ("load_s", "quantize_s", "save_s")
    return {name: round(end - begin, 1) for name, begin, end in zip(names, times, times[1:], strict=False)}


if __name__ == "__main__":
    main()
