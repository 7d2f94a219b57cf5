"""Sums over ranks on a processor, ranks as threads; those on GPUs are in tests/runtime/gpu/test_sharing.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmill.runtime.parallel import team as teams
from quantmill.runtime.parallel.sums import ROOM, OneShot
from quantmill.runtime.parallel.team import Team

CPU = torch.device("cpu")


def by_all(folder: Path, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every rank's sum of all parts."""

    def run(rank: int) -> torch.Tensor:
        team = Team(folder, rank, len(parts), CPU, nccl=False)
        assert not team.captured
        assert team.first == (rank == 0)
        assert team.least(7 - rank) == 7 - len(parts) + 1
        assert team.total([1.0, float(rank)]) == [len(parts), sum(range(len(parts)))]
        box = parts[rank].clone()
        found = team.add_up(box)
        assert found is box, "on a processor in its place"
        return found

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_same_bits_wherever_an_element_stands(size: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(size)
    column = [torch.randn(1, generator=generator) for _ in range(size)]
    others = [torch.randn(1, 40, generator=generator) for _ in range(size)]
    parts = [torch.cat([o, c.expand(3, 40)]) for o, c in zip(others, column, strict=True)]
    found = by_all(tmp_path, parts)
    assert all(torch.equal(found[0], f) for f in found[1:])
    wanted = sum(p.double() for p in parts)
    assert torch.allclose(found[0].double(), wanted, atol=1e-6)
    assert len(found[0][1:].unique()) == 1, "the same numbers add up to the same bits in every place"


@pytest.mark.parametrize(
    ("count", "fits"), [(4096, True), (ROOM // 4, True), (ROOM // 4 + 4, False), (6, False)]
)
def test_one_shot_takes_what_fits_and_is_aligned(count: int, fits: bool) -> None:
    one_shot = object.__new__(OneShot)
    part: Any = SimpleNamespace(numel=lambda: count, device=torch.device("cuda"))
    assert one_shot.takes(part) is fits
    assert not one_shot.takes(torch.empty(4096)), "a processor's are added up there"


def test_memory_is_shared_by_all_ranks_or_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where one rank cannot, the others must not wait for it in a sum."""

    def opened(store: Any, name: str, rank: int, size: int, device: torch.device) -> str:
        if name == "one cannot" and rank == 1:
            raise RuntimeError("no peer access")
        return name

    monkeypatch.setattr(teams, "OneShot", opened)

    def run(rank: int) -> list[Any]:
        team = Team(tmp_path, rank, 2, CPU, nccl=False)
        team._prefer_memory(None, "one cannot")
        team._prefer_memory(None, "all can")
        return [way for way in team._ways if isinstance(way, str)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [["all can"]] * 2
    assert "one-shot is left out, memory cannot be shared here: no peer access" in caplog.text
