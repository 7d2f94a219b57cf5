"""Several processes quantising one model over gloo: equal to one within a bound, resumable, told of a loss."""

from __future__ import annotations

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

from quantize.test_pipeline import job, run, source
from quantmill.errors import BadRequest
from quantmill.quantize.ranks import RankLost, Ranks, _told_to_end, join

TESTS = Path(__file__).parents[1]
RUN = """
import json, sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from quantize.test_pipeline import job
from quantmill.errors import UserError
from quantmill.quantize import pipeline
def told(event):
    print(type(event).__name__, flush=True)
    time.sleep({pause})
try:
    done = pipeline.quantize(job(Path({src!r}), Path({out!r}), *{variants!r}, resume=True), told)
    print(json.dumps([[f.branch, [m.loss for m in f.modules]] for f in done]))
except UserError as e:
    sys.exit(f"{{type(e).__name__}}: {{e}}")
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(
    count: int, src: Path, out: Path, *variants: str, pause: float = 0.0
) -> list[subprocess.Popen[str]]:
    """As torchrun starts them."""
    code = RUN.format(tests=str(TESTS), src=str(src), out=str(out), variants=variants, pause=pause)
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
    results = [p.communicate(timeout=300) for p in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, results, strict=True)]


def test_two_ranks_make_what_one_makes(tmp_path: Path) -> None:
    src, variants = source(tmp_path / "src"), ("4bit-32g", "8bit-32g")
    (code, said, err), (other, silent, _) = ends(start(2, src, tmp_path / "two", *variants))
    assert code == other == 0, err
    alone, _ = run(job(src, tmp_path / "one", *variants))
    for f, (branch, losses) in zip(alone, json.loads(said.splitlines()[-1]), strict=True):
        assert f.branch == branch
        assert losses == pytest.approx([m.loss for m in f.modules], rel=0.02)
        mine = load_file(tmp_path / "two" / branch / "model.safetensors")
        theirs = load_file(f.folder / "model.safetensors")
        assert mine.keys() == theirs.keys()
        first = "model.layers.0.self_attn.q_proj."
        assert torch.equal(mine[first + "g_idx"], theirs[first + "g_idx"])
        same = (mine[first + "scales"] == theirs[first + "scales"]).float().mean()
        assert same > 0.95  # sums in another order turn a rounding here and there
    assert silent.splitlines()[:-1] == [], "events go to rank 0 alone"


def test_a_dead_rank_ends_the_run_and_another_number_of_ranks_resumes_it(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    processes = start(2, src, out, "4bit-32g", pause=0.3)
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line.startswith("BlockFinished"):
            break
    os.kill(processes[1].pid, signal.SIGKILL)
    (code, _, err), _ = ends(processes)
    assert code == 1
    assert "RankLost: rank 0 of 2 lost the others" in err
    assert "--resume" in err
    done, events = run(job(src, out, "4bit-32g", resume=True))
    assert [getattr(e, "resumed", None) for e in events if type(e).__name__ == "BlockFinished"] == [
        True,
        False,
    ]
    assert len(done[0].modules) == 14
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
