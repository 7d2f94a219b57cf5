"""One rank's share of a model folder, as a Checkpoint: back ends open it like any other.

Its config names the share's heads and channels, its tensors are cut: q, k, v, gate and up by outputs, o and down
by inputs; norms, embedding and head are whole. What o and down give on all ranks has to be added up.

Where down's groups follow an act order (true g_idx), channels are taken in the order of its groups, so that every
group is on one rank, and gate and up give them in that order: nothing is gathered, and no scale held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quantmill.architectures import Dimensions, architecture_of, dimensions
from quantmill.checkpoint import Checkpoint
from quantmill.runtime.parallel.shares import Share, shares_of
from quantmill.types import PackedLinear

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.runtime.parallel.team import Team

DOWN = "mlp.down_proj"


def part_for(checkpoint: Checkpoint, team: Team | None) -> Checkpoint:
    """What this rank of a team opens of a folder: all of it where there is no team."""
    if team is None:
        return checkpoint
    return part_of(checkpoint, shares(checkpoint, team.size)[team.rank])


def shares(checkpoint: Checkpoint, ranks: int) -> tuple[Share, ...]:
    """The shares of a model's ranks, from its headers. Raises BadRequest, UnsupportedModel, BadCheckpoint."""
    architecture = architecture_of(checkpoint.config)
    first = f"{architecture.blocks_prefix}.0.{DOWN}"
    quantised = checkpoint.quant is not None and first in checkpoint.quantized_modules()
    group = checkpoint.module_config(first).group_size if quantised else -1
    return shares_of(dimensions(checkpoint.config), group, ranks)


def part_of(whole: Checkpoint, share: Share) -> PartCheckpoint:
    """What one rank opens of a folder."""
    sizes = dimensions(whole.config)
    count = (b - a for a, b in (share.heads, share.keys, share.channels))
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = whole.config | dict(zip(names, count, strict=True)) | {"head_dim": sizes.head_dim}
    later = () if share.first else tuple(f"{suffix}.bias" for suffix in _INPUTS)  # added once, by the first
    tensors = {n: t for n, t in whole.tensors.items() if not n.endswith(later)}
    return PartCheckpoint(whole.folder, config, whole.quant, tensors, whole=whole, share=share)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCheckpoint(Checkpoint):
    """Use `part_of`. Shapes in `tensors` are the whole model's."""

    whole: Checkpoint
    share: Share
    _channels: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # of the last block

    def load(self, name: str) -> Tensor:
        """One tensor, cut if it is a dense linear's."""
        module, _, kind = name.rpartition(".")
        tensor = self.whole.load(name)
        if kind not in ("weight", "bias"):
            return tensor
        if (index := self._index(module, _OUTPUTS)) is not None:
            return tensor.index_select(0, index)
        if kind == "weight" and (index := self._index(module, _INPUTS)) is not None:
            return tensor.index_select(1, index)
        return tensor

    def packed(self, module: str, send: Callable[[Tensor], Tensor] | None = None) -> PackedLinear:
        """A quantised module's share; it is cut where it lies, `send` is not used."""
        from quantmill.runtime.parallel.cutting import take_inputs, take_outputs

        packed = self.whole.packed(module)
        if (index := self._index(module, _OUTPUTS)) is not None:
            return take_outputs(packed, index)
        if (index := self._index(module, _INPUTS)) is not None:
            part = take_inputs(packed, index)
            return part if self.share.first else replace(part, bias=None)
        return packed

    def _index(self, module: str, table: dict[str, _Chooser]) -> Tensor | None:
        """Which rows or columns of a linear are this rank's; None for what the table does not name."""
        prefix = f"{architecture_of(self.config).blocks_prefix}."
        if not module.startswith(prefix):
            return None
        number, _, suffix = module.removeprefix(prefix).partition(".")
        choose = table.get(suffix)
        return None if choose is None else choose(self, f"{prefix}{number}")

    def _sizes(self) -> Dimensions:
        return dimensions(self.whole.config)

    def queries(self, block: str) -> Tensor:
        import torch

        return torch.arange(*(n * self._sizes().head_dim for n in self.share.heads))

    def keys(self, block: str) -> Tensor:
        import torch

        return torch.arange(*(n * self._sizes().head_dim for n in self.share.keys))

    def channels(self, block: str) -> Tensor:
        """In the order of down's groups."""
        import torch

        if block not in self._channels:
            self._channels.clear()
            first, last = self.share.channels
            down = f"{block}.{DOWN}"
            order = torch.arange(self._sizes().intermediate)
            if self.quant is not None and down in self.quantized_modules():
                order = torch.argsort(self.whole.packed(down).g_idx, stable=True)
            self._channels[block] = order[first:last]
        return self._channels[block]

    def queries_keys_values(self, block: str) -> Tensor:
        import torch

        sizes = self._sizes()
        after = sizes.heads * sizes.head_dim
        keys = self.keys(block) + after
        return torch.cat([self.queries(block), keys, keys + sizes.kv_heads * sizes.head_dim])

    def gates_and_ups(self, block: str) -> Tensor:
        import torch

        channels = self.channels(block)
        return torch.cat([channels, channels + self._sizes().intermediate])


_Chooser = Callable[[PartCheckpoint, str], "Tensor"]  # a block's name -> indices, int64
_OUTPUTS: dict[str, _Chooser] = {
    "self_attn.q_proj": PartCheckpoint.queries,
    "self_attn.k_proj": PartCheckpoint.keys,
    "self_attn.v_proj": PartCheckpoint.keys,
    "self_attn.qkv_proj": PartCheckpoint.queries_keys_values,
    "mlp.gate_proj": PartCheckpoint.channels,
    "mlp.up_proj": PartCheckpoint.channels,
    "mlp.gate_up_proj": PartCheckpoint.gates_and_ups,
}
_INPUTS: dict[str, _Chooser] = {
    "self_attn.o_proj": PartCheckpoint.queries,
    DOWN: PartCheckpoint.channels,
}
