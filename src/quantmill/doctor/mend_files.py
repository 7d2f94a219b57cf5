"""Mends that rename files, or take them from the original model. Each changes a copy and says what it did."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from quantmill.errors import BadCheckpoint
from quantmill.files import read_json, write_json, write_text
from quantmill.formats.container import read_header
from quantmill.types import Json
from quantmill.weights import INDEX, WEIGHTS, find_weights, shard_name, write_index

QUANTIZE_CONFIG = "quantize_config.json"
TEMPLATE = "chat_template.jinja"
# What other tools and hands call these files.
OTHER_NAMES = {
    QUANTIZE_CONFIG: ("quant_config.json", "quantization_config.json", "quantise_config.json"),
    TEMPLATE: ("chat_template.jinja2", "chat_template.j2", "chat-template.jinja", "chat_template.txt"),
    "tokenizer.model": ("spiece.model", "sentencepiece.bpe.model"),
}
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def weight_names(copy: Path, base: Path | None) -> Iterator[str]:
    """Weights get the names that Transformers looks for, shards an index."""
    quant = _json(copy / "config.json").get("quantization_config") or _json(copy / QUANTIZE_CONFIG)
    files, _ = find_weights(copy, quant if isinstance(quant, dict) else {})
    count = len(files)
    names = [WEIGHTS] if count == 1 else [shard_name(i, count) for i in range(count)]
    has_index = count == 1 or (copy / INDEX).is_file()
    if [f.name for f in files] == names and has_index:
        return
    tensors = {tensor: (info.nbytes, file) for file in files for tensor, info in read_header(file).items()}
    for index in copy.glob("*.safetensors.index.json"):
        index.unlink()
    renamed = dict(zip(files, names, strict=True))
    waiting = {file: file.with_name(f".{file.name}.renamed") for file in files}
    for file, parked in waiting.items():  # in two steps: one's new name may be another's old one
        file.rename(parked)
    for file, name in renamed.items():
        waiting[file].rename(copy / name)
        if file.name != name:
            yield f"{name}: was called {file.name}"
    if count > 1:
        write_index(
            copy, {t: renamed[f] for t, (_, f) in tensors.items()}, sum(n for n, _ in tensors.values())
        )
        yield f"{INDEX}: written"


def paper_names(copy: Path, base: Path | None) -> Iterator[str]:
    """Files under names that no loader looks for."""
    for name, others in OTHER_NAMES.items():
        found = next((copy / other for other in others if (copy / other).is_file()), None)
        if found is not None and not (copy / name).exists():
            found.rename(copy / name)
            yield f"{name}: was called {found.name}"


def companions(copy: Path, base: Path | None) -> Iterator[str]:
    """Tokenizer, template and generation config of the original, where they are missing."""
    if base is not None:
        if not _has_tokenizer(copy) and _has_tokenizer(base):
            yield from _take(base, copy, TOKENIZER_FILES)
        yield from _take(base, copy, ("tokenizer_config.json", "generation_config.json"))
        if not template_of(copy) and (text := template_of(base)):
            write_text(copy / TEMPLATE, text)
            yield f"{TEMPLATE}: taken from the original"
    if not (copy / "generation_config.json").is_file():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = _json(copy / "config.json")
        found = {k: config[k] for k in tokens if config.get(k) is not None}
        if found:
            write_json(copy / "generation_config.json", found)
            yield f"generation_config.json: written from config.json ({', '.join(found)})"


def _has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZERS)


def template_of(folder: Path) -> str | None:
    """The chat template of a folder, wherever it is kept."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(folder / name).get("chat_template")
        if isinstance(template, str) and template:
            return template
    return None


def _take(base: Path, copy: Path, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if (base / name).is_file() and not (copy / name).exists():
            shutil.copyfile(base / name, copy / name)
            yield f"{name}: taken from the original"


def _json(path: Path) -> Json:
    """What is in a file, nothing where it is missing or no JSON."""
    try:
        return read_json(path)
    except BadCheckpoint:
        return {}
