"""GGUF files, written here as llama.cpp writes them, come back as the models they were made from."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_files import add_tensors, write_gguf
from quantmill import gguf_source
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.gguf_source import convert, read_header
from tiny_models import byte_level_tokenizer, tiny_model

LINES = ["the cat sat on 12 mats", "  5\n    66 and 7", "naïve — 你好 ½"]


def made(folder: Path, path: Path) -> Path:
    """`path` converted into a new folder."""
    out = folder / "out"
    out.mkdir()
    convert(path, out, lambda _: None)
    return out


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 12}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("phi3", {"sliding_window": 12}),
    ],
)
def test_a_model_comes_back_with_the_same_logits(tmp_path: Path, model_type: str, settings: dict[str, Any]):
    model = tiny_model(model_type, **settings)
    window = settings.get("sliding_window")
    keys = {"arch__attention__sliding_window": window} if window else {}
    out = made(tmp_path, write_gguf(tmp_path / "m.gguf", model, byte_level_tokenizer(), **keys))
    with torch.no_grad():
        expected = model(torch.arange(40)[None]).logits
    assert torch.allclose(logits(out), expected, atol=1e-5)

    config = config_of(out)
    assert config["model_type"] == model_type
    assert config["architectures"] == [type(model).__name__]
    assert config.get("sliding_window") == window
    assert config["dtype"] == "float16"
    assert config["rms_norm_eps"] == 1e-5
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & set(config)


def test_the_tokenizer_comes_back(tmp_path: Path):
    from transformers import AutoTokenizer

    original = byte_level_tokenizer()
    out = made(tmp_path, write_gguf(tmp_path / "m.gguf", tiny_model("llama"), original))
    found = AutoTokenizer.from_pretrained(out)
    assert [found(line).input_ids for line in LINES] == [original(line).input_ids for line in LINES]
    assert found("<s>the").input_ids == original("<s>the").input_ids  # control tokens stay whole
    assert not found.backend_tokenizer.model.byte_fallback
    assert found.decode(found("a\u2581b").input_ids) == "a\u2581b"  # a character as any other
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "</s>")
    chat = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(
        chat, tokenize=False
    )


def test_pre_tokenisers_that_split_digits(tmp_path: Path):
    """`smollm` cuts at digits first; GPT-2 alone would leave the last space to the digit."""
    from transformers import AutoTokenizer

    tokenizer = byte_level_tokenizer()
    out = made(tmp_path, write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tokenizer, pre="smollm"))
    pieces = AutoTokenizer.from_pretrained(out).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a   12 b")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠĠ", "1", "2", "Ġb"]


def test_an_unknown_pre_tokeniser_is_said_aloud(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level_tokenizer(), pre="brand-new")
    said: list[str] = []
    (tmp_path / "out").mkdir()
    convert(path, tmp_path / "out", said.append)
    assert any("'brand-new'" in line for line in said)


def test_linear_rope_scaling_is_kept(tmp_path: Path):
    keys = {"arch__rope__scaling__type": "linear", "arch__rope__scaling__factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level_tokenizer(), **keys)
    rope = config_of(made(tmp_path, path))["rope_parameters"]
    assert rope["rope_type"] == "linear"
    assert rope["factor"] == 4.0


def llama3_gguf(path: Path, divisors: np.ndarray) -> Path:
    """A llama whose RoPE frequencies are divided by `divisors` (8,) float32."""
    model = tiny_model("llama")
    write_gguf(path, model, byte_level_tokenizer())
    reader = gguf.GGUFReader(path)
    again = path.with_name("with_divisors.gguf")
    writer = gguf.GGUFWriter(again, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
            )
    add_tensors(writer, model, "llama")
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return again


def test_llama3_rope_scaling_is_recovered_from_its_divisors(tmp_path: Path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=wanted)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(8) / 8)
    out = made(tmp_path, llama3_gguf(tmp_path / "m.gguf", (plain / scaled).numpy()))
    assert config_of(out)["rope_parameters"] == pytest.approx(wanted)


def test_other_rope_divisors_are_refused(tmp_path: Path):
    path = llama3_gguf(tmp_path / "m.gguf", np.linspace(1, 3, 8))
    with pytest.raises(UnsupportedModel, match="divisors"):
        made(tmp_path, path)


def test_the_header_alone(tmp_path: Path):
    model = tiny_model("llama")
    header = read_header(write_gguf(tmp_path / "m.gguf", model, byte_level_tokenizer()))
    assert header.architecture == "llama"
    assert header.get("attention.head_count_kv") == 2
    assert header.parameters == sum(math.prod(p.shape) for p in model.parameters())
    assert header.keys["tokenizer.ggml.tokens"] == 320  # long lists of strings are only counted
    stored = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name: entry.start for name, entry in header.tensors.items()} == stored


@pytest.mark.parametrize("keep", [10, 300, 3000, -100])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level_tokenizer())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadCheckpoint, match="fetch the file again"):
        read_header(path)


def test_what_is_not_gguf_is_named(tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(BadCheckpoint, match="letters GGUF"):
        read_header(tmp_path / "m.gguf")
    (tmp_path / "old.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(64))
    with pytest.raises(UnsupportedModel, match="version 1"):
        read_header(tmp_path / "old.gguf")


def test_an_architecture_nobody_knows(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama, mistral"):
        made(tmp_path, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
            "lacks model.layers.1.mlp.up_proj.weight",
        ),
        (lambda state: state["model.norm.weight"].fill_(math.nan), "not finite"),
        (lambda state: state["model.norm.weight"].fill_(1e6), "not finite in fp16"),
    ],
)
def test_weights_that_are_missing_or_not_numbers(tmp_path: Path, monkeypatch, break_it, message: str):
    model = tiny_model("llama")
    state = dict(model.state_dict())
    break_it(state)
    monkeypatch.setattr(model, "state_dict", lambda: state)
    path = write_gguf(tmp_path / "m.gguf", model, byte_level_tokenizer())
    with pytest.raises(BadCheckpoint, match=message):
        made(tmp_path, path)


@pytest.mark.model
def test_mistral_v1_vocabulary(tmp_path: Path):
    """A SentencePiece vocabulary with byte fallback: the real one, against SentencePiece itself."""
    import sentencepiece
    from transformers import AutoTokenizer

    file = Path(sys.prefix) / "data" / "mistral_common" / "data" / "tokenizer.model.v1"
    if not file.exists():
        pytest.skip("the data of mistral-common is not there: run 'make install'")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    out = made(tmp_path, sentencepiece_gguf(tmp_path / "m.gguf", pieces))
    found = AutoTokenizer.from_pretrained(out)
    for line in [*LINES, "[INST] What is 2 + 2? [/INST]", "tabs\tand\nnew lines", "a🦙b"]:
        assert found(line).input_ids == [pieces.bos_id(), *pieces.encode(line)]
        assert found.decode(found(line).input_ids, skip_special_tokens=True) == line
    chat = found("</s>[INST] again").input_ids  # as the instruct format wants it after an answer
    assert chat == [pieces.bos_id(), pieces.eos_id(), *pieces.encode("[INST] again")]


def sentencepiece_gguf(path: Path, pieces: Any) -> Path:
    """A tiny llama under a SentencePiece vocabulary."""
    count = pieces.vocab_size()
    model = tiny_model("llama", vocab_size=count, tie_word_embeddings=True)
    template = path.with_name("template.gguf")
    write_gguf(template, tiny_model("llama"), byte_level_tokenizer())
    writer = gguf.GGUFWriter(path, "llama")
    for field in gguf.GGUFReader(template).fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    kinds = [(pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_byte, 6)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(count)])
    writer.add_token_scores([pieces.get_score(i) for i in range(count)])
    writer.add_token_types([next((kind for test, kind in kinds if test(i)), 1) for i in range(count)])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    add_tensors(writer, model, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.model
def test_the_small_real_model_answers(smol: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol)
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_the_licence_comes_along(tmp_path: Path):
    card = gguf_source._card(
        {"general.license": "apache-2.0", "general.name": "Small", "general.organization": "Them"}
    )
    assert card is not None
    assert card.startswith("---\nlicense: apache-2.0\n---\n")
    assert "- organization: Them\n" in card
    assert gguf_source._card({"general.architecture": "llama"}) is None
