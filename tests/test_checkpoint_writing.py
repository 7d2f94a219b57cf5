"""Weight files as they are written: one, or shards with their index; nothing is left of an earlier save."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantmill.checkpoint import open_checkpoint, save_tensors


def weights(count: int = 7) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((100,), float(i)) for i in range(count)}  # 400 bytes each


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "config.json")


def test_one_file_where_it_fits(tmp_path: Path) -> None:
    save_tensors(tmp_path, weights().items())
    assert files_in(tmp_path) == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == weights().keys()


def test_shards_where_it_does_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_tensors(tmp_path, weights().items(), max_shard_bytes=1000)
    shards = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert files_in(tmp_path) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert index["weight_map"] == {f"t{i}": shards[i // 2] for i in range(7)}
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.load(n), t) for n, t in weights().items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    save_tensors(tmp_path, weights(3).items(), max_shard_bytes=10)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_only_one_shard_is_in_memory(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def stream():
        for i in range(9):
            tensor = torch.zeros(100)
            made.append(weakref.ref(tensor))
            alive.append(sum(ref() is not None for ref in made))
            yield f"t{i}", tensor
            del tensor

    save_tensors(tmp_path, stream(), max_shard_bytes=800)
    assert len(list(tmp_path.glob("model-*"))) == 5
    assert max(alive) <= 3  # a shard of two, and the one that did not fit


def test_an_earlier_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".00099.safetensors.partial").touch()
    for limit in (1000, 1500, 10**6, 500):
        save_tensors(tmp_path, weights().items(), max_shard_bytes=limit)
        assert open_checkpoint(tmp_path).tensors.keys() == weights().keys()
        assert len(list(tmp_path.glob("*.safetensors"))) == len(open_checkpoint(tmp_path).files)
    save_tensors(tmp_path, [])
    assert open_checkpoint(tmp_path).tensors == {}
    assert files_in(tmp_path) == ["model.safetensors"]


def test_a_name_comes_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a came twice"):
        save_tensors(tmp_path, [("a", torch.zeros(1)), ("a", torch.zeros(1))])
