"""Any model that Transformers knows behind the runtime's interface: slow, and right.

Keys and values lie in our pages; for every piece they are gathered into a Transformers cache, and what the
model adds to it is written back. Pieces go through the model one after another, so other sequences in a pass
change nothing; how a sequence is cut into pieces may change last bits, which the name says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantmill.errors import BadRequest, UnsupportedModel
from quantmill.kernels.backend import free_bytes
from quantmill.runtime.interface import PAGE, Piece, RuntimeFacts
from quantmill.runtime.linear import prepare_linears
from quantmill.runtime.load import load_model
from quantmill.runtime.tokenizer import end_tokens

CONTEXT = 32768  # positions a sequence may have where nothing else is asked for and the model can
MAX_TOKENS, MAX_PIECES = 512, 64
SHARE, SEQUENCES = 4, 8  # a quarter of the free memory for the cache, and no more than eight full sequences


class ReferenceRuntime:
    """`Runtime` (interface.py) over a Transformers model. Use `from_folder`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        context: int | None = None,
        kv_tokens: int | None = None,
        ends: tuple[int, ...] = (),
    ) -> None:
        """Raises UnsupportedModel for a model whose cache is not keys and values of every position."""
        self.model = model
        probe = self._probe()
        self._keys = [torch.empty(0)] * len(probe)
        self._values = [torch.empty(0)] * len(probe)
        self.facts = self._facts(probe, context, kv_tokens, ends)
        for i, (key, value) in enumerate(probe):
            self._keys[i] = key.new_zeros((self.facts.pages, PAGE, key.shape[1], key.shape[3]))
            self._values[i] = value.new_zeros((self.facts.pages, PAGE, value.shape[1], value.shape[3]))

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        device: str = "auto",
        exact: bool = False,
        threads: int | None = None,
        context: int | None = None,
        kv_tokens: int | None = None,
    ) -> ReferenceRuntime:
        """Open any folder that `load_model` opens; its errors, and UnsupportedModel.

        exact: float32, and on a CPU the kernels that round no activation.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        model = load_model(Path(folder), device=device, dtype="float32" if exact else "auto")
        if exact and model.device.type == "cpu":
            prepare_linears(model, torch.float32, "cpu-exact")
        return cls(model, context=context, kv_tokens=kv_tokens, ends=end_tokens(Path(folder)))

    def forward(self, pieces: Sequence[Piece]) -> Tensor | NDArray[np.float32]:
        """Logits (rows, vocab) float32: numpy on a CPU, a tensor on a GPU."""
        self._check(pieces)
        with torch.inference_mode():
            rows = [self._logits(piece) for piece in pieces]
        logits = torch.cat(rows).float()
        return logits.numpy() if logits.device.type == "cpu" else logits

    def hidden(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """Final hidden states (tokens of all pieces, hidden_size) float32 after the last norm."""
        self._check(pieces)
        with torch.inference_mode():
            rows = [self._run(self.model.base_model, piece).last_hidden_state[0] for piece in pieces]
        states: NDArray[np.float32] = torch.cat(rows).float().cpu().numpy()
        return states

    def close(self) -> None:
        """Give model and cache back; the runtime is of no use after that."""
        self.__dict__.clear()

    def _logits(self, piece: Piece) -> Tensor:
        wanted = len(piece.tokens) if piece.every else 1
        logits: Tensor = self._run(self.model, piece, logits_to_keep=wanted).logits[0]
        return logits[-wanted:]

    def _run(self, module: Any, piece: Piece, **options: int) -> Any:
        cache, size = self._gathered(piece), len(piece.tokens)
        ids = torch.tensor([list(piece.tokens)], device=self.model.device)
        positions = torch.arange(piece.start, piece.start + size, device=self.model.device)[None]
        out = module(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **options)
        self._scatter(piece, cache)
        return out

    def _gathered(self, piece: Piece) -> DynamicCache:
        """What the cache holds of a piece's sequence. Pages let go give zeros, which the window's mask hides."""
        cache = DynamicCache()
        if piece.start == 0:
            return cache
        pages = torch.tensor(piece.pages[: -(-piece.start // PAGE)])
        for i, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            cache.update(_read(keys, pages, piece.start), _read(values, pages, piece.start), i)
        return cache

    def _scatter(self, piece: Piece, cache: DynamicCache) -> None:
        positions = torch.arange(piece.start, piece.start + len(piece.tokens))
        pages = torch.tensor(piece.pages)[positions // PAGE]
        for store, added in zip((self._keys, self._values), zip(*_layers(cache), strict=True), strict=True):
            for target, new in zip(store, added, strict=True):
                fresh = new[0, :, -len(positions) :].transpose(0, 1)
                target[pages.to(target.device), (positions % PAGE).to(target.device)] = fresh

    def _probe(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, heads, 1, size) of one token: what the cache has to hold."""
        cache = DynamicCache()
        with torch.inference_mode():
            self.model(torch.tensor([[0]], device=self.model.device), past_key_values=cache, use_cache=True)
        return _layers(cache)

    def _facts(
        self,
        probe: list[tuple[Tensor, Tensor]],
        context: int | None,
        kv_tokens: int | None,
        ends: tuple[int, ...],
    ) -> RuntimeFacts:
        config, device = self.model.config, self.model.device
        limit = int(getattr(config, "max_position_embeddings", CONTEXT))
        if context is not None and not 1 <= context <= limit:
            raise BadRequest(f"context is {context}; this model reads 1 to {limit} positions")
        positions = context or min(limit, CONTEXT)
        per_page = PAGE * sum(k.nbytes + v.nbytes for k, v in probe)
        if kv_tokens is None:
            fit = free_bytes(device) // SHARE // per_page
            pages = max(1, min(fit, SEQUENCES * -(-positions // PAGE)))
        else:
            pages = max(1, -(-kv_tokens // PAGE))
        kind = str(self.model.dtype).removeprefix("torch.")
        return RuntimeFacts(
            name=f"reference {device.type} {kind} (last bits depend on the pieces)",
            vocab_size=int(config.vocab_size),
            hidden_size=int(config.hidden_size),
            context=min(positions, pages * PAGE),
            window=None,
            pages=pages,
            max_tokens=MAX_TOKENS,
            max_pieces=MAX_PIECES,
            bytes_per_token=self._bytes_per_token(),
            bytes_per_page=per_page,
            eos_token_ids=ends,
            by_row=1,
        )

    def _bytes_per_token(self) -> int:
        """All weights but a table of embeddings that is no output head as well."""
        table: Any = self.model.get_input_embeddings().weight
        tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        weights = [*self.model.parameters(), *self.model.buffers()]
        return sum(int(w.nbytes) for w in weights) - (0 if tied else int(table.nbytes))

    def _check(self, pieces: Sequence[Piece]) -> None:
        facts = self.facts
        total = sum(len(piece.tokens) for piece in pieces)
        if not pieces or not all(len(piece.tokens) for piece in pieces):
            raise BadRequest("a pass needs at least one piece, a piece at least one token")
        if len(pieces) > facts.max_pieces or total > facts.max_tokens:
            raise BadRequest(
                f"{len(pieces)} pieces with {total} tokens; a pass takes {facts.max_pieces} with {facts.max_tokens}"
            )
        for piece in pieces:
            end = piece.start + len(piece.tokens)
            if piece.start < 0 or end > facts.context:
                raise BadRequest(f"{end} tokens do not fit the context of {facts.context}: shorten the text")
            if min(piece.tokens) < 0 or max(piece.tokens) >= facts.vocab_size:
                raise BadRequest(f"token ids are to be numbers from 0 to {facts.vocab_size - 1}")
            held = piece.pages[: -(-end // PAGE)]
            if len(held) * PAGE < end or not all(0 <= page < facts.pages for page in held):
                raise BadRequest(f"positions 0 to {end - 1} lie on pages that are not held")


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, (1, heads, positions, size)."""
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            raise UnsupportedModel("this model's cache is not keys and values of every position")
        layers.append((keys, values))
    return layers


def _read(store: Tensor, pages: Tensor, count: int) -> Tensor:
    """The first `count` positions of a sequence -> (1, heads, count, size)."""
    found = store[pages.to(store.device)]
    return found.flatten(0, 1)[:count].transpose(0, 1)[None]
