"""A model -> one `.gguf` file: metadata, vocabulary, names and the order of rows that llama.cpp wants.

Tensors come under Transformers' names, each as its block type and a function that yields its bytes, so that
one tensor at a time is in memory. The container itself is written by the `gguf` package. Knows no solver.

llama.cpp turns neighbouring elements of a head where Transformers turns halves, so the rows of q and k are
reordered in models of its "llama" kind (Llama, Mistral). Rows are whole rows of blocks: nothing is rounded.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantmill.architectures import Dimensions, dimensions
from quantmill.errors import UnsupportedModel
from quantmill.files import UNFINISHED, fsync, full_disk_said
from quantmill.formats.gguf import FLOAT_TYPES, TYPES, row_bytes
from quantmill.gguf_vocab import Vocabulary, read_vocabulary
from quantmill.types import Json

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}
ROPE = "rope_freqs.weight"
NUMPY = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor to be written."""

    name: str  # Transformers'
    shape: tuple[int, ...]
    kind: str  # a block type, or F32, F16
    rows: Callable[[], NDArray[Any]]  # uint8 (N, row bytes), or floats of `shape`


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a file says beside its tensors."""

    name: str
    config: Json  # config.json
    folder: Path  # holds the tokenizer
    file_type: str  # llama.cpp's name: Q4_K_M, F16, ...
    quantized_by: str | None = None
    licence: str | None = None


def write_gguf(path: Path, model: GgufModel, tensors: Sequence[GgufTensor]) -> tuple[str, ...]:
    """Write `path`, whole or not at all. Returns notes on what is not certain about the tokenizer.

    Raises UnsupportedModel for an architecture or RoPE scaling that GGUF is not written for.
    """
    import gguf

    arch = architecture(model.config)
    sizes = dimensions(model.config)
    vocabulary = read_vocabulary(model.folder, model.config, sizes.vocab)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{UNFINISHED}")
    writer = gguf.GGUFWriter(partial, arch)
    try:
        _metadata(writer, model, sizes)
        _vocabulary(writer, vocabulary)
        listed = [*_rope_tensors(model.config, sizes), *tensors]
        with full_disk_said(path):
            _write_tensors(writer, listed, arch, sizes)
            writer.close()  # what is still in its buffers may not fit either
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        with suppress(OSError):  # told already
            writer.close()
        partial.unlink(missing_ok=True)
    return vocabulary.notes


def architecture(config: Json) -> str:
    """llama.cpp's name. Raises UnsupportedModel."""
    found = ARCHITECTURES.get(str(config.get("model_type")))
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(
            f"GGUF files are written for {known}, not for {config.get('model_type')!r} models"
        )
    return found


def gguf_name(name: str, arch: str, layers: int) -> str:
    """llama.cpp's name of a tensor. Raises UnsupportedModel where it has none."""
    found = find_name(name, arch, layers)
    if found is None:
        raise UnsupportedModel(f"llama.cpp has no tensor {name} in its {arch} models: leave it out")
    return found


def find_name(name: str, arch: str, layers: int) -> str | None:
    """llama.cpp's name of a tensor, None where it has none."""
    if name == ROPE:
        return name
    found: str | None = _name_map(arch, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    return found


@functools.cache
def _name_map(arch: str, layers: int) -> Any:
    import gguf

    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    return gguf.get_tensor_name_map(number, layers)


def for_llama_cpp(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of every head from (first half, second half) to neighbouring pairs."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def from_llama_cpp(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo `for_llama_cpp`."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def heads_of(name: str, arch: str, sizes: Dimensions) -> int | None:
    """How many heads the rows of a tensor belong to, where llama.cpp reorders them; else None."""
    if arch != "llama":
        return None
    if ".self_attn.q_proj." in name:
        return sizes.heads
    return sizes.kv_heads if ".self_attn.k_proj." in name else None


def _write_tensors(writer: Any, tensors: Sequence[GgufTensor], arch: str, sizes: Dimensions) -> None:
    for tensor in tensors:
        shape, dtype, number = _stored(tensor)
        writer.add_tensor_info(
            gguf_name(tensor.name, arch, sizes.layers), shape, np.dtype(dtype), _nbytes(shape, dtype), number
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        rows = tensor.rows()
        if heads := heads_of(tensor.name, arch, sizes):
            rows = for_llama_cpp(rows, heads)
        _write_rows(writer, np.ascontiguousarray(rows))


def _write_rows(writer: Any, rows: NDArray[Any]) -> None:
    """As the writer does, but without numpy's tofile, which tells nothing when a small array meets a full disk."""
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    file.write(rows.data)
    writer.write_padding(file, rows.nbytes)


def _stored(tensor: GgufTensor) -> tuple[tuple[int, ...], type, Any]:
    """Shape and dtype of the array that is written, and ggml's type."""
    from gguf import GGMLQuantizationType

    if tensor.kind in FLOAT_TYPES:
        return tensor.shape, NUMPY[tensor.kind], GGMLQuantizationType[tensor.kind]
    kind = TYPES[tensor.kind]
    return (
        (*tensor.shape[:-1], row_bytes(kind, tensor.shape[-1])),
        np.uint8,
        GGMLQuantizationType(kind.number),
    )


def _nbytes(shape: tuple[int, ...], dtype: type) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _metadata(writer: Any, model: GgufModel, sizes: Dimensions) -> None:
    import gguf

    config = model.config
    writer.add_type("model")
    writer.add_name(model.name)
    if model.licence:
        writer.add_license(model.licence)
    if model.quantized_by:
        writer.add_quantized_by(model.quantized_by)
    writer.add_vocab_size(sizes.vocab)
    writer.add_context_length(int(config.get("max_position_embeddings") or 2048))
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps") or 1e-6))
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(int(config["sliding_window"]))
    _rope(writer, config)
    file_type = {"F32": "ALL_F32"}.get(model.file_type, f"MOSTLY_{model.file_type}")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def rope_of(config: Json) -> tuple[float, Json]:
    """Theta, and the scaling where there is one, from the keys of every Transformers release."""
    modern = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or modern.get("rope_theta") or 10000.0
    scaling = config.get("rope_scaling") or modern
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return float(theta), {} if kind == "default" else {**scaling, "rope_type": kind}


def _rope(writer: Any, config: Json) -> None:
    import gguf

    theta, scaling = rope_of(config)
    writer.add_rope_freq_base(theta)
    kind = scaling.get("rope_type")
    if kind in (None, "llama3"):  # the latter is a tensor of divisors
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(
            f"RoPE scaling is {kind!r}; GGUF files are written with linear, yarn and llama3"
        )
    writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    if original := scaling.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(int(original))


def _rope_tensors(config: Json, sizes: Dimensions) -> list[GgufTensor]:
    """Llama 3's divisors of the rotation frequencies, (head_dim / 2,) float32."""
    theta, scaling = rope_of(config)
    if scaling.get("rope_type") != "llama3":
        return []
    count = sizes.head_dim // 2
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi * theta ** (np.arange(count) / count)
    ratio = float(scaling["original_max_position_embeddings"]) / wavelength
    blend = np.clip((ratio - low) / (high - low), 0, 1)
    divisors = (1 / ((1 - blend) / float(scaling["factor"]) + blend)).astype(np.float32)
    return [GgufTensor(ROPE, (count,), "F32", lambda: divisors)]


def _vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    for key, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.add_space)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
