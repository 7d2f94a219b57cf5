"""Tensors that stay, side by side in memory that holds nothing else. Knows no model.

What is made while a model is laid out lies between what is thrown away, so that the allocator can give little of
that back: 0.23 GB of a 4.16 GB folder. Copied into one piece a layer, nothing of it remains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGNED = 512  # bytes, as the allocator gives them
Tree = TypeVar("Tree")


def settled(tree: Tree) -> Tree:
    """Frozen dataclasses and tuples of tensors on one device -> the same, all tensors in one piece of memory.

    A tensor that occurs several times is copied once; tensors are contiguous afterwards.
    """
    found = {id(t): t for t in _tensors(tree)}
    if not found:
        return tree
    sizes = {key: -(-t.numel() * t.element_size() // ALIGNED) * ALIGNED for key, t in found.items()}
    first = next(iter(found.values()))
    room = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=first.device)
    copies = {}
    for (key, tensor), part in zip(found.items(), torch.split(room, list(sizes.values())), strict=True):
        nbytes = tensor.numel() * tensor.element_size()
        copies[key] = part[:nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    changed: Tree = _changed(tree, lambda t: copies[id(t)])
    return changed


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, field.name))


def _changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        return tuple(_changed(part, change) for part in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: _changed(getattr(tree, f.name), change) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **fields)
    return tree
