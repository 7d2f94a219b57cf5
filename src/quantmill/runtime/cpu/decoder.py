"""A decoder on a processor: token ids in, logits out. Builds the records that the compiled step runs on.

Knows no text, no sampling. One sequence at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantmill.checkpoint import open_checkpoint
from quantmill.errors import BadRequest
from quantmill.kernels.cpu.isa import Isa, choose
from quantmill.kernels.cpu.layout import BLOCK, DENSE, FIELD_PRECISION, FIELD_ZERO, CpuLinear, Precision
from quantmill.kernels.cpu.linear import bind, room
from quantmill.kernels.cpu.pool import default_threads, shared_pool
from quantmill.runtime.cpu.attention import CHUNK, OUTPUT, ROW
from quantmill.runtime.cpu.cache import layer_caches
from quantmill.runtime.cpu.repack import HEAD_BITS
from quantmill.runtime.cpu.settings import Settings, read_settings
from quantmill.runtime.cpu.step import TILE, Layer, Step, Ticket, step_function
from quantmill.runtime.cpu.store import Store, packed_store

AT_ONCE = 128  # new positions per step while a prompt is read
CONTEXT = 8192  # positions kept where nothing else is asked for and the model can
Floats = NDArray[np.float32]


class CpuDecoder:
    """One sequence: `prefill` a prompt, then `step` token by token; each gives the next token's logits.

    Use `from_folder`. Not for use from several threads at once.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        threads: int | None,
        precision: Precision,
        context: int | None,
        isa: Isa,
    ) -> None:
        self.settings, self._store = settings, store
        self.precision, self.isa = precision, isa
        sizes = settings.sizes
        self.context = context or min(settings.positions, CONTEXT)
        self.position = 0  # how many tokens have been read
        self._pool = shared_pool(threads or default_threads())
        half = isa.half_loads and precision != Precision.EXACT
        self._function = step_function(sizes.head_dim, half, _decode_tile(sizes.heads // sizes.kv_heads))
        self._kept: list[Any] = []  # what the records point at
        self._caches = layer_caches(settings, self.context, AT_ONCE, half)
        self._hidden: Floats = np.zeros((AT_ONCE, sizes.hidden), np.float32)
        self._tickets = np.zeros((sizes.layers + 1) * Ticket.BYTES // 8, np.int64)
        self._layers = np.stack([self._layer(i) for i in range(sizes.layers)])
        self._record = self._step_record()

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        threads: int | None = None,
        exact: bool = False,
        *,
        precision: Precision | None = None,
        head_bits: int | None = None,
        context: int | None = None,
        isa: str | None = None,
        cache: Path | None = None,
    ) -> CpuDecoder:
        """Open a quantised model folder; packs it for the CPU the first time and maps that file ever after.

        threads: None for one per core. exact: fp32 activations and cache and the head as it is, instead of
        15-bit activations, a 16-bit cache and an 8-bit head; precision: another one for the activations (INT8
        reads prompts faster and costs a few thousandths of a nat a token). head_bits: 8 or 16 for a head that
        is not quantised. context: positions to make room for (None: the model's, at most 8192). Raises
        BadCheckpoint, UnsupportedModel, BadRequest.
        """
        if head_bits not in (None, 8, DENSE):
            raise BadRequest(f"head bits is {head_bits}; an output head is kept in 8 or 16 bits")
        checkpoint = open_checkpoint(Path(folder))
        settings = read_settings(checkpoint.config)
        precision = precision or (Precision.EXACT if exact else Precision.INT16)
        bits = head_bits or (DENSE if precision == Precision.EXACT else 8)
        store = packed_store(checkpoint, {HEAD_BITS: bits}, cache)
        return cls(settings, store, threads=threads, precision=precision, context=context, isa=choose(isa))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a step reads."""
        return sum(linear.nbytes for linear in self._store.linears.values())

    def reset(self, position: int = 0) -> None:
        """Forget all tokens after the first `position`; a layer with a window can only forget everything.

        Raises BadRequest for a position that has not been reached or that a window has lost.
        """
        if not 0 <= position <= self.position:
            raise BadRequest(f"cannot go back to token {position} of {self.position}")
        lost = any(c.capacity < self.context and c.capacity < self.position for c in self._caches)
        if position and lost:
            raise BadRequest(f"a sliding window has forgotten token {position}: reset to 0 and read it again")
        self.position = position

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Read tokens after those read so far -> logits (vocab,) float32 after the last of them."""
        logits: Floats = self._read(ids, every=False)[0]
        return logits

    def step(self, token: int) -> Floats:
        """Read one token -> logits (vocab,) float32 for the next."""
        return self.prefill((token,))

    def score(self, ids: Sequence[int]) -> Floats:
        """Read tokens -> logits (len(ids), vocab) float32, after each of them."""
        return self._read(ids, every=True)

    def _read(self, ids: Sequence[int], every: bool) -> Floats:
        tokens = np.asarray(ids, np.int64)
        vocab = self.settings.sizes.vocab
        if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= vocab:
            raise BadRequest(f"token ids are to be a list of at least one number from 0 to {vocab - 1}")
        if self.position + len(tokens) > self.context:
            needed = self.position + len(tokens)
            raise BadRequest(f"{needed} tokens do not fit the context of {self.context}: shorten the text")
        parts: list[Floats] = []
        for begin in range(0, len(tokens), AT_ONCE):
            part = tokens[begin : begin + AT_ONCE]
            last = begin + len(part) == len(tokens)
            logits = self._run(part, len(part) if every else 1)
            if every or last:
                parts.append(logits)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, tokens: NDArray[np.int64], head_rows: int) -> Floats:
        sizes = self.settings.sizes
        self._hidden[: len(tokens), : sizes.hidden] = self._embed(tokens)
        logits = np.empty((head_rows, -(-sizes.vocab // BLOCK) * BLOCK), np.float32)
        record = self._record
        record[Step.ROWS], record[Step.POSITION] = len(tokens), self.position
        record[Step.HEAD_ROWS], record[Step.LOGITS_AT] = head_rows, logits.ctypes.data
        record[Step.LOGITS_STRIDE] = logits.strides[0]
        self._tickets.fill(0)
        self._pool.run(self._function.address, record.ctypes.data)
        self.position += len(tokens)
        return logits[:, : sizes.vocab]

    def _embed(self, tokens: NDArray[np.int64]) -> Floats:
        rows = self._store.arrays["embedding"][tokens]
        if rows.dtype == np.int16:  # the bits of bfloat16
            return (rows.astype(np.int32) << 16).view(np.float32)
        return rows.astype(np.float32)

    def _keep(self, array: NDArray[Any]) -> int:
        """Address of an array, which lives as long as the decoder."""
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
        cache = self._caches[i]
        record[Layer.KEYS_AT], record[Layer.VALUES_AT] = cache.keys.ctypes.data, cache.values.ctypes.data
        record[Layer.HEAD_STRIDE], record[Layer.CAPACITY] = cache.head_stride, cache.capacity
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
        array = np.zeros((rows, -(-columns // BLOCK) * BLOCK), np.float32)
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
        query_width = sizes.heads * sizes.head_dim
        every = query_width + 2 * sizes.kv_heads * sizes.head_dim
        record[Step.QKV_AT], record[Step.QKV_STRIDE] = self._buffer(AT_ONCE, every)
        record[Step.MIXED_AT], record[Step.MIXED_STRIDE] = self._buffer(AT_ONCE, query_width)
        record[Step.GATE_AT], record[Step.GATE_STRIDE] = self._buffer(AT_ONCE, sizes.intermediate)
        record[Step.UP_AT], _ = self._buffer(AT_ONCE, sizes.intermediate)
        record[Step.NORMED_AT], record[Step.NORMED_STRIDE] = self._buffer(threads, sizes.hidden)
        self._set_angles(record)
        self._set_scratch(record)
        record[Step.TICKETS_AT] = self._tickets.ctypes.data
        record[Step.NORM_AT] = self._store.arrays["norm"].ctypes.data
        record[Step.HEAD] = self._keep(self._bound(self._store.linears["head"]))
        return record

    def _set_angles(self, record: NDArray[np.int64]) -> None:
        positions = np.arange(self.context, dtype=np.float32)
        angles = positions[:, None] * self.settings.inverse_frequencies
        record[Step.COSINES_AT] = self._keep(np.cos(angles))
        record[Step.SINES_AT] = self._keep(np.sin(angles))

    def _set_scratch(self, record: NDArray[np.int64]) -> None:
        sizes, threads = self.settings.sizes, self._pool.threads
        slices = max(linear.slices for linear in self._store.linears.values())
        size = room(slices, AT_ONCE, threads)
        record[Step.AREAS_AT], record[Step.AREA_SIZE] = self._keep(np.zeros(3 * size, np.uint8)), size
        chunks = max(cache.capacity for cache in self._caches) // CHUNK + 1
        parts = max(sizes.heads * chunks, threads * 2 * TILE)
        record[Step.PARTS_AT], _ = self._buffer(parts, OUTPUT + sizes.head_dim)
        record[Step.TABLES_AT] = self._keep(np.zeros(threads * TILE * ROW, np.int64))


def _decode_tile(group: int) -> int:
    """Heads that decode together: the largest divisor of the heads that share keys, at most 8."""
    return max(n for n in range(1, TILE + 1) if group % n == 0)


def _same_input(a: tuple[CpuLinear, NDArray[np.int64]], b: tuple[CpuLinear, NDArray[np.int64]]) -> bool:
    """Whether what is prepared for one linear serves the other."""
    if any(a[1][field] != b[1][field] for field in (FIELD_PRECISION, FIELD_ZERO)):
        return False
    if a[0].columns is None or b[0].columns is None:
        return a[0].columns is b[0].columns and a[0].slices == b[0].slices
    return bool(np.array_equal(a[0].columns, b[0].columns))
