"""safetensors files: ours read by the library, the library's by us, and damage told from damage."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from quantmill.errors import BadCheckpoint
from quantmill.formats.container import map_tensors, read_header, write_file

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {f"of.{d}": torch.randint(0, 2, (3, 5)).to(d) for d in DTYPES}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["transposed"] = torch.arange(12).view(3, 4).T
    return tensors


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_file(tmp_path / "a.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype
        assert theirs[name].shape == tensor.shape
        ours = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(theirs[name].reshape(-1).view(torch.uint8), ours), name
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {k: v.contiguous() for k, v in some_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    infos = read_header(tmp_path / "a.safetensors")
    assert infos.keys() == tensors.keys()
    for name, info in infos.items():
        assert info.shape == tuple(tensors[name].shape)
        assert info.nbytes == tensors[name].nbytes
    assert infos["of.torch.bfloat16"].dtype == "BF16"


def test_a_mapped_file_is_what_was_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_file(tmp_path / "x", tensors)
    mapped = map_tensors(tmp_path / "x")
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)


def test_each_tensor_is_forgotten_once_it_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "x", some_tensors())
    mapped = map_tensors(tmp_path / "x")
    names = set(mapped)
    write_file(tmp_path / "y", mapped, forget=mapped.pop)
    assert names
    assert not mapped
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_bytes_do_not_depend_on_the_order_given(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_file(tmp_path / "a", tensors)
    write_file(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def entry(start: int, stop: int, shape: list, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


DAMAGED = {
    "overlap": ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, 6, "b overlaps"),
    "gap": ({"a": entry(0, 4, [4]), "b": entry(5, 9, [4])}, 9, "b leaves a gap"),
    "truncated": ({"a": entry(0, 4, [4])}, 3, "is truncated: 3 bytes"),
    "too long": ({"a": entry(0, 4, [4])}, 5, "longer than its header says"),
    "wrong size": ({"a": entry(0, 4, [5])}, 4, "5 bytes are needed"),
    "negative": ({"a": entry(-1, 3, [4])}, 4, "takes bytes -1 to 3"),
    "dtype": ({"a": entry(0, 4, [4], "Q4")}, 4, "unknown dtype Q4"),
    "shape": ({"a": entry(0, 4, [-4])}, 4, "senseless shape"),
    "shape type": ({"a": entry(0, 4, ["4"])}, 4, "senseless shape"),
    "entry": ({"a": {"dtype": "U8"}}, 0, "entry for a is malformed"),
    "no entry": ({"a": 3}, 0, "malformed"),
    "list": ([1, 2], 0, "no JSON object"),
    "no JSON": (b"{'a': 1}  ", 0, "no JSON"),
    "depth": (b"[" * 200_000, 0, "no JSON"),
    "no text": (b"\xff\xfe" * 10, 0, "no JSON"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_has_a_name(tmp_path: Path, kind: str) -> None:
    header, length, words = DAMAGED[kind]
    with pytest.raises(BadCheckpoint, match=words) as caught:
        read_header(raw(tmp_path / "m.safetensors", header, bytes(length)))
    assert "m.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04", "not a safetensors file"),
        (b"\x80\x02}q\x00" + bytes(100), "not a safetensors file"),
        ((1 << 40).to_bytes(8, "little") + bytes(100), "not a safetensors file"),
        ((500).to_bytes(8, "little") + b"{}", "its header alone takes 508"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
    ],
)
def test_other_files_have_a_name(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=words):
        read_header(tmp_path / "m.safetensors")


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "whole", {"a": torch.arange(4), "b": torch.arange(3, dtype=torch.uint8)})
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(BadCheckpoint):
            read_header(tmp_path / "cut")
    assert len(read_header(tmp_path / "whole")) == 2


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    write_file(tmp_path / "none", {})
    assert read_header(tmp_path / "none") == {}
