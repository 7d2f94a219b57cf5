"""`eval` on several ranks over gloo: one report, the same as of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantmill.commands.measuring import Protocol, _joined, _refuse_unspread, measure
from quantmill.console import Console
from quantmill.errors import BadRequest
from quantmill.evaluate import Distance, Scores
from quantmill.quantize.ranks import Ranks

TEXT = "the cat sat on a mat and saw 12 dogs run past the old house by the river\n" * 40


def test_scores_come_back_in_the_order_of_the_windows() -> None:
    whole = np.arange(35.0).reshape(7, 5)
    for ranks in (1, 2, 3):
        parts = [whole[r::ranks] for r in range(ranks)]
        found = _joined([{"m": Scores(p, Distance(p, p + 1, p + 2, p + 3))} for p in parts])["m"]
        assert np.array_equal(found.nll, whole)
        assert found.distance is not None
        assert np.array_equal(found.distance.delta_p, whole + 3)
        assert _joined([{"m": Scores(p)} for p in parts])["m"].distance is None


def test_a_rank_without_a_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "agreed", lambda self, value: value)
    with pytest.raises(BadRequest, match="2 windows cannot be spread over 3 ranks: use --windows 3"):
        _refuse_unspread(torch.zeros(2, 8, dtype=torch.int64), Protocol("t", 8, 2), Ranks(0, 3))


def test_two_ranks_report_what_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["eval", tiny_llama, "--against", tiny_llama, "--text", text, "--ctx", "32", "--windows", "5"]
    command = [sys.executable, "-m", "quantmill", *map(str, words), "--device", "cpu", "--json"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    (said, err), (silent, _) = (p.communicate(timeout=900) for p in ranks)
    assert [p.returncode for p in ranks] == [0, 0], err
    assert silent == ""
    protocol = Protocol(str(text), 32, 5, "cpu", 1, save=False)
    alone = measure({"m": str(tiny_llama)}, str(tiny_llama), protocol, Console())["m"]
    for name, value in dataclasses.asdict(alone).items():
        found = json.loads(said).get(name)
        wanted = list(value) if isinstance(value, tuple) else value
        assert found == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-9, abs=1e-12)), (
            name
        )
