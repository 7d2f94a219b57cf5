"""The card of a GGUF repository: folders with one `.gguf` file each in, README.md out. Knows no GPTQ.

States only what the files' headers and the reports beside them hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadCheckpoint
from quantmill.files import write_text
from quantmill.gguf_source import read_header
from quantmill.hub.card import CARD, HOST, NO_OWNER, Names, Siblings, licence_line, link_to, model_name
from quantmill.hub.card_facts import (
    ORIGINAL_CARD,
    Making,
    OriginalCard,
    Source,
    parse_card,
    read_making,
    read_measured,
)
from quantmill.hub.card_format import NOT_MEASURED, NOT_RECORDED, kl_with_interval, markdown_table, size
from quantmill.hub.card_prompt import PROMPT, read_prompt
from quantmill.hub.card_sections import recipes
from quantmill.types import EvalReport

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

ENDING = ".gguf"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file and what is known of it."""

    name: str  # of its type or mix: Q4_K_M
    path: Path
    size_bytes: int
    parameters: int
    architecture: str
    making: Making | None
    measured: EvalReport | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.parameters


def gguf_folders(folder: Path) -> tuple[Path, ...]:
    """The folder itself where it holds a `.gguf` file, else those of its sub-folders that do; () if none."""
    if not folder.is_dir():
        return ()
    places = (folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    found = tuple(p for p in places if any(p.glob(f"*{ENDING}")))
    return found[:1] if folder in found else found


def read_files(folder: Path) -> tuple[GgufFile, ...]:
    """Every `.gguf` file of a repository, smallest first. Raises BadCheckpoint for a damaged one, or for none."""
    found = [
        _read(path, place) for place in gguf_folders(folder) for path in sorted(place.glob(f"*{ENDING}"))
    ]
    if not found:
        raise BadCheckpoint(
            f"{folder} holds no {ENDING} file: run quantmill quantize --format gguf:TYPE first"
        )
    return tuple(sorted(found, key=lambda f: (f.size_bytes, f.name)))


def _read(path: Path, place: Path) -> GgufFile:
    header = read_header(path)
    named = path.name.removesuffix(ENDING).rpartition(".")[2]
    return GgufFile(
        named,
        path,
        path.stat().st_size,
        header.parameters,
        header.architecture,
        read_making(place),
        read_measured(place),
    )


def write_gguf_card(folder: Path, *, name: str | None = None, siblings: Siblings | None = None) -> Path:
    """Write README.md into the repository's folder; returns its path. `name` as for `write_card`."""
    files = read_files(folder)
    sources = {f.making.source for f in files if f.making and f.making.source}
    source = sources.pop() if len(sources) == 1 else None
    names = model_name(source.name if source else folder.resolve().name, source, name, None, "GGUF")
    original = _original(files)
    text = _render(files, names, source, original, siblings or Siblings())
    write_text(folder / CARD, text)
    return folder / CARD


def _original(files: tuple[GgufFile, ...]) -> OriginalCard | None:
    for path in (f.path.parent / ORIGINAL_CARD for f in files):
        if path.is_file():
            return parse_card(path.read_text(encoding="utf-8", errors="replace"))
    return None


def _header(
    files: tuple[GgufFile, ...], names: Names, source: Source | None, original: OriginalCard | None
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    header = original.header if original else {}
    hub_id = source.hub_id if source else None
    return ModelCardData(
        base_model=hub_id,
        language=header.get("language"),
        license=header.get("license") or "unknown",
        license_name=header.get("license_name"),
        license_link=header.get("license_link"),
        model_name=names.model,
        pipeline_tag="text-generation",
        tags=["gguf", "quantmill"],
        base_model_relation="quantized" if hub_id else None,
        inference=False,
        model_creator=names.creator,
        model_type=files[0].architecture,
        quantized_by=names.owner or ("quantmill" if files[0].making else None),
    )


def _table(files: tuple[GgufFile, ...]) -> str:
    head = ("File", "Type", "Size", "Bits per weight", "Mean loss of the linears", "Mean KL", "Perplexity")
    return markdown_table(head, (_row(f) for f in files))


def _row(file: GgufFile) -> list[str]:
    losses = [m.loss for m in file.making.modules] if file.making else []
    return [
        f"`{file.path.name}`",
        file.name,
        size(file.size_bytes),
        f"{file.bits_per_weight:.2f}",
        f"{mean(losses):.3g}" if losses else NOT_RECORDED,
        kl_with_interval(file.measured) if file.measured else NOT_MEASURED,
        f"{file.measured.perplexity:.3f}" if file.measured else NOT_MEASURED,
    ]


def _render(
    files: tuple[GgufFile, ...],
    names: Names,
    source: Source | None,
    original: OriginalCard | None,
    siblings: Siblings,
) -> str:
    import jinja2

    prompt = read_prompt(files[0].path.parent)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantmill.hub"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # markdown, not HTML
    )
    hub_id = source.hub_id if source else None
    context: dict[str, Any] = {
        "names": names,
        "siblings": siblings,
        "files": files,
        "sizes": f"{size(files[0].size_bytes)} to {size(files[-1].size_bytes)}",
        "middle": next((f for f in files if f.name == "Q4_K_M"), files[len(files) // 2]),
        "provided_files": _table(files),
        "recipes": recipes(files),
        "prompt": prompt,
        "placeholder": NO_OWNER,
        "plain_prompt": PROMPT,
        "creator": names.creator or NOT_RECORDED,
        "original": f"[{hub_id}]({HOST}/{hub_id})" if hub_id else (source.name if source else NOT_RECORDED),
        "original_card": original.text if original else None,
        "licence": licence_line(original.header if original else {}),
        "link": link_to,
        "table": markdown_table,
        "made_here": any(f.making for f in files),
    }
    page = environment.get_template("card_gguf.md.j2").render(context)
    header = _header(files, names, source, original).to_yaml()
    return f"---\n{header}\n---\n\n{page.strip()}\n"
