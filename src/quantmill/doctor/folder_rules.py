"""Rules about a folder as a whole: weight files, both configs, the model's parts, what belongs beside them.

Each yields its findings, also the good ones. Opens no file but the small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from quantmill import manifest
from quantmill.doctor.facts import Facts
from quantmill.doctor.lines import NAMED, error, ok, some, warning
from quantmill.errors import BadCheckpoint
from quantmill.files import read_json
from quantmill.types import Finding, Json, Level
from quantmill.weights import PICKLES

NEEDED_KEYS = ("quant_method", "bits", "group_size", "desc_act", "sym")
# Keys that both JSON files carry. The first decide how bytes are read, the others tell how they were made.
DECISIVE_KEYS = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")
OTHER_KEYS = ("lm_head", "true_sequential", "damp_percent", "static_groups")
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def _weights(facts: Facts) -> Iterator[Finding]:
    tensors, files = facts.checkpoint.tensors, facts.checkpoint.files
    size = sum(info.nbytes for info in tensors.values()) / 1e6
    listed = ", ".join(f.name for f in files[:NAMED]) + (", ..." if len(files) > NAMED else "")
    yield ok(
        listed or "weights", f"{len(tensors)} tensors, {size:,.1f} MB; headers are sound, no file missing"
    )
    stray = sorted({f.name for f in facts.checkpoint.folder.glob("*.safetensors")} - {f.name for f in files})
    if stray:
        yield warning(some(stray), "weight files that belong to no index and are not read: remove them")
    pickled = sorted(f.name for f in facts.checkpoint.folder.iterdir() if f.suffix in PICKLES)
    if pickled:
        yield warning(some(pickled), "pickled files, which can run code when opened: remove them")
    if facts.checkpoint.quant is not None and not facts.checkpoint.quantized_modules():
        yield error("weights", "the config speaks of quantisation, no module is packed: quantise again")
    if facts.broken_tensors:
        yield error(some(facts.broken_tensors), "NaN or infinite values: make or download it again")


def _configs(facts: Facts) -> Iterator[Finding]:
    folder, stated = facts.checkpoint.folder, facts.checkpoint.config.get("quantization_config")
    if not facts.quantized:
        yield warning("config.json", "no quantization_config and no packed weights: not a quantised model")
        return
    if not facts.checkpoint.config.get("model_type"):
        yield error("config.json", "no model_type: no program can build the model; take the original's file")
    if facts.config_fault:
        yield error("config.json", facts.config_fault)
    if stated is None:
        yield warning(
            "config.json", "no quantization_config: only quantmill reads it so; type quantmill check --fix"
        )
    if (stated or {}).get("quant_method", "gptq") != "gptq":
        return  # the other methods have no second file, and keys of their own
    yield from _missing_keys(stated or {})
    if (folder / "quantize_config.json").is_file():
        yield from _drift(folder, stated)
    else:
        yield warning(
            "quantize_config.json", "missing: older loaders look for it; type quantmill check --fix"
        )


def _missing_keys(stated: Json) -> Iterator[Finding]:
    lacking = [k for k in NEEDED_KEYS if k not in stated]
    if stated and lacking:
        names = ", ".join(lacking)
        yield warning(
            "config.json",
            f"quantization_config lacks {names}: loaders refuse or guess; type quantmill check --fix",
        )


def _drift(folder: Path, stated: Json | None) -> Iterator[Finding]:
    """Whether quantize_config.json says what config.json says."""
    try:
        other = read_json(folder / "quantize_config.json")
    except BadCheckpoint as fault:
        yield error("quantize_config.json", str(fault))
        return
    if stated is None:
        return
    shared = {k for k in (*DECISIVE_KEYS, *OTHER_KEYS) if k in stated and k in other}
    for level, keys in ((Level.ERROR, DECISIVE_KEYS), (Level.WARNING, OTHER_KEYS)):
        for key in (k for k in keys if k in shared and stated[k] != other[k]):
            said = f"{key} is {other[key]!r}, config.json says {stated[key]!r}: correct one of them"
            yield Finding(level, "quantize_config.json", said)
    if all(stated[k] == other[k] for k in shared):
        yield ok("quantize_config.json", "agrees with config.json")


def _companions(facts: Facts) -> Iterator[Finding]:
    folder = facts.checkpoint.folder
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        yield error("tokenizer", "no tokenizer.json, tokenizer.model or vocab.json: copy the original's")
    elif not (folder / "tokenizer_config.json").is_file():
        yield warning("tokenizer_config.json", "missing: special tokens may be lost; copy the original's")
    else:
        yield ok("tokenizer", "present")
    if _has_template(folder):
        yield ok("chat template", "present")
    else:
        yield warning("chat template", "missing: fine for a base model, a chat model needs the original's")
    if (folder / "generation_config.json").is_file():
        yield ok("generation_config.json", "present")
    else:
        yield warning("generation_config.json", "missing: generation may not stop; copy the original's")


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except BadCheckpoint:
        return False


def _architecture(facts: Facts) -> Iterator[Finding]:
    """Every linear of the model is there, packed or not, and so is everything else it needs."""
    expected, tensors = facts.expected, facts.checkpoint.tensors
    if expected is None:
        yield warning("config.json", f"whether tensors are missing was not checked: {facts.expected_fault}")
        return
    packed = set(facts.checkpoint.quantized_modules())
    plain = {name for name in expected.linears if f"{name}.weight" in tensors}
    absent = [name for name in expected.linears if name not in packed | plain]
    if absent:
        yield error(some(absent), "neither packed nor plain weights: download or quantise again")
    if packed & plain:
        yield warning(some(sorted(packed & plain)), "packed and plain weights both: loaders may take either")
    if packed and plain - packed:
        yield warning(some(sorted(plain - packed)), "not quantised: loaders that fuse layers may refuse")
    unknown = sorted(packed - set(expected.linears) - {"lm_head"})
    if unknown:
        yield warning(some(unknown), f"packed, but no linear of a {facts.checkpoint.config['model_type']}")
    biased = [m for m, shape in expected.linears.items() if shape.bias and f"{m}.bias" not in tensors]
    if biased:
        yield error(some(biased), "the bias is missing: download or quantise again")
    if not absent and not biased:
        yield ok("model", f"all {len(expected.linears)} linears are there, {len(packed)} packed")


def _embeddings(facts: Facts) -> Iterator[Finding]:
    expected, tensors = facts.expected, facts.checkpoint.tensors
    if expected is None:
        return
    lost = [
        n
        for n in expected.tensors
        if n not in tensors and n.removesuffix("weight") + "qweight" not in tensors
    ]
    if lost:
        yield error(some(lost), "missing: download or quantise again")
        return
    has_head = any(f"lm_head.{suffix}" in tensors for suffix in ("weight", "qweight"))
    head = "with its own output head"
    if expected.tied:
        head = "output head tied to them"
        if has_head:
            yield warning("lm_head", "stored, though tie_word_embeddings makes loaders ignore it: remove it")
    yield ok("embeddings", f"embeddings and norms are there, {head}")


def manifest_findings(folder: Path) -> Iterator[Finding]:
    """Every file against the hash that its maker noted. Reads all of the folder."""
    try:
        sums = manifest.read_manifest(folder)
    except BadCheckpoint as fault:
        yield error(manifest.NAME, str(fault))
        return
    if sums is None:
        return
    found = {n: manifest.sha256_of(p) for n, p in manifest.files_of(folder).items() if n in sums}
    changed = manifest.differing(sums, found)
    weights = [n for n in changed if n.endswith((".safetensors", ".gguf"))]
    others = [n for n in changed if n not in weights]
    if weights:
        yield error(
            some(weights), f"not what {manifest.NAME} says: damaged or replaced; make or download again"
        )
    if others:
        yield warning(some(others), f"not what {manifest.NAME} says: changed by hand, or lost")
    if not changed:
        yield ok(manifest.NAME, f"{len(sums)} files have the hashes that their maker noted")


# An error of the first is damage that no loader survives.
TENSOR_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (_weights, _architecture, _embeddings)
PAPER_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (_configs, _companions)
