"""A model on a processor behind the runtime's interface: one compiled step for all pieces of a pass.

Weights are mapped from the packed file (store.py), the cache is paged (cache.py), activations go through one
record of addresses (records.py). Knows no text and no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantmill.checkpoint import open_checkpoint
from quantmill.errors import BadRequest
from quantmill.kernels.cpu.isa import Isa, choose
from quantmill.kernels.cpu.layout import DENSE, FIELD_PRECISION, FIELD_ZERO, CpuLinear, Precision
from quantmill.kernels.cpu.linear import bind, room
from quantmill.kernels.cpu.pool import default_threads, shared_pool
from quantmill.runtime.cpu.attention import OUTPUT, ROW
from quantmill.runtime.cpu.batch import TILE, Batch, Limits, padded
from quantmill.runtime.cpu.cache import page_bytes, page_count, paged_cache
from quantmill.runtime.cpu.records import Layer, Step, Ticket
from quantmill.runtime.cpu.repack import HEAD_BITS
from quantmill.runtime.cpu.settings import Settings, read_settings
from quantmill.runtime.cpu.step import step_function
from quantmill.runtime.cpu.store import Store, packed_store
from quantmill.runtime.interface import PAGE, Piece, RuntimeFacts
from quantmill.runtime.parallel.part import part_for
from quantmill.runtime.tokenizer import end_tokens

if TYPE_CHECKING:
    from quantmill.runtime.parallel.team import Team

MAX_TOKENS = 256  # in a pass
MAX_PIECES = 64
CONTEXT = 32768  # positions a sequence may have where nothing else is asked for and the model can
Floats = NDArray[np.float32]


class CpuRuntime:
    """`Runtime` (interface.py) on a processor. Use `from_folder`."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        threads: int | None = None,
        precision: Precision = Precision.INT16,
        context: int | None = None,
        kv_tokens: int | None = None,
        isa: Isa | None = None,
        ends: tuple[int, ...] = (),
        team: Team | None = None,
    ) -> None:
        self.settings, self._store, self._team = settings, store, team
        self.precision, self.isa = precision, isa or choose()
        self._pool = shared_pool(threads or default_threads())
        self._half = self.isa.half_loads and precision != Precision.EXACT
        self.facts = self._facts(context, kv_tokens, ends)
        sizes = settings.sizes
        self._batch = Batch(self._limits(), self._pool.threads)
        self._function = step_function(sizes.head_dim, self._half, self._batch.tile)
        self._kept: list[Any] = []  # what the records point at
        self._cache = paged_cache(sizes, self.facts.pages, self._half)
        self._hidden: Floats = np.zeros((MAX_TOKENS, sizes.hidden), np.float32)
        self._logits: Floats = np.zeros((1, padded(sizes.vocab)), np.float32)
        self._tickets = np.zeros((sizes.layers + 1) * Ticket.BYTES // 8, np.int64)
        self._layers = np.stack([self._layer(i) for i in range(sizes.layers)])
        self._record = self._step_record()

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        threads: int | None = None,
        exact: bool = False,
        context: int | None = None,
        kv_tokens: int | None = None,
        precision: Precision | None = None,
        head_bits: int | None = None,
        isa: str | None = None,
        cache: Path | None = None,
        team: Team | None = None,
    ) -> CpuRuntime:
        """Open a model folder; packs it for the CPU the first time and maps that file ever after.

        threads: one per physical core by default. exact: fp32 activations and cache, instead of 15-bit
        activations, a 16-bit cache and an 8-bit head; precision: another one for the activations (INT8
        reads prompts faster and costs a few thousandths of a nat a token). context: positions a sequence
        may have (None: the model's, at most 32768). kv_tokens: positions that the cache holds, all sequences
        together (None: by the free memory). head_bits: 8 or 16 for a head that is not quantised. team: the
        ranks that share the model, each opening its part. Raises BadCheckpoint, UnsupportedModel, BadRequest.
        """
        if head_bits not in (None, 8, DENSE):
            raise BadRequest(f"head bits is {head_bits}; an output head is kept in 8 or 16 bits")
        checkpoint = part_for(open_checkpoint(Path(folder)), team)
        settings = read_settings(checkpoint.config)
        precision = precision or (Precision.EXACT if exact else Precision.INT16)
        bits = head_bits or (DENSE if precision == Precision.EXACT else 8)
        return cls(
            settings,
            packed_store(checkpoint, {HEAD_BITS: bits} | _of_team(team), cache),
            threads=threads,
            precision=precision,
            context=context,
            kv_tokens=kv_tokens,
            isa=choose(isa),
            ends=end_tokens(Path(folder)),
            team=team,
        )

    def forward(self, pieces: Sequence[Piece]) -> Floats:
        """Logits (rows, vocab) float32, valid until the next call; see interface.py."""
        tokens = self._batch.fill(pieces, self._record)
        rows = int(self._record[Step.HEAD_ROWS])
        if rows > len(self._logits):
            self._logits = np.zeros((rows, self._logits.shape[1]), np.float32)
        self._record[Step.FINAL_AT] = 0
        self._run(tokens)
        return self._logits[:rows, : self.facts.vocab_size]

    def hidden(self, pieces: Sequence[Piece]) -> Floats:
        """Final hidden states (tokens of all pieces, hidden_size) float32 after the last norm."""
        tokens = self._batch.fill(pieces, self._record)
        final: Floats = np.empty((len(tokens), self.facts.hidden_size), np.float32)
        self._record[Step.HEAD_ROWS] = 0
        self._record[Step.FINAL_AT], self._record[Step.FINAL_STRIDE] = final.ctypes.data, final.strides[0]
        self._run(tokens)
        return final

    def close(self) -> None:
        """Give the cache and the mapped file back; the runtime is of no use after that."""
        self.__dict__.clear()

    def _run(self, tokens: NDArray[np.int64]) -> None:
        record = self._record
        self._hidden[: len(tokens)] = self._embed(tokens)
        record[Step.LOGITS_AT], record[Step.LOGITS_STRIDE] = self._logits.ctypes.data, self._logits.strides[0]
        self._tickets.fill(0)
        parts = 2 * self.settings.sizes.layers
        if self._team is None:
            self._run_parts(0, parts + 1)
            return
        import torch

        hidden = torch.from_numpy(self._hidden[: len(tokens)])
        for part in range(parts):
            self._run_parts(part, part + 1)
            self._team.add_up(hidden)
        self._run_parts(parts, parts + 1)

    def _run_parts(self, first: int, last: int) -> None:
        self._record[Step.FIRST_PART], self._record[Step.LAST_PART] = first, last
        self._pool.run(self._function.address, self._record.ctypes.data)

    def _embed(self, tokens: NDArray[np.int64]) -> Floats:
        rows = self._store.arrays["embedding"][tokens]
        if rows.dtype == np.int16:  # the bits of bfloat16
            return (rows.astype(np.int32) << 16).view(np.float32)
        return rows.astype(np.float32)

    def _facts(self, context: int | None, kv_tokens: int | None, ends: tuple[int, ...]) -> RuntimeFacts:
        settings, sizes = self.settings, self.settings.sizes
        if context is not None and not 1 <= context <= settings.positions:
            raise BadRequest(f"context is {context}; this model reads 1 to {settings.positions} positions")
        per_page = page_bytes(sizes, self._half)
        positions = context or min(settings.positions, CONTEXT)
        pages = page_count(kv_tokens, positions, per_page * (self._team.size if self._team else 1))
        pages = self._team.least(pages) if self._team else pages
        windows = settings.windows
        window = max(windows) if min(windows) else None
        if window is None:
            positions = min(positions, pages * PAGE)  # what one sequence alone could have
        name = "cpu exact" if self.precision == Precision.EXACT else f"cpu {self.precision.name.lower()}"
        return RuntimeFacts(
            name=name,
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            context=positions,
            window=window,
            pages=pages,
            max_tokens=MAX_TOKENS,
            max_pieces=MAX_PIECES,
            bytes_per_token=sum(linear.nbytes for linear in self._store.linears.values()),
            bytes_per_page=per_page,
            eos_token_ids=ends,
        )

    def _limits(self) -> Limits:
        facts, sizes = self.facts, self.settings.sizes
        heads = sizes.heads, sizes.kv_heads, sizes.head_dim
        return Limits(
            MAX_TOKENS, MAX_PIECES, facts.context, facts.pages, sizes.vocab, *heads, window=facts.window
        )

    def _keep(self, array: NDArray[Any]) -> int:
        """Address of an array, which lives as long as the runtime."""
        self._kept.append(array)
        return int(array.ctypes.data)

    def _bound(self, linear: CpuLinear) -> NDArray[np.int64]:
        return bind(linear, self.isa, self.precision)

    def _layer(self, i: int) -> NDArray[np.int64]:
        record, linears, arrays = np.zeros(Layer.FIELDS, np.int64), self._store.linears, self._store.arrays
        norms = {"attention_norm": Layer.ATTENTION_NORM, "mlp_norm": Layer.MLP_NORM}
        norms |= {"query_norm": Layer.QUERY_NORM, "key_norm": Layer.KEY_NORM}
        for name, field in norms.items():
            if f"{i}.{name}" in arrays:
                record[field] = arrays[f"{i}.{name}"].ctypes.data
        self._set_inputs(record, i)
        gate, up = linears[f"{i}.gate"], linears[f"{i}.up"]
        bound = self._bound(gate), self._bound(up)
        record[Layer.GATE], record[Layer.UP] = (self._keep(b) for b in bound)
        record[Layer.UP_FRESH] = not _same_input((gate, bound[0]), (up, bound[1]))
        record[Layer.OUTPUT] = self._keep(self._bound(linears[f"{i}.o"]))
        record[Layer.DOWN] = self._keep(self._bound(linears[f"{i}.down"]))
        record[Layer.KEYS_AT] = self._cache.keys[i].ctypes.data
        record[Layer.VALUES_AT] = self._cache.values[i].ctypes.data
        record[Layer.WINDOW] = self.settings.windows[i]
        return record

    def _set_inputs(self, record: NDArray[np.int64], i: int) -> None:
        linears, sizes = self._store.linears, self.settings.sizes
        names = ["qkv"] if f"{i}.qkv" in linears else ["q", "k", "v"]
        width = 4 * sizes.head_dim
        offsets = (0, sizes.heads * width, (sizes.heads + sizes.kv_heads) * width)
        before: tuple[CpuLinear, NDArray[np.int64]] | None = None
        record[Layer.INPUTS] = len(names)
        for place, name in enumerate(names):
            linear = linears[f"{i}.{name}"]
            bound = self._bound(linear)
            record[Layer.INPUT + place] = self._keep(bound)
            record[Layer.INPUT_OFFSET + place] = offsets[place]
            record[Layer.INPUT_FRESH + place] = before is None or not _same_input(before, (linear, bound))
            before = linear, bound

    def _buffer(self, rows: int, columns: int) -> tuple[int, int]:
        """Address and stride of a new (rows, columns) float32 buffer, columns filled up to whole blocks."""
        array = np.zeros((rows, padded(columns)), np.float32)
        return self._keep(array), array.strides[0]

    def _step_record(self) -> NDArray[np.int64]:
        settings, sizes, threads = self.settings, self.settings.sizes, self._pool.threads
        record = np.zeros(Step.FIELDS, np.int64)
        record[Step.LAYERS], record[Step.LAYERS_AT] = sizes.layers, self._layers.ctypes.data
        record[Step.HEADS], record[Step.KV_HEADS] = sizes.heads, sizes.kv_heads
        record[Step.HIDDEN] = sizes.hidden
        scale = 1 / np.sqrt(sizes.head_dim)
        record[Step.CONSTANTS_AT] = self._keep(np.array([settings.epsilon, scale], np.float32))
        record[Step.HIDDEN_AT] = self._hidden.ctypes.data
        record[Step.HIDDEN_STRIDE] = self._hidden.strides[0]
        self._set_residual(record)
        query_width = sizes.heads * sizes.head_dim
        every = query_width + 2 * sizes.kv_heads * sizes.head_dim
        record[Step.QKV_AT], record[Step.QKV_STRIDE] = self._buffer(MAX_TOKENS, every)
        record[Step.MIXED_AT], record[Step.MIXED_STRIDE] = self._buffer(MAX_TOKENS, query_width)
        record[Step.GATE_AT], record[Step.GATE_STRIDE] = self._buffer(MAX_TOKENS, sizes.intermediate)
        record[Step.UP_AT], _ = self._buffer(MAX_TOKENS, sizes.intermediate)
        record[Step.NORMED_AT], record[Step.NORMED_STRIDE] = self._buffer(threads, sizes.hidden)
        record[Step.TICKETS_AT] = self._tickets.ctypes.data
        record[Step.NORM_AT] = self._store.arrays["norm"].ctypes.data
        record[Step.HEAD] = self._keep(self._bound(self._store.linears["head"]))
        self._set_angles(record)
        self._set_scratch(record)
        return record

    def _set_residual(self, record: NDArray[np.int64]) -> None:
        """Of several ranks the first adds to the residual, the others to zeros: their sum is the new residual."""
        if self._team is None or self._team.first:
            record[Step.ADDED_TO_AT] = record[Step.HIDDEN_AT]
            record[Step.ADDED_TO_STRIDE] = record[Step.HIDDEN_STRIDE]
        else:
            record[Step.ADDED_TO_AT], _ = self._buffer(1, self.settings.sizes.hidden)

    def _set_angles(self, record: NDArray[np.int64]) -> None:
        positions = np.arange(self.facts.context, dtype=np.float32)
        angles = positions[:, None] * self.settings.inverse_frequencies
        scale = np.float32(self.settings.rotary_scale)
        record[Step.COSINES_AT] = self._keep(np.cos(angles) * scale)
        record[Step.SINES_AT] = self._keep(np.sin(angles) * scale)

    def _set_scratch(self, record: NDArray[np.int64]) -> None:
        sizes, threads, batch = self.settings.sizes, self._pool.threads, self._batch
        record[Step.ROWS_AT], record[Step.PIECES_AT] = batch.rows.ctypes.data, batch.pieces.ctypes.data
        record[Step.HEAD_ROWS_AT] = batch.head_rows.ctypes.data
        record[Step.PAGE_STRIDE] = self._cache.page_stride
        record[Step.HEAD_STRIDE] = self._cache.head_stride
        slices = max(linear.slices for linear in self._store.linears.values())
        size = room(slices, MAX_TOKENS, threads)
        record[Step.AREAS_AT], record[Step.AREA_SIZE] = self._keep(np.zeros(3 * size, np.uint8)), size
        record[Step.TOTALS_AT], _ = self._buffer(threads * 2 * TILE, OUTPUT + sizes.head_dim)
        record[Step.TABLES_AT] = self._keep(np.zeros(threads * TILE * ROW, np.int64))


def _of_team(team: Team | None) -> dict[str, int]:
    """What tells a rank's packed weights from those of others."""
    return {} if team is None else {"rank": team.rank, "ranks": team.size}


def _same_input(a: tuple[CpuLinear, NDArray[np.int64]], b: tuple[CpuLinear, NDArray[np.int64]]) -> bool:
    """Whether what is prepared for one linear serves the other."""
    if any(a[1][field] != b[1][field] for field in (FIELD_PRECISION, FIELD_ZERO)):
        return False
    if a[0].columns is None or b[0].columns is None:
        return a[0].columns is b[0].columns and a[0].slices == b[0].slices
    return bool(np.array_equal(a[0].columns, b[0].columns))
