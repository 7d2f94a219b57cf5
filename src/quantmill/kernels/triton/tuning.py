"""How a product is cut up for a GPU: from a table of measurements, else by rule. Knows no kernel's insides.

Measured cuts lie in `<device>.json`, one file a GPU: those that come with the package in cuts/, over them those
that `remember` wrote on this machine. A rule of thumb serves where nothing was measured. The number of slices of K
belongs to the linear alone, never to the rows of x, because it decides what is added to what.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quantmill.errors import BadCheckpoint
from quantmill.files import cache_root, read_json, write_json
from quantmill.kernels.triton.packing import TILE, TiledLinear
from quantmill.types import Json

# Most rows of x for which one cut of the kernel for few rows is used; the last serves any number.
ROWS_OF_X = (2, 8, 16, 32)
MOST_FEW = 128  # up to so many rows go there, and a row's bits do not depend on how many
MOST_COUNTED = 256  # rows that it can take at once
# so many rows, 32 unless set, or `all`; above, the kernel for many rows goes first
SAME_BITS = "QUANTMILL_SAME_BITS"
EVERYWHERE = "all"
SIMPLE = -1  # WideCut.stay: by the kernel in parts.py, the faster one where a program takes all of K
MOST_STAGED = 64 << 10  # bytes of x in shared memory, by rule: fits every GPU
# entries of the kernel for many rows
WIDE_ROWS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
MOST_WIDE = {2: 4096, 3: 4096, 4: 4096, 8: 512}  # by bits: rows that it takes where nothing was measured
MOST_SHARED = 1024  # tiles that several programs share
SIMPLE_SHAPES = (
    (64, 2, 2),
    (128, 2, 2),
    (256, 4, 3),
)  # rows of x, pieces, unfinished products: what won on an H200
STEP, TURN = 64, 256  # columns that it takes at once, and that it has asked for


@dataclass(frozen=True, slots=True)
class Cut:
    """One program's share, and how early it reads."""

    rows: int  # of x: a multiple of 8
    slices: int  # of K, a warp each: a power of two
    parts: int  # of K: the slices are in so many groups; a power of two
    beside: int  # warps that share a slice of x
    tiles: int  # of 16 rows, of every warp
    ahead: int  # units asked for before they are needed
    inputs_ahead: int  # the same of blocks of 32 inputs
    split: bool  # a program takes one part of K, not all
    staged: bool  # x waits in shared memory
    in_turn: bool = False  # a warp takes all slices of its program, one after the other
    stay: int = (
        0  # programs of a multiprocessor that stay and take one block of rows after the other; 0: none do
    )


@dataclass(frozen=True, slots=True)
class WideCut:
    """The same for the kernel for many rows."""

    rows: int  # of x: 16, 32 ... 256
    warps: int  # 4, 8 or 16
    tiles: int  # of 16 rows, of every warp
    parts: int  # of K: a program takes one part of one tile; 1 where programs stay
    stay: int = 0  # programs of a multiprocessor that stay and share all tiles equally; 0: none do; or SIMPLE
    pieces: int = 4  # of a block of columns, multiplied one after the other
    open: int = 3  # products that may be unfinished while the next weights are made


@dataclass(frozen=True, slots=True)
class Shares:
    """How a launch of the kernel for many rows is shared out."""

    programs: int
    tiles: int  # blocks of rows of weights times blocks of rows of x
    shared: int  # of them: by several programs


@functools.cache
def same_bits_up_to() -> int:
    """Rows of x up to which the kernel for few rows is used although that for many is there, which is faster.

    32, or what $QUANTMILL_SAME_BITS says: a row has the same bits alone and in any batch of so many.
    """
    if same_bits_everywhere():
        return sys.maxsize
    asked = os.environ.get(SAME_BITS, "")
    return int(asked) if asked.isdigit() else 32


@functools.cache
def same_bits_everywhere() -> bool:
    """Whether $QUANTMILL_SAME_BITS is `all`: no product of a row depends on what comes with it, prompts neither."""
    return os.environ.get(SAME_BITS) == EVERYWHERE


def block_of(rows_of_x: int) -> int:
    """The entry of ROWS_OF_X for so many rows."""
    return next((b for b in ROWS_OF_X if rows_of_x <= b), ROWS_OF_X[-1])


def cut_for(linear: TiledLinear, rows_of_x: int) -> Cut:
    """The measured cut for this GPU, else the rule's."""
    block = block_of(rows_of_x)
    entry = measured(linear)
    if entry is not None and str(block) in entry["cuts"]:
        return Cut(max(8, block), entry["slices"], entry["parts"], *entry["cuts"][str(block)])
    slices, parts = (entry["slices"], entry["parts"]) if entry else rule_slices(linear)
    return rule_cut(linear, block, slices, parts)


def wide_cut(linear: TiledLinear, rows_of_x: int) -> WideCut | None:
    """The measured cut of the kernel for many rows, else the rule's; None: a dense copy is faster, or must be.

    Where this kind of linear was not measured, another of the same shape will do: bits change the cut little.
    """
    if not wide_takes(linear):
        return None
    block = str(next((b for b in WIDE_ROWS if rows_of_x <= b), WIDE_ROWS[-1]))
    own = (measured(linear) or {}).get("wide", {})
    if block not in own:
        if rows_of_x > MOST_WIDE[linear.shape.bits]:
            return None
        own = _same_shape(linear)
    if block not in own:
        return rule_wide(linear, rows_of_x)
    return None if own[block] is None else WideCut(*own[block])


