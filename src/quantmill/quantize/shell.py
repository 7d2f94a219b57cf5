"""A Transformers model without its weights: embeds tokens, lends one decoder block at a time.

Nothing but the embedding and one block is ever in memory. What Transformers passes to each block (mask,
positions, window) is recorded from its own forward, so every family behaves here as it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.architectures import architecture_of, dimensions
from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadCheckpoint
from quantmill.quantize.arithmetic import matmul_dtype


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


def attention_for(device: torch.device) -> str:
    """Transformers' name of the attention to run: its own, on a GPU with 16-bit factors."""
    dtype = matmul_dtype(device)
    if device.type == "cpu" or dtype.itemsize != 2:
        return "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, q.to(dtype), k.to(dtype), v.to(dtype), mask, **kwargs)

    name = "quantmill_16_bit"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


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
            model = build(config, attn_implementation=attention_for(device), dtype=torch.float32)
        self.base = model.base_model.eval()
        self.base.rotary_emb = type(self.base.rotary_emb)(config=self.base.config).to(device)
        self.blocks = self.base.layers
        self._ahead = _Ahead(self._read_pinned, len(self.blocks)) if device.type == "cuda" else None
        self._embedding: Tensor | None = None
        self._scale = self.architecture.embedding_scale(dimensions(checkpoint.config))
        self._frames: dict[tuple[int, int], list[Mapping[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, hidden) float32."""
        if self._embedding is None:
            self._embedding = self._tensor("model.embed_tokens.weight").to(self.device)
        found = nn.functional.embedding(ids.to(self.device), self._embedding).float()
        return found * self._scale if self._scale != 1 else found

    def frames(self, hidden: Tensor, block: int) -> Mapping[str, Any]:
        """What Transformers would pass to block number `block` beside hidden states (B, L, hidden)."""
        return self.frames_for((hidden.shape[0], hidden.shape[1]), block)

    def frames_for(self, shape: tuple[int, int], block: int) -> Mapping[str, Any]:
        """The same for hidden states of B rows and L tokens; their values do not matter."""
        if shape not in self._frames:
            hidden = torch.zeros(1, 1, self.base.config.hidden_size, device=self.device)
            self._frames[shape] = self._record(hidden.expand(*shape, -1))
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
        """Block `index` on the device: float32, but matrices as they are stored if that is a GPU.

        A GPU's next block is read beside the work on this one.
        """
        self._embedding = None  # tokens come before blocks
        block: nn.Module = self.blocks[index]
        tensors = self._ahead.take(index) if self._ahead else self._read(index)
        weights = {name: self._on_device(tensor) for name, tensor in tensors.items()}
        block.load_state_dict(weights, assign=True)
        block.requires_grad_(False)
        return block

    def _read(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.architecture.blocks_prefix}.{index}."
        return {name: self._tensor(prefix + name) for name in self.blocks[index].state_dict()}

    def _read_pinned(self, index: int) -> dict[str, Tensor]:
        """A block in pinned memory; files are opened and closed, so that no page of them stays mapped."""
        prefix = f"{self.architecture.blocks_prefix}.{index}."
        files = Checkpoint(self.checkpoint.folder, self.checkpoint.config, None, self.checkpoint.tensors)
        names = list(self.blocks[index].state_dict())
        return {name: _tensor(files, prefix + name).pin_memory() for name in names}

    def drop_block(self, index: int) -> None:
        """Give block `index`'s memory back."""
        self.blocks[index] = self.blocks[index].to("meta")

    def _on_device(self, tensor: Tensor) -> Tensor:
        """Float32, but for matrices on a GPU: those stay as they are stored until they are solved."""
        moved = tensor.to(self.device, non_blocking=True)
        return moved if tensor.dim() == 2 and self.device.type == "cuda" else moved.float()

    def _tensor(self, name: str) -> Tensor:
        return _tensor(self.checkpoint, name)


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    if name not in checkpoint.tensors:
        raise BadCheckpoint(
            f"{checkpoint.folder.name}: tensor {name} is missing: fetch the source model again"
        )
    return checkpoint.load(name)


class _Ahead:
    """Reads the block after the one that was taken, in a thread of its own."""

    def __init__(self, read: Callable[[int], dict[str, Tensor]], count: int) -> None:
        self.read, self.count = read, count
        # a thread begins with the first GPU, whichever this process has taken
        self.pool = ThreadPoolExecutor(
            1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)
        )
        self.coming: dict[int, Future[dict[str, Tensor]]] = {}

    def take(self, index: int) -> dict[str, Tensor]:
        """Block `index`; the next one is asked for."""
        now = self.coming.pop(index, None) or self.pool.submit(self.read, index)
        tensors = now.result()
        if index + 1 < self.count:
            self.coming[index + 1] = self.pool.submit(self.read, index + 1)
        return tensors
