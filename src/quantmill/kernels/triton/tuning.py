"""How a product is cut up for a GPU: from a table of measurements, else by rule. Knows no kernel's insides.

Measured cuts lie in `<device>.json`, one file a GPU: those that come with the package in cuts/, over them those
that `remember` wrote on this machine. A rule of thumb serves where nothing was measured. The number of parts
belongs to the linear alone, never to the rows of x, because it decides what is added to what.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantmill.errors import BadCheckpoint
from quantmill.files import cache_root, read_json, write_json
from quantmill.kernels.triton.packing import TiledLinear, TileShape
from quantmill.types import Json

ROWS_OF_X = (16, 32, 64, 128)  # rows of x that one program may take
MOST_ROWS = 128  # above them a dense copy for the call's duration and the vendor's product are used
MOST_ROWS_ORDERED = 8  # the same where x is read through an order, element by element


@dataclass(frozen=True, slots=True)
class Cut:
    """One program's share: rows of weights (divides 128) and parts of K; how it reads."""

    rows: int
    parts: int
    warps: int
    stages: int  # tiles in shared memory
    ahead: int = 2  # tiles asked for while the kernel before still runs; a power of two


def block_of(rows_of_x: int) -> int:
    """Rows of x that one program takes where a call brings so many."""
    return next((b for b in ROWS_OF_X if rows_of_x <= b), ROWS_OF_X[-1])


def most_rows(linear: TiledLinear) -> int:
    """The most rows of x that are multiplied straight from the codes."""
    return MOST_ROWS if linear.order is None else min(MOST_ROWS, MOST_ROWS_ORDERED)


def cut_for(linear: TiledLinear, rows_of_x: int) -> Cut:
    """The measured cut for this GPU, else the rule's."""
    block = block_of(rows_of_x)
    device = linear.words.device
    entry = measured(linear)
    if entry is not None and str(block) in entry["cuts"]:
        rows, warps, stages, ahead = entry["cuts"][str(block)]
        return Cut(rows, entry["parts"], warps, stages, ahead)
    parts = rule_parts(linear, processors(device)) if entry is None else entry["parts"]
    return fitted(rule_cut(block, parts), block, linear.shape, shared_memory(device))


def measured(linear: TiledLinear) -> Json | None:
    """What the table holds for linears of this shape: {"parts": p, "cuts": {rows of x: [...]}}."""
    entry: Json | None = _table(device_name(linear.words.device)).get(key_of(linear))
    return entry


def shared_bytes(cut: Cut, block: int, shape: TileShape) -> int:
    """Shared memory that the tiles and inputs read ahead take, about."""
    return cut.stages * shape.places * 2 * (cut.rows * shape.words + block * shape.planes)


def fitted(cut: Cut, block: int, shape: TileShape, limit: int) -> Cut:
    """The cut with as many tiles read ahead, and then rows, as `limit` bytes of shared memory hold."""
    while cut.stages > 2 and shared_bytes(cut, block, shape) > limit:
        cut = replace(cut, stages=cut.stages - 1)
    while cut.rows > 32 and shared_bytes(cut, block, shape) > limit:
        cut = replace(cut, rows=cut.rows // 2)
    return cut


def rule_cut(block: int, parts: int) -> Cut:
    """What was seldom far from the best on an H200."""
    rows, warps, stages = {16: (64, 4, 4), 32: (64, 4, 4), 64: (64, 4, 3), 128: (128, 8, 3)}[block]
    return Cut(rows, parts, warps, stages)


def rule_parts(linear: TiledLinear, multiprocessors: int) -> int:
    """Parts of K: a power of two that gives every multiprocessor about three programs of 64 rows."""
    parts = 1
    while parts * linear.rows // 64 < 2.8 * multiprocessors and linear.tiles >= 4 * parts:
        parts *= 2
    return parts


def key_of(linear: TiledLinear) -> str:
    """What decides a cut: the linear's shape, not its numbers."""
    kind = "".join(c for c, here in (("z", linear.zeros), ("o", linear.order)) if here is not None)
    shape = linear.shape
    return f"{shape.bits}b-{shape.group}g{kind}-{linear.in_features}x{linear.out_features}"


def processors(device: torch.device) -> int:
    """Multiprocessors; 1 where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take, less some for conversions of layout."""
    if device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 48 << 10)) - 4096


def device_name(device: torch.device) -> str:
    """A file name's worth of the GPU's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_path(name: str) -> Path:
    """Where cuts measured on this machine are kept."""
    return cache_root() / "tuning" / f"{name}.json"


def remember(name: str, key: str, parts: int, cuts: dict[int, Cut]) -> None:
    """Keep what was measured: cuts by block of rows of x."""
    path = table_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"parts": parts, "cuts": {str(b): [c.rows, c.warps, c.stages, c.ahead] for b, c in cuts.items()}}
    write_json(path, {**_table(name), key: entry})
    _table.cache_clear()


@functools.cache
def _table(name: str) -> Json:
    """Cuts that come with the package, and over them those measured on this machine."""
    shipped = Path(__file__).with_name("cuts") / f"{name}.json"
    table = read_json(shipped) if shipped.is_file() else {}
    own = table_path(name)
    try:
        return {**table, **read_json(own)} if own.is_file() else table
    except BadCheckpoint:  # a cache: what cannot be read is measured again
        return table
