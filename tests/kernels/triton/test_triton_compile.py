"""Every kernel compiles for every kind of GPU it is meant for, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Shared memory that one program may take, in bytes, by compute capability.
LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
def test_compiles(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, str(capability), str(LIMITS[capability])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    shared = json.loads(run.stdout)
    assert len(shared) == (49 if capability == 90 else 39)
    assert max(shared.values()) <= LIMITS[capability]
