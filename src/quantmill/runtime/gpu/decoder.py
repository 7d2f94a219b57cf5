"""The fused decoder as a `Runtime`: pieces of token ids in, logits on the GPU out. Knows no text and no sampling.

Pieces of a few tokens are decoded row by row, whole steps as CUDA graphs; a row's bits depend on its sequence
alone. Longer pieces (prompts) pass one by one, so that theirs do, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.errors import BadRequest
from quantmill.runtime.cpu.settings import Settings, read_settings
from quantmill.runtime.gpu.batches import fast_batches
from quantmill.runtime.gpu.checking import prepared
from quantmill.runtime.gpu.layers import Model, logits_of
from quantmill.runtime.gpu.memory import DTYPES, cache_bytes, make_caches, pages_for
from quantmill.runtime.gpu.pieces import AT_ONCE, Pieces
from quantmill.runtime.gpu.sharing import joined, with_common_shrinks
from quantmill.runtime.gpu.steps import MOST_ROWS, Steps
from quantmill.runtime.gpu.stream import stream
from quantmill.runtime.gpu.tensors import Heads
from quantmill.runtime.gpu.trial import try_kernels
from quantmill.runtime.gpu.weights import Weights, read_weights
from quantmill.runtime.interface import PAGE, Floats, Piece, RuntimeFacts
from quantmill.runtime.parallel.part import part_for
from quantmill.runtime.sampling import SamplerState
from quantmill.runtime.tokenizer import end_tokens

if TYPE_CHECKING:
    from quantmill.runtime.parallel.team import Team

SHORT = 16  # tokens of a piece that is decoded row by row
CONTEXT = 32768  # positions where nothing else is asked for and the model can


class GpuRuntime:
    """A quantised model on one GPU. Use `from_folder`. Not for use from several threads at once."""

    def __init__(self, model: Model, facts: RuntimeFacts) -> None:
        self._model, self._facts = model, facts
        self._device = model.weights.embedding.device
        self._lines = -(-facts.context // PAGE)  # pages of one sequence
        self._steps = Steps(model, self._lines)
        self._pieces = Pieces(model, self._steps, self._lines)

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        device: str | torch.device = "cuda",
        dtype: torch.dtype | None = None,
        kv_tokens: int | None = None,
        kv_dtype: str = "fp16",
        context: int | None = None,
        selftest: bool = True,
        fused: bool = True,
        team: Team | None = None,
    ) -> GpuRuntime:
        """Open a model folder on a GPU.

        dtype: of activations, float16 or bfloat16; None: what config.json says. kv_tokens: positions the cache
        holds, all sequences together; None: four contexts, or what fits. kv_dtype: "fp16" (as the
        activations) or "fp8". context: positions of a sequence; None: the model's, at most 32768. selftest:
        compare every kernel with its twin and every module with the reference first. fused: decode up to 16
        rows with five kernels a layer, where they agree with eight (docs/gpu.md). team: the ranks that
        share the model, each opening its part; not with fused. Raises BadCheckpoint, UnsupportedModel, BadRequest.
        """
        checkpoint = part_for(open_checkpoint(Path(folder)), team)
        settings = read_settings(checkpoint.config)
        place = torch.device(device)
        dtype = dtype or _dtype_of(checkpoint)
        if dtype not in DTYPES:
            raise BadRequest(f"activations are {dtype}; the GPU decoder takes float16 or bfloat16")
        length = min(settings.positions, CONTEXT) if context is None else context
        with torch.inference_mode():
            weights = with_common_shrinks(read_weights(checkpoint, settings, place, dtype, selftest), team)
            heads = _heads(settings, weights, length, place)
            pages = pages_for(settings, length, kv_tokens, kv_dtype, dtype, place)
            pages = pages if team is None else team.least(pages)
            caches = make_caches(settings, pages, kv_dtype, dtype, place)
            by_torch = place.type != "cuda" or selftest
            model = Model(weights, heads, caches, settings.epsilon, dtype, torch_prompts=by_torch)
            if selftest and place.type == "cuda":
                try_kernels(heads[0], dtype, kv_dtype == "fp8")
            model = joined(prepared(model, fused and team is None), team)
            if place.type == "cuda":
                torch.cuda.empty_cache()  # what repacking and tests took
            facts = _facts(checkpoint, settings, weights, length, pages, cache_bytes(caches) // pages, dtype)
            return cls(model, facts)

    @property
    def facts(self) -> RuntimeFacts:
        return self._facts

    @property
    def model(self) -> Model:
        return self._model

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """See `Runtime.forward`; logits float32 on the GPU."""
        with torch.inference_mode():
            found = self._pass(pieces, logits=True)
            return found[0] if len(found) == 1 else torch.cat(found)

    def hidden(self, pieces: Sequence[Piece]) -> Floats:
        """See `Runtime.hidden`; one row per token."""
        with torch.inference_mode():
            found = self._pass([Piece(p.tokens, p.start, p.pages, True) for p in pieces], logits=False)
            states: Floats = torch.cat(found).float().cpu().numpy()
            return states

    def stream(
        self, pieces: Sequence[Piece], states: Sequence[SamplerState], most: int
    ) -> Iterator[list[int]]:
        """Read prompts and yield the next token of each, `most` times; no step waits for the host.

        Every token is drawn on the GPU and read here one step late. pieces: whole prompts, with pages for their
        answers. states: as `can_stream` allows; every token is noted in them. Raises BadRequest.
        """
        return stream(self, self._steps, pieces, states, most)

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._steps.close()
        self._pieces.close()
        del self._model, self._steps, self._pieces
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pass(self, pieces: Sequence[Piece], logits: bool) -> list[Tensor]:
        """Results by piece, or all in one where every piece is short."""
        self._check(pieces)
        short = [p for p in pieces if len(p.tokens) <= SHORT]
        rows = self._short(short, logits) if short else None
        if len(short) == len(pieces) and rows is not None:
            kept = _kept_rows(short, not logits)
            if kept is None:
                return [rows]
            return [rows[torch.tensor(kept).to(rows.device, non_blocking=True)]]  # the host does not wait
        if rows is not None:
            rows = rows.clone()  # graphs share their memory: a prompt's may overwrite it
        results, at = [], 0
        for piece in pieces:
            count = len(piece.tokens)
            if count > SHORT:
                results.append(self._long(piece, logits))
            elif rows is not None:
                results.append(rows[at if piece.every else at + count - 1 : at + count])
                at += count
        return results

    def _short(self, pieces: Sequence[Piece], logits: bool) -> Tensor:
        """One row per token of all pieces, in steps of as many rows as have the same bits (batches.py)."""
        batches: list[list[Piece]] = [[]]
        room = self._steps.at_once
        for piece in pieces:
            if len(piece.tokens) > room:
                batches.append([])
                room = self._steps.at_once
            batches[-1].append(piece)
            room -= len(piece.tokens)
        kept = [self._steps.run(b, logits).clone() for b in batches[:-1]]  # the next step overwrites it
        last = self._steps.run(batches[-1], logits)
        return torch.cat([*kept, last]) if kept else last

    def _long(self, piece: Piece, logits: bool) -> Tensor:
        """One prompt -> its logits or states, in passes of AT_ONCE tokens."""
        found = []
        for begin in range(0, len(piece.tokens), AT_ONCE):
            tokens, start = piece.tokens[begin : begin + AT_ONCE], piece.start + begin
            if piece.every:
                states = self._pieces.states(tokens, start, piece.pages)
                found.append(logits_of(self._model, states) if logits else states)
            else:
                found = [self._pieces.newest(tokens, start, piece.pages)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _check(self, pieces: Sequence[Piece]) -> None:
        """Raises BadRequest for what is outside the vocabulary or the context."""
        vocab = self._facts.vocab_size
        if not pieces:
            raise BadRequest("a pass takes at least one piece")
        for piece in pieces:
            count = len(piece.tokens)
            if not count or min(piece.tokens) < 0 or max(piece.tokens) >= vocab:
                raise BadRequest(f"a piece holds at least one token id from 0 to {vocab - 1}")
            end = piece.start + count
            if piece.start < 0 or end > self._facts.context:
                raise BadRequest(
                    f"{end} tokens do not fit the context of {self._facts.context}: shorten the text"
                )
            if piece.pages and max(piece.pages) >= self._facts.pages:
                raise BadRequest(f"page {max(piece.pages)} is asked for, the cache has {self._facts.pages}")
            if len(piece.pages) * PAGE < end:
                raise BadRequest(
                    f"{len(piece.pages)} pages of {PAGE} do not hold {end} tokens: give more pages"
                )


def _kept_rows(pieces: Sequence[Piece], every: bool) -> list[int] | None:
    """Which rows of a short pass are asked for; None: all."""
    kept: list[int] = []
    at = 0
    for piece in pieces:
        count = len(piece.tokens)
        kept += range(at if every or piece.every else at + count - 1, at + count)
        at += count
    return None if len(kept) == at else kept


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return torch.bfloat16 if named == "bfloat16" else torch.float16


def _heads(settings: Settings, weights: Weights, context: int, device: torch.device) -> tuple[Heads, ...]:
    sizes = settings.sizes
    frequencies = torch.from_numpy(settings.inverse_frequencies).to(device)
    angles = torch.arange(context, dtype=torch.float32, device=device)[:, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    return tuple(
        Heads(
            sizes.heads,
            sizes.kv_heads,
            sizes.head_dim,
            settings.epsilon,
            cosines,
            sines,
            block.query_norm,
            block.key_norm,
            settings.windows[i],
        )
        for i, block in enumerate(weights.blocks)
    )


def _facts(
    checkpoint: Checkpoint,
    settings: Settings,
    weights: Weights,
    context: int,
    pages: int,
    bytes_per_page: int,
    dtype: torch.dtype,
) -> RuntimeFacts:
    windows = set(settings.windows)
    window = settings.windows[0] if len(windows) == 1 else 0
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    return RuntimeFacts(
        name=f"{weights.embedding.device.type} {kind}" + (", fast batches" if fast_batches() else ""),
        vocab_size=settings.sizes.vocab,
        hidden_size=settings.sizes.hidden,
        context=context,
        window=window or None,
        pages=pages,
        max_tokens=AT_ONCE,
        max_pieces=MOST_ROWS,
        bytes_per_token=weights.nbytes,
        bytes_per_page=bytes_per_page,
        eos_token_ids=end_tokens(checkpoint.folder),
        by_row=SHORT,
    )
