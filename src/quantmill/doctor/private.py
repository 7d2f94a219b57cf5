"""What in a folder tells of its maker's disk: reports of older runs, configs of older tools, a card.

Reports and configs are mended (`check --fix`), texts are only found. Opens no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantmill.doctor.lines import some, warning
from quantmill.errors import BadCheckpoint
from quantmill.files import read_json, write_json
from quantmill.manifest import files_of
from quantmill.portable import public_json, public_name, public_text
from quantmill.types import Finding, Json

REPORTS = "*_report.json"
# Keys of other files that tools fill with paths: Transformers did so for years.
KEYS = {
    "config.json": ("_name_or_path", "quantization_config"),
    "quantize_config.json": ("model_name_or_path", "meta"),
    "tokenizer_config.json": ("name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file"),
    "special_tokens_map.json": ("name_or_path",),
    "generation_config.json": ("_name_or_path",),
    "adapter_config.json": ("base_model_name_or_path",),
}
TEXTS = (".md", ".txt", ".svg", ".html", ".yaml", ".yml", ".log", ".jsonl")
LONGEST = 16_000_000  # bytes of a text that is looked through


def cleaned(folder: Path) -> dict[str, Json]:
    """Every paper that holds paths, by its name, as it is without them."""
    found = {}
    for name in sorted({p.name for p in folder.glob(REPORTS)} | KEYS.keys()):
        try:
            before = read_json(folder / name) if (folder / name).is_file() else None
        except BadCheckpoint:
            continue  # another rule's finding
        if before is not None and (after := _clean(name, before)) != before:
            found[name] = after
    return found


def _clean(name: str, paper: Json) -> Json:
    if name not in KEYS:
        cut: Json = public_json(paper)
        return cut
    return paper | {k: _clean_key(paper[k]) for k in KEYS[name] if k in paper}


def _clean_key(value: object) -> object:
    return public_text(public_name(value)) if isinstance(value, str) else public_json(value)


def telling_texts(folder: Path) -> tuple[str, ...]:
    """Texts that name this folder's place, or this user's home."""
    places = [p for p in (folder.resolve().parent, Path.home()) if len(p.parts) > 2]
    needles = [f"{place}".encode() for place in places]
    texts = {n: p for n, p in files_of(folder).items() if p.suffix in TEXTS and p.stat().st_size < LONGEST}
    return tuple(n for n, p in texts.items() if any(needle in p.read_bytes() for needle in needles))


def privacy_findings(folder: Path) -> Iterator[Finding]:
    """What `publish` refuses to send."""
    if papers := cleaned(folder):
        yield warning(some(papers), "holds paths of its maker's disk: type quantmill check --fix")
    if texts := telling_texts(folder):
        yield warning(some(texts), "names a folder of this machine: type quantmill card, or take it out")


def papers(copy: Path, base: Path | None) -> Iterator[str]:
    """A mend: names instead of paths."""
    for name, paper in cleaned(copy).items():
        write_json(copy / name, paper)
        yield f"{name}: paths cut to their last part"
