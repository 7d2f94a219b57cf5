"""A `.gguf` file -> a Transformers folder with fp16 safetensors, so that nothing else has to know GGUF.

Transformers' own reader does the work (names, dequantisers, vocabulary). This module supplies what that
reader leaves out (sliding window, RoPE scaling, head size, pre-tokenisers that split digits) and refuses
what would come out silently wrong. Knows no GPTQ and no cache. Peak memory: the fp16 model (2 bytes a weight)
and a few fp32 copies of its largest tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.architectures import ARCHITECTURES
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.files import full_disk_said
from quantmill.types import Json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Notify = Callable[[str], None]

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32 = 0
# Vocabularies whose text is cut at every digit before GPT-2's pattern applies; Transformers knows none.
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"})
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_PLAIN_GPT2 = frozenset({"gpt-2", "gpt2", "default", ""})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: shape in torch order, ggml type number, first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A file's metadata (an array of strings only as its length) and its table of tensors."""

    keys: Json
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture"))

    def get(self, key: str) -> Any:
        """The value of `<architecture>.<key>`, None where the file does not say."""
        return self.keys.get(f"{self.architecture}.{key}")

    @property
    def parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.tensors.values())


class _Cursor:
    """Reads little-endian values one after the other. struct.error past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):  # vocabularies and merges: only walked over
                self.at += 8 + int(struct.unpack_from("<Q", self.data, self.at)[0])
            return count
        return [self.value(inner) for _ in range(count)]

    def tensor(self) -> tuple[str, TensorEntry]:
        name = self.text()
        dims = [self.number("Q") for _ in range(self.number("I"))]
        return name, TensorEntry(tuple(reversed(dims)), self.number("I"), self.number("Q"))


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensor table of a GGUF file, in a fraction of a second.

    Raises BadCheckpoint where the file is not GGUF, damaged, or shorter than its table says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadCheckpoint(f"{path} does not begin with the letters GGUF: fetch the file again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header, end = _parse(_Cursor(data))
            except (struct.error, KeyError) as error:
                raise BadCheckpoint(
                    f"the header of {path} is damaged or cut off: fetch the file again"
                ) from error
    if end > size:
        raise BadCheckpoint(f"{path} has {size} of {end} bytes: fetch the file again")
    return header


def _parse(cursor: _Cursor) -> tuple[GgufHeader, int]:
    """The header, and the size the file must have."""
    cursor.at = 4
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise UnsupportedModel(
            f"the file is GGUF version {version}; versions 2 and 3 (little-endian) are read"
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    keys: Json = {}
    for _ in range(key_count):
        name = cursor.text()
        keys[name] = cursor.value(cursor.number("I"))
    entries = dict(cursor.tensor() for _ in range(tensor_count))
    alignment = keys.get("general.alignment", 32)
    base = -(-cursor.at // alignment) * alignment
    placed = {name: TensorEntry(e.shape, e.kind, base + e.start) for name, e in entries.items()}
    return GgufHeader(keys, placed), max((e.start + _nbytes(e) for e in placed.values()), default=base)


def _nbytes(entry: TensorEntry) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
    return math.prod(entry.shape) // int(elements) * int(nbytes)


def convert(path: Path, out: Path, notify: Notify) -> None:
    """Write the model in `path` to the existing folder `out`: weights, configs, tokenizer, chat template.

    Raises UnsupportedModel (architecture, RoPE scaling) and BadCheckpoint (damaged, incomplete, not finite).
    """
    header = read_header(path)
    notify(f"converting {path.name}: {header.parameters / 1e6:.0f} M weights to fp16")
    config = write_papers(path, header, out, notify)
    try:
        model = _model(path, _plain(config))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadCheckpoint(f"Transformers cannot read {path}: {error}") from error
    with full_disk_said(out):
        model.save_pretrained(out, max_shard_size="4GB")
    config.save_pretrained(out)


def write_papers(path: Path, header: GgufHeader, out: Path, notify: Notify) -> PreTrainedConfig:
    """Write everything but the weights to `out`; config.json, too, which is returned. Raises as `convert`."""
    from transformers import AutoConfig

    _refuse_unknown(path, header)
    try:
        config = _complete(AutoConfig.from_pretrained(path.parent, gguf_file=path.name), path, header)
        tokenizer = _tokenizer(path, header, notify)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadCheckpoint(f"Transformers cannot read {path}: {error}") from error
    config.save_pretrained(out)
    _save_tokenizer(tokenizer, out)
    if card := _card(header.keys):
        (out / "README.md").write_text(card, encoding="utf-8")
    return config


# What a GGUF file says of its origin, and under which key a model card says it.
_CARD_KEYS = {"general.license": "license", "general.license.link": "license_link"}


def _card(keys: Json) -> str | None:
    """A model card with the facts that the file carries along: licence, name, maker. None where there are none."""
    import yaml

    facts = {ours: keys[theirs] for theirs, ours in _CARD_KEYS.items() if isinstance(keys.get(theirs), str)}
    named = {"name": keys.get("general.name"), "organization": keys.get("general.organization")}
    told = [f"- {what}: {value}" for what, value in named.items() if isinstance(value, str) and value]
    if not facts and not told:
        return None
    return (
        f"---\n{yaml.safe_dump(facts)}---\n\nFrom the metadata of the GGUF file:\n\n" + "\n".join(told) + "\n"
    )


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Under the class name that every release of Transformers knows, not this release's name for it."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    facts = json.loads(file.read_text())
    for passing in ("backend", "is_local", "local_files_only"):
        facts.pop(passing, None)
    facts["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _refuse_unknown(path: Path, header: GgufHeader) -> None:
    if header.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(f"{path.name} holds a {header.architecture!r} model; quantmill knows {known}")
    if header.get("rope.scaling.type") == "longrope" or "rope_factors_long.weight" in header.tensors:
        raise UnsupportedModel(
            f"{path.name} uses longrope scaling, which is lost in GGUF: use the original folder"
        )


def _tokenizer(path: Path, header: GgufHeader, notify: Notify) -> PreTrainedTokenizerFast:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: it would read all metadata once more, to arrive at the same class.
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        path.parent, gguf_file=path.name
    )
    backend = tokenizer.backend_tokenizer
    if header.keys.get("tokenizer.ggml.model") == "llama":
        _split_as_sentencepiece(backend, bool(header.keys.get("tokenizer.ggml.add_space_prefix", True)))
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        _split_as_bytes(backend, str(header.keys.get("tokenizer.ggml.pre", "")), notify)
    for role, key in _SPECIAL.items():
        if (token_id := header.keys.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, role, backend.id_to_token(token_id))  # 5.17 mixes them up
    return tokenizer


def _split_as_sentencepiece(backend: Tokenizer, space_first: bool) -> None:
    """A space goes before each stretch of text between special tokens, also where one is there already.

    So do SentencePiece, llama.cpp and the tokenizers of Llama 2 and Mistral v0.1.
    """
    from tokenizers import normalizers

    steps = [normalizers.Prepend("\u2581")] if space_first else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = None


def _split_as_bytes(backend: Tokenizer, name: str, notify: Notify) -> None:
    """Put right what Transformers splits as GPT-2 does because it does not know `tokenizer.ggml.pre`.

    Up to 5.17 it also gives byte-level vocabularies of Llama models SentencePiece's byte fallback and decoder.
    """
    from tokenizers import decoders, pre_tokenizers

    backend.model.byte_fallback = False
    backend.decoder = decoders.ByteLevel()
    if name in _DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, by_gpt2])
    elif name not in _PLAIN_GPT2:
        notify(f"text is split as GPT-2 does: how {name!r} does it is not known here, some tokens may differ")


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """What to read the weights as: llama.cpp, hence its tensor names, knows Mistral as llama."""
    from transformers import LlamaConfig

    return _recast(config, LlamaConfig) if config.model_type == "mistral" else config


def _model(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    import torch
    import transformers

    # From 5.23 on a GGUF's linears stay packed unless told otherwise; before that there was no choice.
    packing = getattr(transformers, "GgufConfig", None)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float16,
        output_loading_info=True,
        **({} if packing is None else {"quantization_config": packing(dequantize=True)}),
    )
    model: PreTrainedModel = loaded[0]
    report = loaded[1]
    if report["missing_keys"]:
        raise BadCheckpoint(
            f"{path} lacks {', '.join(sorted(report['missing_keys'])[:4])}: fetch the file again"
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise BadCheckpoint(f"{name} in {path} holds values that are not finite in fp16")
    return model


def _complete(config: PreTrainedConfig, path: Path, header: GgufHeader) -> PreTrainedConfig:
    """What Transformers read, and what the file says beyond that."""
    import numpy as np
    from transformers import MistralConfig

    window = header.get("attention.sliding_window")
    if config.model_type == "mistral" or (config.model_type == "llama" and window):
        config = _recast(config, MistralConfig)
    if window or config.model_type == "mistral":
        config.sliding_window = window or None
    head_dim = header.get("attention.key_length")
    if head_dim and hasattr(config, "head_dim"):
        config.head_dim = head_dim
    # An fp32 in the file: 9.999999747378752e-06 was meant as 1e-05.
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    config.rope_parameters = {**config.rope_parameters, **_rope_scaling(config, path, header)}
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = "float16"
    vars(config).pop("_model_name_or_path", None)  # the reader leaves general.name there
    return config


def _recast(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The same sizes as another model type; what the other type does not know is dropped."""
    known = set(kind().to_dict()) - {"model_type", "architectures", "sliding_window", "transformers_version"}
    return kind(**{key: value for key, value in config.to_dict().items() if key in known})