def _same_shape(linear: TiledLinear) -> Json:
    """The cuts of the kernel for many rows that were measured for a linear of other bits or groups."""
    table, end = _table(device_name(linear.words.device)), _end_of_key(linear)
    return next((e["wide"] for key, e in table.items() if key.endswith(end) and "wide" in e), {})


def wide_takes(linear: TiledLinear) -> bool:
    """Whether the kernel for many rows can be used: not for groups of 16, which it does not know.

    Nor where rows of the result do not begin at 16 bytes, as the copy engine wants them.
    """
    return not linear.shape.narrow and linear.out_features % 8 == 0


def shares(linear: TiledLinear, rows_of_x: int, cut: WideCut) -> Shares:
    """Programs and tiles. Programs that stay share what is no whole round of them, and one round more."""
    tiles = linear.rows // (TILE * cut.warps * cut.tiles) * -(-rows_of_x // cut.rows)
    if cut.stay <= 0:
        return Shares(tiles * cut.parts, tiles, tiles if cut.parts > 1 else 0)
    turns = tiles * -(-linear.columns // TURN)
    programs = min(processors(linear.words.device) * cut.stay, turns)
    rest = tiles % programs
    return Shares(programs, tiles, 0 if rest == 0 else min(tiles, rest + programs))


def measured(linear: TiledLinear) -> Json | None:
    """What the table holds for linears of this shape.

    {"slices": s, "parts": p, "cuts": {rows of x: the rest of a Cut}, "wide": {rows of x: a WideCut, null: dense}}.
    """
    entry: Json | None = _table(device_name(linear.words.device)).get(key_of(linear))
    return entry


def rule_cut(linear: TiledLinear, block: int, slices: int, parts: int) -> Cut:
    """What was seldom far from the best on an H200."""
    rows, words = max(8, block), linear.shape.words
    if block <= ROWS_OF_X[0] or parts == 1:
        tiles = 1 if block <= ROWS_OF_X[0] else 2
        ahead, inputs = max(1, 8 // (tiles * words)), 4 if rows <= 16 else 1
        return Cut(rows, slices, parts, 1, tiles, ahead, inputs, False, False)
    of_part = -(-linear.columns // parts)
    staged = (1 << (of_part - 1).bit_length()) * 2 * rows <= MOST_STAGED
    return Cut(rows, slices, parts, 4, 2, max(1, 4 // words), 1, True, staged, True)


def rule_slices(linear: TiledLinear) -> tuple[int, int]:
    """Slices of K and the parts that they make up: powers of two, no slice shorter than two units."""
    slices = 16 if linear.columns > 8192 else 8
    while slices > 1 and linear.units < 2 * slices:
        slices //= 2
    return slices, slices


def rule_wide(linear: TiledLinear, rows_of_x: int) -> WideCut:
    """A cut that gives every multiprocessor a program, where K can be split so far. Its shapes ran on an H200."""
    rows = next((b for b in (64, 128) if rows_of_x <= b), 256)
    blocks, busy = -(-rows_of_x // rows), processors(linear.words.device)
    turns = linear.rows // (TILE * 8) * blocks
    parts, longest = 1, -(-linear.columns // TURN)
    while parts < 8 and 2 * parts <= longest and turns * parts * 2 <= busy * 1.1:
        parts *= 2
    return WideCut(rows, 8, 1, parts) if parts > 1 else simple_wide(rows_of_x)


def simple_wide(rows_of_x: int) -> WideCut:
    """The cut of the kernel in parts.py that takes all of K."""
    rows, pieces, unfinished = next((b for b in SIMPLE_SHAPES if rows_of_x <= b[0]), SIMPLE_SHAPES[-1])
    return WideCut(rows, 8, 1, 1, SIMPLE, pieces, unfinished)


def key_of(linear: TiledLinear) -> str:
    """What decides a cut: the linear's shape, not its numbers."""
    shape = linear.shape
    zeros = "" if linear.zeros is None else "z"
    group = -1 if linear.groups == 1 else shape.group
    return f"{shape.bits}b-{group}g{zeros}{_end_of_key(linear)}"


def _end_of_key(linear: TiledLinear) -> str:
    return f"-{linear.columns}x{linear.out_features}"


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
    return cache_root() / "cuts" / f"{name}.json"


def remember(
    name: str, key: str, cuts: Mapping[int, Cut], wide: Mapping[int, WideCut | None] | None = None
) -> None:
    """Keep what was measured, by entry of ROWS_OF_X and of WIDE_ROWS. All cuts have the same slices and parts."""
    path = table_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    one = next(iter(cuts.values()))
    lists = {str(b): list(dataclasses.astuple(c))[3:] for b, c in cuts.items()}
    entry: Json = {"slices": one.slices, "parts": one.parts, "cuts": lists}
    if wide is not None:
        entry["wide"] = {str(b): None if c is None else list(dataclasses.astuple(c)) for b, c in wide.items()}
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
