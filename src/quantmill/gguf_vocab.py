"""A Transformers tokenizer folder -> the vocabulary keys of a GGUF file, as llama.cpp's converter writes them.

Two kinds: byte-level BPE ("gpt2": tokens in GPT-2's byte letters, merges) and SentencePiece-like BPE with
byte fallback ("llama": tokens, scores; Llama 2, Mistral v0.1). Reads tokenizer.json, and tokenizer.model where
only that is there. Knows no weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.files import read_json
from quantmill.types import Json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

# What only this way of cutting text has in its pattern -> llama.cpp's name; the first that fits counts.
_PATTERNS = (
    (r"\p{Lu}", "tekken"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What `tokenizer.*` of a GGUF file says."""

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]  # llama.cpp's token types
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: dict[str, int]  # by the names in ROLES' values
    add_bos: bool
    add_eos: bool
    add_space: bool
    template: str | None
    notes: tuple[str, ...] = field(default=())  # what is not certain


def read_vocabulary(folder: Path, config: Json, size: int) -> Vocabulary:
    """The vocabulary of a model folder, padded to `size` rows of the embedding.

    Raises BadCheckpoint where there is no tokenizer, UnsupportedModel for kinds that GGUF has no name for.
    """
    settings = _optional(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder, config, settings, size)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, config, settings, size)
    raise BadCheckpoint(f"{folder} has no tokenizer.json or tokenizer.model: download the model again")


def chat_template(folder: Path, settings: Json) -> str | None:
    """The template that `apply_chat_template` would use by default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    stated = settings.get("chat_template") or _optional(folder / "chat_template.json").get("chat_template")
    if isinstance(stated, list):  # several by name
        named = {t.get("name"): t.get("template") for t in stated if isinstance(t, dict)}
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def _optional(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}


def _from_json(folder: Path, config: Json, settings: Json, size: int) -> Vocabulary:
    facts = read_json(folder / "tokenizer.json")
    model = facts.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedModel(f"{folder.name} has a {model.get('type')} tokenizer; GGUF is written for BPE")
    ids: dict[str, int] = dict(model["vocab"])
    added = {t["content"]: t for t in facts.get("added_tokens") or ()}
    ids |= {text: int(t["id"]) for text, t in added.items()}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ()]
    # Where characters stand for bytes nothing falls back; Transformers 5.17 says so of what it read from GGUF.
    of_bytes = '"ByteLevel"' in json.dumps(facts.get("pre_tokenizer"))
    bytewise = bool(model.get("byte_fallback")) and not of_bytes
    by_id = {number: text for text, number in ids.items()}
    kinds = [
        _kind(by_id.get(i), added, bytewise, model.get("unk_token")) for i in range(max(size, len(by_id)))
    ]
    pre, notes = ("default", ()) if bytewise else _pre_tokenizer(facts.get("pre_tokenizer") or {})
    starts, ends = _framed(facts.get("post_processor") or {}, ids, settings)
    return Vocabulary(
        model="llama" if bytewise else "gpt2",
        pre=pre,
        tokens=tuple(by_id.get(i, f"[PAD{i}]") for i in range(len(kinds))),
        kinds=tuple(kinds),
        scores=_scores(by_id, merges, len(kinds)) if bytewise else None,
        merges=None if bytewise else tuple(merges),
        special=_special(config, settings, ids),
        add_bos=starts,
        add_eos=ends,
        add_space=_spaced(facts),
        template=chat_template(folder, settings),
        notes=notes,
    )


def _kind(token: str | None, added: dict[str, Json], bytewise: bool, unknown: str | None) -> int:
    if token is None:
        return UNUSED
    if bytewise and token == unknown:
        return UNKNOWN
    if token in added:
        return CONTROL if added[token].get("special") else USER_DEFINED
    if bytewise and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL


def _scores(by_id: dict[int, str], merges: list[str], count: int) -> tuple[float, ...]:
    """What makes llama.cpp merge in the order of the merge list: minus the rank of a token's first merge."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), number)
    return tuple(-float(rank.get(by_id.get(i, ""), len(merges))) for i in range(count))


def _pre_tokenizer(facts: Json) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name for how text is cut before BPE."""
    steps = facts.get("pretokenizers") if facts.get("type") == "Sequence" else [facts]
    kinds = [step.get("type") for step in steps or ()]
    if kinds == ["ByteLevel"]:
        return "gpt-2", ()
    if kinds == ["Digits", "ByteLevel"] and (steps or [{}])[0].get("individual_digits"):
        return "smollm", ()
    text = json.dumps(facts, ensure_ascii=False)
    for pattern, name in _PATTERNS:
        if json.dumps(pattern, ensure_ascii=False)[1:-1] in text:
            return name, ()
    unknown = "how this tokenizer cuts text has no name here: llama.cpp will do it its default way"
    return "default", (unknown,)


def _spaced(facts: Json) -> bool:
    """Whether a space goes before the text: SentencePiece's dummy prefix."""
    return '"Prepend"' in json.dumps(facts.get("normalizer")) or '"prepend_scheme": "first"' in json.dumps(
        facts.get("pre_tokenizer")
    )


def _framed(processor: Json, ids: dict[str, int], settings: Json) -> tuple[bool, bool]:
    """Whether the tokenizer puts the beginning and the end of sequence around a text."""
    template: list[Any] = []
    for step in processor.get("processors") or [processor]:
        if step.get("type") == "TemplateProcessing":
            template = step.get("single") or []
    starts = bool(template) and "SpecialToken" in template[0]
    ends = bool(template) and "SpecialToken" in template[-1]
    stated = settings.get("add_bos_token"), settings.get("add_eos_token")
    return bool(starts if stated[0] is None else stated[0]), bool(ends if stated[1] is None else stated[1])


def _special(config: Json, settings: Json, ids: dict[str, int]) -> dict[str, int]:
    """Ids of the special tokens: the tokenizer's word, else config.json's."""
    found = {}
    for role, key in ROLES.items():
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = ids.get(text) if isinstance(text, str) else None
        if number is None:
            number = config.get(f"{role}_token_id")
            number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            found[key] = number
    return found


def _from_sentencepiece(folder: Path, config: Json, settings: Json, size: int) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    model.LoadFromFile(str(folder / "tokenizer.model"))
    count = model.GetPieceSize()
    pieces = [model.IdToPiece(i) for i in range(count)]
    tokens = [*pieces, *(f"[PAD{i}]" for i in range(count, size))]
    tests = (
        (model.IsUnknown, UNKNOWN),
        (model.IsControl, CONTROL),
        (model.IsByte, BYTE),
        (model.IsUnused, UNUSED),
    )
    kinds = [next((kind for test, kind in tests if test(i)), NORMAL) for i in range(count)]
    scores = [model.GetScore(i) for i in range(count)]
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tuple(tokens),
        kinds=(*kinds, *[UNUSED] * (len(tokens) - count)),
        scores=(*scores, *[-1000.0] * (len(tokens) - count)),
        merges=None,
        special=_special(config, settings, {p: i for i, p in enumerate(pieces)}),
        add_bos=bool(settings.get("add_bos_token", True)),
        add_eos=bool(settings.get("add_eos_token", False)),
        add_space=True,
        template=chat_template(folder, settings),
    )
