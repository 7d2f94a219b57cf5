"""Ranks on GPUs of their own, through NCCL: the same tokens as one GPU, and an end where one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from gptq_models import write_quantized
from quantmill.runtime.interface import Piece
from quantmill.runtime.opening import open_runtime
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs: tools/several_gpus.sh runs it where there are", allow_module_level=True)

OPTIONS = {"device": "cuda", "context": 256, "kv_tokens": 1024}
WAITING = """
import sys
from pathlib import Path
from quantmill.runtime.interface import Piece
from quantmill.runtime.opening import open_runtime
runtime = open_runtime(Path(sys.argv[1]), device="cuda", context=256, kv_tokens=1024, tensor_parallel=2)
print(runtime._workers._processes[0].pid, flush=True)
for i in range(10**9):
    runtime.forward([Piece([5], i % 200, (0, 1, 2, 3))])
"""


def greedy(folder, ranks: int) -> list[list[int]]:
    """Prompts through long and short passes, then steps: graphs of 4 and of 1 rows."""
    runtime = open_runtime(folder, tensor_parallel=ranks, **OPTIONS)
    g = torch.Generator().manual_seed(2)
    told = [torch.randint(2, 320, (n,), generator=g).tolist() for n in (3, 20, 70, 9)]
    pages = [tuple(range(4 * i, 4 * i + 4)) for i in range(4)]
    starts = [0] * 4
    for step in range(24):
        lines = range(4) if step < 16 else range(1)
        pieces = [Piece(told[i][starts[i] :], starts[i], pages[i]) for i in lines]
        tokens = runtime.forward(pieces).argmax(-1).tolist()
        for i, token in zip(lines, tokens, strict=True):
            starts[i] = len(told[i])
            told[i].append(token)
    runtime.close()
    return told


@pytest.mark.parametrize("shuffled", [False, True])
def test_two_gpus_say_what_one_says(shuffled, tmp_path):
    order = ActOrder.GROUPED if shuffled else ActOrder.STATIC
    config = QuantConfig(bits=4, group_size=32, act_order=order)
    write_quantized(tmp_path, tiny_model("llama"), config, shuffled=shuffled)
    assert greedy(tmp_path, 2) == greedy(tmp_path, 1)


def test_a_rank_that_dies_ends_the_program(tmp_path):
    """NCCL would wait for it for ever."""
    write_quantized(tmp_path, tiny_model("llama"), QuantConfig(bits=4, group_size=32))
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.kill(int(process.stdout.readline()), signal.SIGKILL)
        _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "rank 1 of 2 was killed by signal 9" in err
