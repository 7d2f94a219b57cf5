"""The packed file: made once, mapped after that, made anew when the checkpoint changes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from gptq_folders import quantize_folder

from quantmill.checkpoint import open_checkpoint
from quantmill.errors import BadRequest
from quantmill.kernels.cpu.layout import DENSE
from quantmill.runtime.cpu import repack, store
from quantmill.runtime.cpu.repack import HEAD_BITS
from quantmill.runtime.cpu.store import packed_store
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

CONFIG = QuantConfig(bits=4, group_size=32, act_order=ActOrder.NONE)
OPTIONS = {HEAD_BITS: 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    quantize_folder(tiny_model("llama"), tmp_path / "model", CONFIG)
    return tmp_path / "model"


def test_a_store_is_made_once_and_mapped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = packed_store(open_checkpoint(folder), OPTIONS, tmp_path / "cache")

    def refuse(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(repack, "pack_model", refuse)
    again = packed_store(open_checkpoint(folder), OPTIONS, tmp_path / "cache")
    assert set(again.linears) == {
        f"{i}.{name}" for i in range(2) for name in ("qkv", "o", "gate", "up", "down")
    } | {"head"}
    for name, linear in again.linears.items():
        assert linear.weights.ctypes.data % 64 == 0, name
        assert not linear.weights.flags.writeable
        assert np.array_equal(linear.weights, first.linears[name].weights)
    assert again.linears["head"].bits == 8
    assert again.arrays["embedding"].dtype == np.float16
    with pytest.raises(AssertionError, match="packed again"):
        packed_store(open_checkpoint(folder), {HEAD_BITS: DENSE}, tmp_path / "cache")


def touched(folder: Path, by: int = 1) -> Path:
    """The folder with weights of another time of change."""
    file = next(folder.glob("*.safetensors"))
    stamp = file.stat()
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + by))
    return folder


def stores(cache: Path) -> set[str]:
    return {path.name for path in (cache / "cpu").iterdir()}


def test_a_changed_checkpoint_gets_a_store_in_the_place_of_the_old(folder: Path, tmp_path: Path) -> None:
    old = packed_store(open_checkpoint(folder), OPTIONS, tmp_path)
    before = stores(tmp_path)
    packed_store(open_checkpoint(touched(folder)), OPTIONS, tmp_path)
    assert len(stores(tmp_path)) == 1
    assert stores(tmp_path) != before
    assert old.linears["head"].weights.any()  # whoever has it mapped goes on
    packed_store(open_checkpoint(folder), {HEAD_BITS: DENSE}, tmp_path)
    assert len(stores(tmp_path)) == 2  # other options, another origin


def test_stores_that_nobody_uses_are_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [touched(shutil.copytree(folder, tmp_path / str(i)), i) for i in range(3)]
    cache = tmp_path / "cache"
    packed_store(open_checkpoint(copies[0]), OPTIONS, cache)
    first = stores(cache)
    packed_store(open_checkpoint(copies[1]), OPTIONS, cache)
    assert len(stores(cache)) == 2
    long_ago = time.time() - 91 * 86400
    os.utime(cache / "cpu" / next(iter(first)) / store.INDEX, (long_ago, long_ago))
    packed_store(open_checkpoint(copies[2]), OPTIONS, cache)
    assert len(stores(cache)) == 2
    assert not first & stores(cache)
    monkeypatch.setattr(store, "CAP", 1)
    packed_store(open_checkpoint(copies[0]), OPTIONS, cache)
    assert len(stores(cache)) == 1  # the one that is in use stays, whatever its size


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="set QUANTMILL_HOME"):
        packed_store(open_checkpoint(folder), OPTIONS, tmp_path / "file")


def test_linears_that_are_not_quantised_are_kept_dense(tmp_path: Path) -> None:
    from quantmill.checkpoint import save_tensors, write_json

    model = tiny_model("llama").half()
    folder = tmp_path / "model"
    folder.mkdir()
    save_tensors(folder, ((n, p.data) for n, p in model.named_parameters()))
    write_json(folder / "config.json", model.config.to_dict())
    made = packed_store(open_checkpoint(folder), {HEAD_BITS: DENSE}, tmp_path / "cache")
    assert {linear.bits for linear in made.linears.values()} == {DENSE}
