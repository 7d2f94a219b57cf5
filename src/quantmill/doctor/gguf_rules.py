"""A `.gguf` file against what its readers need: complete, nothing infinite, metadata and vocabulary that fit.

    path -> read_header -> rules (findings) -> CheckReport

What llama.cpp asks for is in its llama-model.cpp (keys, tensors) and llama-vocab.cpp. Reads scales, not codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from quantmill.architectures import ARCHITECTURES
from quantmill.doctor.folder_rules import manifest_findings
from quantmill.doctor.lines import error, ok, some, warning
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.formats.gguf import BY_NUMBER, FLOAT_TYPES, halves, row_bytes
from quantmill.formats.gguf_linear import BITS_OF
from quantmill.gguf_source import GgufHeader, TensorEntry, read_header
from quantmill.types import CheckReport, Finding, Level

LOADERS = ("llama.cpp", "quantmill", "transformers")
KEYS = (  # of an architecture, without which llama.cpp does not open a file
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
OUTER = ("token_embd.weight", "output_norm.weight")
ROWS_AT_ONCE = 1 << 16  # blocks whose scales are looked at together
_FLOATS = {FLOAT_TYPES["F32"]: np.float32, FLOAT_TYPES["F16"]: np.float16}


def check_gguf(path: Path, *, hashes: bool = True) -> CheckReport:
    """Everything that can be said of a `.gguf` file without running it; `hashes`: its folder's manifest, too."""
    try:
        header = read_header(path)
    except (BadCheckpoint, UnsupportedModel) as fault:
        finding = Finding(Level.ERROR, path.name, str(fault))
        return CheckReport((finding,), dict.fromkeys(LOADERS, "the file cannot be opened"))
    size = path.stat().st_size / 1e6
    sound = f"{len(header.tensors)} tensors, {size:.1f} MB; the header is sound, no byte missing"
    found = [ok(path.name, sound)]
    found += [f for rule in RULES for f in rule(header)]
    found += list(_values(path, header))
    found += list(manifest_findings(path.parent)) if hashes else []
    return CheckReport(tuple(found), _verdicts(header, found))


def _verdicts(header: GgufHeader, found: list[Finding]) -> dict[str, str]:
    """Per reader "yes" or why not: an error stops all of them, quantmill reads fewer types and families."""
    errors = [f"{f.where}: {f.message}" for f in found if f.level is Level.ERROR]
    verdicts = dict.fromkeys(LOADERS, errors[0] if errors else "yes")
    strange = {e.kind for e in header.tensors.values()} - set(BY_NUMBER) - set(FLOAT_TYPES.values())
    if not errors and strange:
        verdicts["quantmill"] = f"ggml types {', '.join(map(str, sorted(strange)))} are not read"
    if not errors and header.architecture not in ARCHITECTURES:
        verdicts["quantmill"] = f"it does not know {header.architecture} models"
    return verdicts


def _types(header: GgufHeader) -> Iterator[Finding]:
    names = {t.number: t.name for t in BY_NUMBER.values()} | {n: name for name, n in FLOAT_TYPES.items()}
    linears = [e.kind for n, e in header.tensors.items() if n.startswith("blk.") and len(e.shape) > 1]
    counts = Counter(names.get(kind, f"ggml type {kind}") for kind in linears)
    yield ok("linears", ", ".join(f"{n} {name}" for name, n in counts.most_common()))
    own = sum(names.get(kind) in BITS_OF for kind in linears)
    yield ok("quantmill", f"{own} of {len(linears)} linears run from their own codes, the others in float16")


def _keys(header: GgufHeader) -> Iterator[Finding]:
    lacking = [f"{header.architecture}.{key}" for key in KEYS if header.get(key) is None]
    if lacking:
        yield error(some(lacking), "missing: llama.cpp does not open the file; make it again")
    else:
        yield ok("metadata", f"complete for a {header.architecture} model")


def _tensors(header: GgufHeader) -> Iterator[Finding]:
    """Every block has what any block has, and the outer tensors are there."""
    count = int(header.get("block_count") or 0)
    kinds = {name.split(".", 2)[2] for name in header.tensors if name.startswith("blk.")}
    wanted = (*OUTER, *(f"blk.{i}.{kind}" for i in range(count) for kind in sorted(kinds)))
    lacking = [name for name in wanted if name not in header.tensors]
    if lacking:
        yield error(some(lacking), "missing: fetch the file again, or make it again")
    else:
        tied = "" if "output.weight" in header.tensors else ", the output head is the embedding"
        yield ok("model", f"all tensors of {count} blocks are there{tied}")


def _vocabulary(header: GgufHeader) -> Iterator[Finding]:
    tokens, embedding = header.keys.get("tokenizer.ggml.tokens"), header.tensors.get(OUTER[0])
    model = header.keys.get("tokenizer.ggml.model")
    if tokens is None or model is None:
        yield error(
            "tokenizer", "the vocabulary is missing: make the file again from a folder with a tokenizer"
        )
        return
    if embedding is not None and tokens != embedding.shape[0]:
        yield error("tokenizer", f"{tokens} tokens, but the embedding has {embedding.shape[0]} rows")
    elif model == "gpt2" and not header.keys.get("tokenizer.ggml.merges"):
        yield error("tokenizer", "a byte-level vocabulary without merges: make the file again")
    else:
        yield ok("tokenizer", f"{tokens} tokens, as many as the embedding has rows")
    if model == "gpt2" and "tokenizer.ggml.pre" not in header.keys:
        yield warning("tokenizer.ggml.pre", "missing: llama.cpp cuts text as GPT-2 does, which may be wrong")
    if "tokenizer.ggml.eos_token_id" not in header.keys:
        yield warning("tokenizer.ggml.eos_token_id", "missing: generation may not stop")
    if "tokenizer.chat_template" in header.keys:
        yield ok("chat template", "present")
    else:
        yield warning("chat template", "missing: readers fall back to one of their own")


def _values(path: Path, header: GgufHeader) -> Iterator[Finding]:
    """Scales, minima and plain values that are infinite or no numbers."""
    data = np.memmap(path, np.uint8, mode="r")
    broken = [name for name, entry in header.tensors.items() if not _finite(data, entry)]
    if broken:
        yield error(some(broken), "holds values that are infinite or no numbers: fetch or make it again")
    else:
        yield ok("scales", "all are finite")


def _finite(data: np.memmap, entry: TensorEntry) -> bool:
    columns, rows = entry.shape[-1], int(np.prod(entry.shape[:-1]))
    if (plain := _FLOATS.get(entry.kind)) is not None:
        nbytes = rows * columns * np.dtype(plain).itemsize
        values = data[entry.start : entry.start + nbytes].view(plain)
        return bool(np.isfinite(values).all())
    if (kind := BY_NUMBER.get(entry.kind)) is None:
        return True
    raw = data[entry.start : entry.start + rows * row_bytes(kind, columns)].reshape(-1, kind.nbytes)
    parts = (raw[i : i + ROWS_AT_ONCE] for i in range(0, len(raw), ROWS_AT_ONCE))
    return all(np.isfinite(half).all() for part in parts for half in halves(kind, part))


RULES: tuple[Callable[[GgufHeader], Iterator[Finding]], ...] = (_types, _keys, _tensors, _vocabulary)
