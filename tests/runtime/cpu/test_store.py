"""The packed file: made once, mapped after that, made anew when the checkpoint changes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gptq_folders import quantize_folder

from quantmill.checkpoint import open_checkpoint
from quantmill.kernels.cpu.layout import DENSE
from quantmill.runtime.cpu import repack
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


def test_a_changed_checkpoint_gets_another_store(folder: Path, tmp_path: Path) -> None:
    packed_store(open_checkpoint(folder), OPTIONS, tmp_path)
    file = next(folder.glob("*.safetensors"))
    stamp = file.stat()
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    packed_store(open_checkpoint(folder), OPTIONS, tmp_path)
    assert len(list((tmp_path / "cpu").iterdir())) == 2


def test_linears_that_are_not_quantised_are_kept_dense(tmp_path: Path) -> None:
    from quantmill.checkpoint import save_tensors, write_json

    model = tiny_model("llama").half()
    folder = tmp_path / "model"
    folder.mkdir()
    save_tensors(folder, ((n, p.data) for n, p in model.named_parameters()))
    write_json(folder / "config.json", model.config.to_dict())
    store = packed_store(open_checkpoint(folder), {HEAD_BITS: DENSE}, tmp_path / "cache")
    assert {linear.bits for linear in store.linears.values()} == {DENSE}
