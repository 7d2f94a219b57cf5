"""Several processes quantising one model over gloo: equal to one within a bound, resumable, told of a loss."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize.test_pipeline import job, run, source, tokens
from quantmill.errors import BadRequest
from quantmill.quantize.job import BlockFinished, Job
from quantmill.quantize.pipeline import _refuse_unspread
from quantmill.quantize.ranks import RankLost, Ranks, _told_to_end, join
from quantmill.quantize.solver import split_rows
from quantmill.quantize.spread import _within, joined
from quantmill.types import IntLinear, QuantConfig, Variant

TESTS = Path(__file__).parents[1]
FOUR = QuantConfig(bits=4, group_size=32)
OTHERS = (Variant("awq", FOUR, "awq"), Variant("Q4_0", FOUR, "gguf:Q4_0"))
VARIANTS = {
    "fast": (Variant("four", FOUR), Variant("eight", QuantConfig(bits=8, group_size=32)), OTHERS[1]),
    "best": (Variant("three", QuantConfig(bits=3, group_size=32)),),
    "fast, others": OTHERS[:1],
    "best, others": OTHERS,
}
# Sums in another order turn a choice between two scales that are nearly as good, and all that comes after it.
TURNS = ("best, others", "awq")
RUN = """
import json, sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from quantize.test_ranks import task
from quantmill.errors import UserError
from quantmill.quantize import pipeline
def told(event):
    print(type(event).__name__, flush=True)
    time.sleep({pause})
try:
    done = pipeline.quantize(task(Path({src!r}), Path({out!r}), {preset!r}), told)
    print(json.dumps([[f.branch, [m.loss for m in f.modules]] for f in done]))
except UserError as e:
    sys.exit(f"{{type(e).__name__}}: {{e}}")
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def task(src: Path, out: Path, preset: str = "fast") -> Job:
    """Twenty rows: one process holds the last two out under preset best, and two processes one each."""
    made = job(src, out, preset=preset.partition(",")[0], resume=True)
    return dataclasses.replace(made, variants=VARIANTS[preset], calibration=tokens(20))


def start(
    count: int, src: Path, out: Path, preset: str = "fast", pause: float = 0.0
) -> list[subprocess.Popen[str]]:
    """As torchrun starts them."""
    code = RUN.format(tests=str(TESTS), src=str(src), out=str(out), preset=preset, pause=pause)
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"}
        for r in range(count)
    ]
    return [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for env in ranks
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    results = [p.communicate(timeout=900) for p in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, results, strict=True)]


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] * ("others" in name)) for name in VARIANTS]
)
def test_two_ranks_make_what_one_makes(preset: str, tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    (code, said, err), (other, silent, _) = ends(start(2, src, tmp_path / "two", preset))
    assert code == other == 0, err
    alone, _ = run(task(src, tmp_path / "one", preset))
    for f, (branch, losses) in zip(alone, json.loads(said.splitlines()[-1]), strict=True):
        assert f.branch == branch
        own = [m.loss for m in f.modules]
        if (preset, branch) == TURNS:
            losses, own = [sum(losses)], [sum(own)]
        assert losses == pytest.approx(own, rel=0.1 if len(own) == 1 else 0.02)
    first = f"{alone[0].branch}/model.safetensors"
    mine, theirs = load_file(tmp_path / "two" / first), load_file(tmp_path / "one" / first)
    assert mine.keys() == theirs.keys()
    for part in ("q_proj.scales", "q_proj.qweight"):
        part = next(n for n in mine if n.endswith(f"layers.0.self_attn.{part}"))
        same = (mine[part] == theirs[part]).float().mean()
        assert same > 0.9  # sums in another order turn a rounding here and there
    assert silent.splitlines()[:-1] == [], "events go to rank 0 alone"


def test_a_dead_rank_ends_the_run_and_another_number_of_ranks_resumes_it(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    processes = start(2, src, out, pause=0.3)
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line.startswith("BlockFinished"):
            break
    os.kill(processes[1].pid, signal.SIGKILL)
    (code, _, err), _ = ends(processes)
    assert code == 1
    assert "RankLost: rank 0 of 2 lost the others" in err
    assert "--resume" in err
    done, events = run(task(src, out))
    resumed = [e.resumed for e in events if isinstance(e, BlockFinished)]
    assert resumed.count(True) == 1, "the first block of the first variant"
    assert len(resumed) == 6
    assert [len(f.modules) for f in done] == [14] * 3
    assert not (out / ".quantmill-work").exists()


def test_shares_cover_everything_once() -> None:
    for size in (1, 2, 3):
        ranks = [Ranks(r, size) for r in range(size)]
        rows = [i for r in ranks for i in range(10)[r.rows(10)]]
        assert rows == list(range(10))
        assert sorted(i for r in ranks for i in r.mine(range(7))) == list(range(7))


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join("cpu")
    assert alone == Ranks(0, 1)
    assert alone.first
    x = torch.ones(3, 2)
    assert alone.gather_rows(x, 3) is x
    assert alone.add_up(x, 5) == 5
    alone.refuse_unless_alike("a", "tokens")


def test_unlike_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "agreed", lambda self, value: "what rank 0 was given")
    with pytest.raises(BadRequest, match="rank 1 has other tokens than rank 0"):
        Ranks(1, 2).refuse_unless_alike("mine", "tokens")


def test_torchrun_ends_the_first_rank_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends SIGTERM to the others when a rank has died."""
    answers: list[object] = []
    monkeypatch.setattr(signal, "signal", lambda number, answer: answers.append(answer))
    with pytest.raises(RankLost, match=r"another rank has died: start again.*--resume"):
        _told_to_end(signal.SIGTERM, None)
    assert answers == [signal.SIG_IGN], "a second one does not interrupt the ending"


def test_rows_of_a_share_are_counted_by_module() -> None:
    for counts, size in (([4, 2, 2], 2), ([1, 9], 4), ([5], 3)):
        shares = [_within(counts, Ranks(r, size).rows(sum(counts))) for r in range(size)]
        assert [sum(column) for column in zip(*shares, strict=True)] == counts
    assert _within([4, 2, 2], slice(4, 8)) == [0, 2, 2]
    whole = IntLinear(*(torch.arange(24).view(6, 4) for _ in range(3)), g_idx=torch.zeros(4))
    parts = split_rows(whole, [4, 0, 2])
    assert torch.equal(joined(parts).codes, whole.codes)


def test_what_several_processes_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "agreed", lambda self, value: value)
    asked, three = task(tmp_path, tmp_path, "best"), Ranks(1, 3)
    _refuse_unspread(asked, asked.variants, three)
    with pytest.raises(BadRequest, match="train in one process"):
        _refuse_unspread(dataclasses.replace(asked, distill=True), asked.variants, three)
    few = dataclasses.replace(asked, calibration=tokens(2))
    with pytest.raises(BadRequest, match="3 processes have 2 rows of tokens: raise --samples"):
        _refuse_unspread(few, few.variants, three)
