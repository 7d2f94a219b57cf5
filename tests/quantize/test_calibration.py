"""Blocks: where they lie in the text, that seeds decide them, what is recorded, and every refusal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantmill.errors import BadRequest, BadText
from quantmill.quantize import calibration, self_text
from quantmill.quantize.calibration import build, overlap, read_text

WORDS = "the cat sat on a mat and saw 12 dogs run past the old house by the river while rain fell softly "


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    """Adds no special token by itself."""
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def with_bos(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Some 2000 tokens of which no stretch repeats."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{n * n} {WORDS}" for n in range(40)))
    return path


def jsonl(path: Path, rows: Iterable[object]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


# ---- where blocks lie


def test_blocks_are_contiguous_windows_of_the_file(book: Path, with_bos: Any) -> None:
    ids = with_bos(book.read_text())["input_ids"]
    count = len(ids) // 64
    every = build(str(book), with_bos, seqlen=64, samples=count)
    assert every.blocks.dtype == torch.int64
    assert every.blocks.flatten().tolist() == ids[: count * 64]
    assert every.blocks[0, 0] == with_bos.bos_token_id
    assert (every.name, every.documents, every.dropped, every.tokens) == ("book.txt", 1, 0, count * 64)


def test_draw_is_seeded_without_replacement_and_in_text_order(book: Path, tokenizer: Any) -> None:
    whole = build(str(book), tokenizer, seqlen=32, samples=1000).blocks.tolist()
    drawn = build(str(book), tokenizer, seqlen=32, samples=9, seed=4)
    places = [whole.index(block) for block in drawn.blocks.tolist()]
    assert len(places) == 9
    assert places == sorted(set(places))
    assert places != list(range(9))
    assert torch.equal(build(str(book), tokenizer, seqlen=32, samples=9, seed=4).blocks, drawn.blocks)
    assert build(str(book), tokenizer, seqlen=32, samples=9, seed=5).fingerprint != drawn.fingerprint
    assert drawn.seed == 4


def test_the_draw_never_changes_between_releases() -> None:
    """Which blocks seed 0 takes is part of the record that other machines must be able to repeat."""
    blocks = calibration._draw(range(200), 10, 5, 0, "x")
    assert blocks[:, 0].tolist() == [30, 50, 70, 120, 150]


def test_fewer_blocks_where_the_text_holds_no_more(book: Path, tokenizer: Any) -> None:
    found = build(str(book), tokenizer, seqlen=512, samples=128)
    assert 1 <= len(found.blocks) < 128
    assert found.tokens == found.blocks.numel()


def test_fingerprint_is_of_the_tokens_and_the_shape(book: Path, tokenizer: Any) -> None:
    found = build(str(book), tokenizer, seqlen=8, samples=2)
    data = b"".join(int(token).to_bytes(8, "little") for token in found.blocks.flatten())
    assert found.fingerprint == hashlib.sha256(data + b"2x8").hexdigest()
    assert calibration.fingerprint(found.blocks.view(4, 4)) != found.fingerprint


def test_no_more_of_a_long_text_is_tokenised_than_is_needed(
    book: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(str(book), tokenizer, seqlen=16, samples=20).blocks
    monkeypatch.setattr(calibration, "POOL_CHARS", 100)
    monkeypatch.setattr(calibration, "POOL_CHARS_PER_TOKEN", 1)
    pieces: list[int] = []
    encode = calibration._encode
    monkeypatch.setattr(calibration, "_encode", lambda text, t: pieces.append(len(text)) or encode(text, t))
    found = build(str(book), tokenizer, seqlen=16, samples=20).blocks
    assert found.shape == whole.shape
    assert pieces == [320, 1280]  # 320 characters gave too few tokens
    assert max(pieces) < len(book.read_text())


# ---- documents


def test_short_documents_share_a_block_and_nothing_is_lost(tmp_path: Path, with_bos: Any) -> None:
    texts = [f"row {n}" for n in range(30)]
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, "", None]])
    stream = [token for text in texts for token in with_bos(text)["input_ids"]]
    found = build(path, with_bos, seqlen=32, samples=99)
    assert found.blocks.flatten().tolist() == stream[: len(stream) // 32 * 32]
    assert (found.documents, found.dropped) == (32, 2)


def test_documents_are_kept_apart_where_the_tokenizer_marks_nothing(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one cat"}, {"text": "two dogs"}])
    found = build(path, tokenizer, seqlen=8, samples=9)
    assert tokenizer.decode(found.blocks.flatten()) == "one cat\n\ntw"


def test_reading_stops_when_there_is_enough(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "POOL_CHARS", 200)
    monkeypatch.setattr(calibration, "POOL_CHARS_PER_TOKEN", 1)
    path = jsonl(tmp_path / "a.jsonl", [{"text": WORDS}] * 50)
    assert build(path, tokenizer, seqlen=16, samples=1).documents == 3


def test_chats_go_through_the_template(tmp_path: Path, tokenizer: Any) -> None:
    talk = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a cat."}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": talk}] * 4)
    found = build(path, tokenizer, seqlen=16, samples=99)
    assert tokenizer.decode(found.blocks.flatten()).startswith("[user] a cat?\n[assistant] a cat.\n[user]")
    assert read_text(path, tokenizer).startswith("[user] a cat?\n[assistant] a cat.\n\n\n[user]")


def test_a_chat_that_the_template_refuses_is_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    rows = [{"messages": [{"role": role, "content": WORDS}]} for role in ("user", "system", "user")]
    found = build(jsonl(tmp_path / "a.jsonl", rows), tokenizer, seqlen=16, samples=1)
    assert (found.documents, found.dropped) == (3, 1)


def test_chats_need_a_template(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    for read in (lambda: build(path, tokenizer, seqlen=4, samples=1), lambda: read_text(path)):
        with pytest.raises(BadRequest, match=r"a\.jsonl holds chats.*use a file with a text column"):
            read()


def test_python_docs(tokenizer: Any) -> None:
    found = build("python-docs", tokenizer, seqlen=128, samples=16)
    assert found.blocks.shape == (16, 128)
    assert found.documents > 50


def test_the_model_can_write_the_text_itself(
    tiny_llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "ROW_TOKENS", 4)
    monkeypatch.setattr(self_text, "BATCH", 4)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    first, second = (build("self", tokenizer, seqlen=16, samples=3, seed=1, model=model) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.blocks.shape == (3, 16)
    assert (first.name, first.dropped) == ("self", 0)
    with pytest.raises(BadRequest, match="original model in memory"):
        build("self", tokenizer, seqlen=16, samples=3)


# ---- refusals


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"seqlen": 0, "samples": 4}, "use --samples 128 --seqlen 2048"),
        ({"seqlen": 4, "samples": 0}, "must be 1 or more"),
        ({"seqlen": 257, "samples": 1, "max_positions": 256}, "use --seqlen 256 or less"),
    ],
)
def test_impossible_numbers(tokenizer: Any, numbers: dict[str, int], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        build("python-docs", tokenizer, **numbers)


def test_text_shorter_than_a_block(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a cat on a mat")
    count = len(tokenizer("a cat on a mat")["input_ids"])
    fitting = 2 ** (count.bit_length() - 1)
    with pytest.raises(
        BadText, match=f"holds {count} tokens, less than one block of 99: use --seqlen {fitting} or"
    ):
        build(str(path), tokenizer, seqlen=99, samples=1)
    assert len(build(str(path), tokenizer, seqlen=fitting, samples=1).blocks) == 1


@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", " \n "), ("a.jsonl", "\n\n"), ("b.jsonl", '{"text": " "}')]
)
def test_nothing_usable(tmp_path: Path, with_bos: Any, name: str, data: str) -> None:
    (tmp_path / name).write_text(data)
    for read in (
        lambda: build(str(tmp_path / name), with_bos, seqlen=1, samples=1),
        lambda: read_text(str(tmp_path / name)),
    ):
        with pytest.raises(BadText, match="holds no usable text"):
            read()


# ---- text to be scored


def test_read_text(tmp_path: Path, book: Path) -> None:
    assert read_text(str(book)) == book.read_text()
    assert len(read_text("python-docs", max_chars=10_000)) < 100_000
    assert (
        read_text(jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}]))
        == "one\n\ntwo"
    )
    with pytest.raises(BadRequest, match="text of its own"):
        read_text("self")


def test_overlap() -> None:
    ids = torch.randint(0, 50_000, (4096,), generator=torch.Generator().manual_seed(0))
    other = torch.randint(0, 50_000, (4096,), generator=torch.Generator().manual_seed(1))
    assert overlap(ids.view(8, 512), ids) == 1.0
    assert overlap(ids.view(8, 512), other) == 0.0
    assert overlap(ids[:1024].view(2, 512), ids[:512]) == 0.5
    mixed = torch.cat([ids[:16], other[:1]])[None]  # two 16-grams, one of them known
    assert overlap(mixed, ids) == 0.5
    assert overlap(ids[:8][None], ids) == 0.0
    assert overlap(ids.view(8, 512), ids[:8]) == 0.0
