"""A Transformers model without its weights: embeds tokens, lends one decoder block at a time.

Nothing but the embedding and one block is ever in memory. What Transformers passes to each block (mask,
positions, window) is recorded from its own forward, so every family behaves here as it does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.architectures import architecture_of
from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadCheckpoint


class _Recorded(Exception):
    """Ends the recording forward once the last block has been reached."""


class _Recorder(nn.Module):
    """Takes a block's place and keeps the keyword arguments it is called with."""

    def __init__(self, frames: list[Mapping[str, Any]], total: int) -> None:
        super().__init__()
        self.frames, self.total = frames, total

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # the block's own signature
        self.frames.append(kwargs)
        if len(self.frames) == self.total:
            raise _Recorded
        return hidden_states


class Shell:
    """The skeleton of one source model. Raises BadCheckpoint when a tensor it needs is missing."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        build: Any = AutoModelForCausalLM.from_config  # untyped in Transformers
        self.checkpoint, self.device = checkpoint, device
        self.architecture = architecture_of(checkpoint.config)
        config = AutoConfig.from_pretrained(checkpoint.folder)
        config.quantization_config = None
        with torch.device("meta"):
            model = build(config, attn_implementation="sdpa", dtype=torch.float32)
        self.base = model.base_model.eval()
        self.base.rotary_emb = type(self.base.rotary_emb)(config=self.base.config).to(device)
        self.blocks = self.base.layers
        self._frames: dict[tuple[int, int], list[Mapping[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, hidden) float32."""
        weight = self._tensor("model.embed_tokens.weight")
        return nn.functional.embedding(ids, weight).float().to(self.device)

    def frames(self, hidden: Tensor, block: int) -> Mapping[str, Any]:
        """What Transformers would pass to block number `block` beside hidden states (B, L, hidden)."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._frames:
            self._frames[shape] = self._record(hidden)
        return self._frames[shape][block]

    def _record(self, hidden: Tensor) -> list[Mapping[str, Any]]:
        frames: list[Mapping[str, Any]] = []
        self.base.layers = nn.ModuleList(_Recorder(frames, len(self.blocks)) for _ in self.blocks)
        try:
            self.base(inputs_embeds=hidden, use_cache=False)
        except _Recorded:
            return frames
        finally:
            self.base.layers = self.blocks
        raise RuntimeError("the model's forward never reached its last block")

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its float32 weights on the device."""
        block: nn.Module = self.blocks[index]
        prefix = f"{self.architecture.blocks_prefix}.{index}."
        weights = {name: self._tensor(prefix + name).float().to(self.device) for name in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        block.requires_grad_(False)
        return block

    def drop_block(self, index: int) -> None:
        """Give block `index`'s memory back."""
        self.blocks[index] = self.blocks[index].to("meta")

    def _tensor(self, name: str) -> Tensor:
        if name not in self.checkpoint.tensors:
            raise BadCheckpoint(
                f"{self.checkpoint.folder.name}: tensor {name} is missing: fetch the source model again"
            )
        return self.checkpoint.load(name)
