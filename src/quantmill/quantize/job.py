"""What a quantising run is asked to do, what it tells while it runs, and what it ends with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantmill.types import CalibrationSet, ModuleReport, QuantConfig, Variant

# An 8-bit grid loses so little that more rows cannot be told apart from noise (benchmarks/eight_bit_rows.py).
ROWS_SHARE = {2: 1.0, 3: 1.0, 4: 1.0, 8: 0.125}


def rows_share(config: QuantConfig) -> float:
    """Share of the calibration rows that a variant is calibrated on."""
    return ROWS_SHARE[config.bits]


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides the bytes that come out, and where they go."""

    source: Path
    source_name: str  # what the user typed
    out: Path
    variants: tuple[Variant, ...]
    calibration: CalibrationSet
    preset: str = "fast"
    tune_blocks: bool = False  # with preset best: scales and norms by gradient on every block's output
    distill: bool = False  # with preset best: scales and norms by gradient on the original's logits
    device: str = "cpu"
    resume: bool = False
    command: str = ""
    max_vram: int | None = None  # bytes of GPU memory that may be taken; None: what is free
    max_ram: int | None = None  # bytes of host memory, likewise


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Sent once: how much there is to do."""

    blocks: int
    modules: int  # per block
    branches: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleSolved:
    """Sent after every linear."""

    branch: str
    report: ModuleReport


@dataclass(frozen=True, slots=True)
class BlockFinished:
    """Sent after every block of every variant."""

    branch: str
    index: int
    resumed: bool  # an earlier run had solved it


@dataclass(frozen=True, slots=True)
class Finished:
    """One variant, complete on disk."""

    branch: str
    folder: Path
    size_bytes: int  # of the weight files
    modules: tuple[ModuleReport, ...]
    seconds: float

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Modules that are not what was asked for, each with the reason."""
        return tuple(f"{m.name}: {m.fallback}" for m in self.modules if m.fallback)


Event = RunStarted | ModuleSolved | BlockFinished | Finished
OnEvent = Callable[[Event], None]
