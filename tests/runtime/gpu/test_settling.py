"""Tensors that stay are copied into one piece of memory, and nothing else about them changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.runtime.gpu.settling import ALIGNED, settled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Leaf:
    words: Tensor
    none: Tensor | None
    name: str


@dataclass(frozen=True, slots=True)
class Tree:
    leaves: tuple[Leaf, ...]
    number: float
    shared: Tensor
    modules: tuple[tuple[str, int], ...]


def a_tree() -> Tree:
    words = torch.arange(30, dtype=torch.int32, device=DEVICE).view(5, 6)
    half = torch.randn(7, device=DEVICE).half()
    flag = torch.tensor(True, device=DEVICE)
    return Tree(
        (Leaf(words, None, "a"), Leaf(words.T, half, "b"), Leaf(flag, None, "c")), 0.5, words, (("q", 3),)
    )


def test_all_values_are_the_same_and_lie_side_by_side():
    tree = a_tree()
    found = settled(tree)
    for one, other in zip(tree.leaves, found.leaves, strict=True):
        assert torch.equal(one.words, other.words)
        assert (one.none is None) == (other.none is None)
        assert one.name == other.name
        assert other.words.is_contiguous()
        assert other.words.data_ptr() % 16 == 0
    assert torch.equal(tree.leaves[1].none, found.leaves[1].none)
    assert found.number == 0.5
    assert found.modules == tree.modules
    room = found.shared.untyped_storage()
    assert room.nbytes() == 4 * ALIGNED  # words, their transpose, the halves, the flag
    assert all(leaf.words.untyped_storage().data_ptr() == room.data_ptr() for leaf in found.leaves)


def test_what_occurs_twice_is_copied_once():
    found = settled(a_tree())
    assert found.shared is found.leaves[0].words


def test_a_tree_without_tensors_stays():
    tree = (("q", 3), 0.5)
    assert settled(tree) is tree
