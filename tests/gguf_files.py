"""GGUF files for the tests: a tiny Transformers model written the way llama.cpp's converter writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(path: Path, model: Any, tokenizer: Any, *, pre: str = "gpt-2", **keys: Any) -> Path:
    """Write `model` in fp16 (norms and biases fp32) with the vocabulary of a byte-level `tokenizer`.

    `keys` are further metadata, with `__` for `.`; those beginning with `arch__` go under the architecture.
    """
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    if hasattr(config, "head_dim"):
        writer.add_key_length(head_dim)
    for key, value in keys.items():
        add_key(writer, key.replace("arch__", f"{arch}.").replace("__", "."), value)
    add_vocabulary(writer, tokenizer, pre, config.vocab_size)
    add_tensors(writer, model, arch)
    return finish(writer, path)


def add_key(writer: Any, key: str, value: Any) -> None:
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
    add(key, value)


def add_vocabulary(writer: Any, tokenizer: Any, pre: str, size: int) -> None:
    """As in llama.cpp, rows of the embedding that no token uses get a name of their own."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.UNUSED] * (size - len(tokens))
    for token_id in tokenizer.all_special_ids:
        types[token_id] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(len(tokens), size))])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def add_tensors(writer: Any, model: Any, arch: str) -> None:
    config = model.config
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        weight = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            weight = for_llama_cpp(weight, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            weight = for_llama_cpp(weight, config.num_key_value_heads)
        half = weight.ndim > 1
        writer.add_tensor(
            f"{names.get_name(stem)}.{suffix}", weight.astype(np.float16 if half else np.float32)
        )


def for_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from (first half, second half) to (pairs), as llama.cpp's RoPE wants them."""
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def finish(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
