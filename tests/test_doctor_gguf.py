"""`check` of a .gguf file: what is sound, and every fault that its readers would stumble over, named."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from gguf_files import finish, write_gguf
from quantmill.cli import app
from quantmill.doctor import check, fix
from quantmill.errors import BadRequest
from quantmill.formats.gguf import TYPES, halves, pack, unpack
from quantmill.sources import gguf_file
from tiny_models import byte_level_tokenizer, tiny_model


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), byte_level_tokenizer())


def rewritten(path: Path, *, without: str = "", tensors: dict[str, np.ndarray] | None = None) -> Path:
    """The same file without the keys and tensors of which `without` is the end, and with others' values."""
    reader, changed = gguf.GGUFReader(path), tensors or {}
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if not (without and field.name.endswith(without)):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if not (without and tensor.name.endswith(without)):
            data = changed.get(tensor.name, tensor.data)
            raw = gguf.GGMLQuantizationType.Q4_0 if data.dtype == np.uint8 else None
            writer.add_tensor(tensor.name, np.array(data), raw_dtype=raw)
    return finish(writer, path.with_name("changed.gguf"))


def messages(path: Path) -> str:
    return "\n".join(f"{f.level}: {f.where}: {f.message}" for f in check(path).findings)


def test_a_sound_file_is_read_by_all(sound: Path) -> None:
    report = check(sound)
    assert report.ok
    assert set(report.loaders.values()) == {"yes"}
    assert "14 F16" in messages(sound)
    assert "all tensors of 2 blocks" in messages(rewritten(sound))


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("llama.context_length", "llama.context_length: missing: llama.cpp does not open the file"),
        ("blk.1.ffn_up.weight", "blk.1.ffn_up.weight: missing"),
        ("output_norm.weight", "output_norm.weight: missing"),
        ("ggml.tokens", "the vocabulary is missing"),
        ("ggml.merges", "without merges"),
    ],
)
def test_what_is_lost_is_named(sound: Path, lost: str, said: str) -> None:
    path = rewritten(sound, without=lost)
    report = check(path)
    assert not report.ok
    assert said in messages(path)
    assert said.split(":")[-1].strip() in report.loaders["llama.cpp"]


@pytest.mark.parametrize(
    ("lost", "said"), [("chat_template", "chat template: missing"), ("eos_token_id", "may not stop")]
)
def test_what_can_be_done_without_is_a_warning(sound: Path, lost: str, said: str) -> None:
    path = rewritten(sound, without=lost)
    assert said in messages(path)
    assert check(path).loaders["llama.cpp"] == "yes"


def test_scales_that_are_no_numbers(sound: Path) -> None:
    rows = np.zeros((64, 2 * 18), np.uint8)
    good = rewritten(sound, tensors={"blk.0.attn_q.weight": rows})
    assert check(good).ok
    assert "1 Q4_0" in messages(good)
    rows[3, 18:20] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    assert "blk.0.attn_q.weight: holds values that are infinite" in messages(
        rewritten(sound, tensors={"blk.0.attn_q.weight": rows})
    )
    norm = np.full(64, np.inf, np.float32)
    assert "output_norm.weight: holds" in messages(rewritten(sound, tensors={"output_norm.weight": norm}))


def test_a_cut_file_and_another_vocabulary(sound: Path) -> None:
    table = np.zeros((100, 64), np.float16)
    assert "320 tokens, but the embedding has 100 rows" in messages(
        rewritten(sound, tensors={"token_embd.weight": table})
    )
    sound.write_bytes(sound.read_bytes()[:-1000])
    report = check(sound)
    assert "fetch the file again" in report.findings[0].message
    assert report.loaders["llama.cpp"] == "the file cannot be opened"


@pytest.mark.parametrize("name", sorted(TYPES))
def test_halves_are_what_unpacking_finds(name: str) -> None:
    kind = TYPES[name]
    raw = np.random.default_rng(0).integers(0, 255, (3, kind.nbytes), dtype=np.uint8)
    blocks = unpack(kind, raw)
    found = halves(kind, pack(kind, blocks))
    assert [h.tobytes() for h in found] == [h.tobytes() for h in (blocks.d, blocks.m) if h is not None]


def test_the_command_examines_the_file_itself(sound: Path) -> None:
    assert gguf_file(str(sound)) == sound
    assert gguf_file(str(sound.parent)) == sound
    assert gguf_file(str(sound.with_name("nothing.gguf"))) is None
    done = CliRunner().invoke(app, ["check", str(sound.parent), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["loaders"]["llama.cpp"] == "yes"
    with pytest.raises(BadRequest, match="not mended"):
        fix(sound)
