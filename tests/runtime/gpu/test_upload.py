"""What is read ahead arrives as it lies in the file."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from quantmill.checkpoint import open_checkpoint
from quantmill.formats.container import begins, write_file
from quantmill.runtime.gpu import upload
from quantmill.runtime.gpu.upload import EarlyUploader, Stored, Uploader, _read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tensors of no element, some, exactly a piece, and several pieces."""
    g = torch.Generator().manual_seed(1)
    sizes = {
        "a": (3, 5),
        "b": (upload.PIECE // 4,),
        "c": (upload.PIECE // 4 * 2 + 1,),
        "d": (1,),
        "e": (0, 4),
    }
    tensors = {n: torch.randint(-99, 99, s, dtype=torch.int32, generator=g) for n, s in sizes.items()}
    tensors["f"] = torch.randn(7, 11, generator=g).half()
    write_file(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_begins_are_where_tensors_lie(folder):
    checkpoint, places = open_checkpoint(folder), begins(folder / "model.safetensors")
    assert places.keys() == checkpoint.tensors.keys()
    with (folder / "model.safetensors").open("rb") as file:
        for name, info in checkpoint.tensors.items():
            raw = bytearray(info.nbytes)
            _read(file.fileno(), places[name], memoryview(raw))
            assert bytes(raw) == checkpoint.load(name).numpy().tobytes()


def test_a_file_that_ends_too_early_is_no_endless_wait(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    number = os.open(tmp_path / "short", os.O_RDONLY)
    with pytest.raises(OSError, match="shorter"):
        _read(number, 1, memoryview(bytearray(3)))
    os.close(number)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned buffers and streams need a GPU")
@pytest.mark.parametrize("order", ["abcdef", "fedcba", "cf"])
def test_what_is_sent_ahead_is_what_is_sent(folder, order, device):
    checkpoint, places = open_checkpoint(folder), begins(folder / "model.safetensors")
    mapped = {n: checkpoint.load(n) for n in places}
    with closing(EarlyUploader(device)) as early, closing(Uploader(device)) as plain:
        early.ahead(Stored(mapped[n], folder / "model.safetensors", places[n]) for n in "abcde")
        for name in order:
            found = early(mapped[name])
            assert found.device.type == "cuda"
            assert torch.equal(found, plain(mapped[name]))
            assert torch.equal(found.cpu(), mapped[name])