def _rope_scaling(config: PreTrainedConfig, path: Path, header: GgufHeader) -> Json:
    """RoPE scaling in Transformers' words; Llama 3's stands in the file only as a tensor of divisors."""
    if "rope_freqs.weight" in header.tensors:
        return _llama3_scaling(config, path, header.tensors["rope_freqs.weight"])
    kind = header.get("rope.scaling.type") or "none"
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(f"{path.name} scales RoPE by {kind!r}; linear, yarn and llama3 are known")
    scaling = {"rope_type": kind, "factor": header.get("rope.scaling.factor")}
    original = header.get("rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(config: PreTrainedConfig, path: Path, entry: TensorEntry) -> Json:
    """Recover the parameters behind the divisors (head_dim / 2,) float32; three of four are fixed."""
    import numpy as np

    count = math.prod(entry.shape)
    found = np.fromfile(path, dtype="<f4", count=count, offset=entry.start)
    low, high, original = 1.0, 4.0, 8192
    factor = float(found.max())
    theta = float(config.rope_parameters["rope_theta"])
    wavelength = 2 * math.pi * theta ** (np.arange(count) / count)
    blend = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if entry.kind != _F32 or not np.allclose(found, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
        raise UnsupportedModel(f"the RoPE divisors of {path.name} are not Llama 3's: use the original folder")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
