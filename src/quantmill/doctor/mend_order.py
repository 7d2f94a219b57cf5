"""Act order without a gather, exactly: the order of a module's inputs moves into the rows that make them.

    down_proj   its inputs are products of gate's and up's outputs, element by element: any order will do
    o_proj      its inputs are values: an order within a head that all heads of one key-value head share

The inputs of all others are the residual stream, which every block shares: theirs stays. Codes, scales and zeros
move as they are, so no weight gets another value; sums run in another order, so logits differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantmill.architectures import Dimensions, dimensions
from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadCheckpoint
from quantmill.formats.gptq import is_sequential, pack_words, unpack_words
from quantmill.types import QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTWISE = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # families whose blocks are as described above
PLAIN = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Edits:
    """Tensors as they will be: each by what makes it when it is written, so that none waits in memory."""

    checkpoint: Checkpoint
    made: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def load(self, name: str) -> Tensor:
        """A tensor with all its edits."""
        make = self.made.get(name)
        return make() if make else self.checkpoint.load(name)

    def has(self, name: str) -> bool:
        return name in self.made or name in self.checkpoint.tensors

    def put(self, name: str, value: Tensor) -> None:
        self.made[name] = lambda: value

    def then(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """One more edit, after those that there are."""
        before = self.made.get(name) or (lambda: self.checkpoint.load(name))
        self.made[name] = lambda: change(before())


def move_orders(edits: Edits, modules: Iterable[str]) -> Iterator[str]:
    """Yields the modules, of those whose g_idx is permuted, that need no gather afterwards."""
    if edits.checkpoint.config.get("model_type") not in ELEMENTWISE:
        return
    try:
        sizes = dimensions(edits.checkpoint.config)
    except BadCheckpoint:  # another rule's finding
        return
    for name in modules:
        block, _, kind = name.rpartition(".")
        if kind in MOVES and MOVES[kind](edits, block, sizes):
            yield name


def _move_down(edits: Edits, block: str, sizes: Dimensions) -> bool:
    import torch

    name = f"{block}.down_proj"
    g_idx = edits.load(f"{name}.g_idx").long()
    order = torch.argsort(g_idx, stable=True)
    rows = {f"{block}.gate_proj": order, f"{block}.up_proj": order}
    if f"{block}.gate_up_proj" in _owners(edits.checkpoint, block):
        rows = {f"{block}.gate_up_proj": torch.cat([order, order + len(order)])}
    return len(g_idx) == sizes.intermediate and _move(edits, name, order, rows)


def _move_values(edits: Edits, block: str, sizes: Dimensions) -> bool:
    import torch

    name = f"{block}.o_proj"
    g_idx = edits.load(f"{name}.g_idx").long()
    width, shared = sizes.head_dim, sizes.heads // sizes.kv_heads
    if len(g_idx) != sizes.heads * width:
        return False
    first = g_idx.view(sizes.kv_heads, shared, width)[:, 0]
    within = torch.argsort(first, dim=1, stable=True)  # (key-value heads, width)
    values = (within + torch.arange(sizes.kv_heads)[:, None] * width).reshape(-1)
    starts = (torch.arange(sizes.heads) * width).view(sizes.kv_heads, shared, 1)
    order = (within[:, None] + starts).reshape(-1)
    rows = {f"{block}.v_proj": values}
    if f"{block}.qkv_proj" in _owners(edits.checkpoint, block):
        before = len(g_idx) + len(values)  # queries and keys stay where they are
        rows = {f"{block}.qkv_proj": torch.cat([torch.arange(before), values + before])}
    return _move(edits, name, order, rows)


MOVES: dict[str, Callable[[Edits, str, Dimensions], bool]] = {"down_proj": _move_down, "o_proj": _move_values}


def _owners(checkpoint: Checkpoint, block: str) -> set[str]:
    """Modules of a block's half that have tensors."""
    return {n.rpartition(".")[0] for n in checkpoint.tensors if n.startswith(f"{block}.")}


def _move(edits: Edits, name: str, order: Tensor, rows: dict[str, Tensor]) -> bool:
    """Take the inputs of `name` in this order, and the outputs of `rows` in theirs. False: nothing was done."""
    config = edits.checkpoint.module_config(name)
    g_idx = edits.load(f"{name}.g_idx").long()[order]
    first = g_idx[:: config.effective_group(len(g_idx))]  # the group of each run of columns
    if not is_sequential(_numbered(g_idx, first), config.group_size) or not all(
        _fits(edits, module, len(index)) for module, index in rows.items()
    ):
        return False
    edits.put(f"{name}.g_idx", _numbered(g_idx, first))
    edits.then(f"{name}.qweight", lambda words: _reordered(words, config, order))
    for suffix in ("scales", "qzeros"):
        edits.then(f"{name}.{suffix}", lambda tensor: tensor[first].contiguous())
    for module, index in rows.items():
        _permute_outputs(edits, module, index)
    return True


def _numbered(g_idx: Tensor, first: Tensor) -> Tensor:
    """Groups by the place of their run; one that has two runs gets the later one's, so it is not sequential."""
    import torch

    place = torch.zeros(int(g_idx.max()) + 1, dtype=torch.int32)
    place[first] = torch.arange(len(first), dtype=torch.int32)
    return place[g_idx]


def _fits(edits: Edits, module: str, out_features: int) -> bool:
    """Whether a module has so many outputs, packed soundly or plain."""
    checkpoint = edits.checkpoint
    try:
        if edits.has(f"{module}.qweight"):
            return not checkpoint.module_faults(module) and checkpoint.module_size(module)[1] == out_features
    except BadCheckpoint:
        return False
    info = checkpoint.tensors.get(f"{module}.weight")
    return info is not None and info.shape[0] == out_features


def _permute_outputs(edits: Edits, module: str, index: Tensor) -> None:
    for suffix in PLAIN:
        if edits.has(f"{module}.{suffix}"):
            edits.then(f"{module}.{suffix}", lambda tensor: tensor[index].contiguous())
    if edits.has(f"{module}.qweight"):
        config = edits.checkpoint.module_config(module)
        for suffix in ("qweight", "scales"):
            edits.then(f"{module}.{suffix}", lambda tensor: tensor[:, index].contiguous())
        edits.then(f"{module}.qzeros", lambda words: _reordered(words.T, config, index).T.contiguous())


def _reordered(words: Tensor, config: QuantConfig, order: Tensor) -> Tensor:
    """Fields packed along the rows (words, columns), in another order of rows; what they hold stays."""
    return pack_words(unpack_words(words, config.bits, len(order))[order], config.bits)
