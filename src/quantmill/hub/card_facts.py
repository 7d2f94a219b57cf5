"""What a model card may state: all that the files in branch folders record, or that can be measured on them.

Folders in, frozen facts out. A value that no file holds is None, and the card then says so. Reads JSON and
headers of weight files only; knows no markdown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.errors import BadCheckpoint, SourceNotFound
from quantmill.files import read_json
from quantmill.hub.variants import MAIN, branch_name
from quantmill.types import EvalReport, Json, ModuleReport, QuantConfig

QUANTIZE_REPORT = "quantize_report.json"
EVAL_REPORT = "eval_report.json"
CHECK_REPORT = "check_report.json"
ORIGINAL_CARD = "ORIGINAL_CARD.md"
PACKED = ("qweight", "qzeros", "scales", "g_idx")

_HUB_ID = re.compile(r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(?::(?P<branch>[\w./-]+))?")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """The original model, as the user named it: on a hub, or a folder or file of theirs."""

    typed: str

    @property
    def hub_id(self) -> str | None:
        """`owner/name`, or None for a folder or file."""
        found = _HUB_ID.fullmatch(self.typed)
        local = self.typed.endswith(".gguf") or self.typed.startswith(".") or Path(self.typed).exists()
        return None if local or not found else f"{found['owner']}/{found['name']}"

    @property
    def name(self) -> str:
        """The model's name without owner, folders or ending: the maker's paths are nobody's business."""
        return (self.hub_id or self.typed).rstrip("/").rpartition("/")[2].removesuffix(".gguf")


@dataclass(frozen=True, slots=True)
class Calibration:
    """The data that the weights were fitted on."""

    dataset: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    tokens: int | None = None
    seed: int | None = None
    fingerprint: str | None = None
    documents: int | None = None
    dropped: int | None = None


@dataclass(frozen=True, slots=True)
class Making:
    """A `quantize_report.json`."""

    quantmill: str | None
    source: Source | None
    preset: str | None
    command: str | None
    versions: tuple[tuple[str, str], ...]
    calibration: Calibration
    seconds: float | None
    peak_ram_bytes: int | None
    modules: tuple[ModuleReport, ...]


@dataclass(frozen=True, slots=True)
class BranchFacts:
    """One branch folder."""

    name: str
    folder: Path
    config: QuantConfig
    damp_percent: float | None  # None where no file records it, unlike config's
    true_sequential: bool | None  # likewise
    size_bytes: int  # of the weight files
    bits_per_weight: float | None  # of the quantised linears, scales and all
    shapes: tuple[tuple[int, int], ...]  # (in, out) of the quantised linears, each once
    model: Json = field(repr=False)  # config.json
    making: Making | None = None
    calibration: Calibration = Calibration()
    measured: EvalReport | None = None
    loaders: Mapping[str, str] | None = None  # from `quantmill check`: "yes", or the reason why not
    modules_by_bits: Mapping[int, int] = field(default_factory=dict)  # where modules differ; else empty

    @property
    def all_bits(self) -> tuple[int, ...]:
        """The bits that some module has."""
        return tuple(sorted(self.modules_by_bits)) or (self.config.bits,)


@dataclass(frozen=True, slots=True)
class OriginalCard:
    """The card of the model that was quantised: its YAML header, parsed, and the text below."""

    header: Json
    text: str


@dataclass(frozen=True, slots=True)
class RepositoryFacts:
    """All branches, `main` first, and what they share."""

    folder: Path
    branches: tuple[BranchFacts, ...]
    source: Source | None  # None where unrecorded, or where branches disagree
    original: OriginalCard | None


def read_repository(folder: Path) -> RepositoryFacts:
    """A folder of branch folders, or one branch folder.

    Raises SourceNotFound where it is no folder, BadCheckpoint where it holds no branch or a damaged one.
    """
    folders = branch_folders(folder)
    branches = tuple(sorted((read_branch(f, _name(f, folder)) for f in folders), key=_order))
    sources = {b.making.source for b in branches if b.making and b.making.source}
    source = sources.pop() if len(sources) == 1 else None
    return RepositoryFacts(folder, branches, source, _original_card(folder, branches, source))


def branch_folders(folder: Path) -> tuple[Path, ...]:
    """The folder itself where it is a branch, else those of its sub-folders that have a config.json."""
    if not folder.is_dir():
        raise SourceNotFound(f"{folder} is no folder: give the one that `quantmill quantize --out` wrote")
    if (folder / "config.json").is_file():
        return (folder,)
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = tuple(p for p in inside if (p / "config.json").is_file())
    if not found:
        raise BadCheckpoint(
            f"{folder} has no branch folder with a config.json: run `quantmill quantize` first"
        )
    return found


def read_branch(folder: Path, name: str | None = None) -> BranchFacts:
    """One branch; `name` None takes the name in its report, or the one that its parameters have."""
    checkpoint = open_checkpoint(folder)
    config, quant = checkpoint.quant_config, checkpoint.quant or {}
    report, making = _optional_json(folder / QUANTIZE_REPORT), read_making(folder)
    check = _optional_json(folder / CHECK_REPORT)
    shapes = [checkpoint.module_size(module) for module in checkpoint.quantized_modules()]
    return BranchFacts(
        name=name or _text((report or {}).get("branch")) or branch_name(config),
        folder=folder,
        config=config,
        damp_percent=_recorded(quant, "damp_percent", float),
        true_sequential=_recorded(quant, "true_sequential", bool),
        size_bytes=sum(file.stat().st_size for file in checkpoint.files),
        bits_per_weight=_bits_per_weight(checkpoint, shapes),
        shapes=tuple(dict.fromkeys(shapes)),
        model=checkpoint.config,
        making=making,
        calibration=making.calibration if making else _foreign_calibration(quant),
        measured=read_measured(folder),
        loaders=_loaders(check),
        modules_by_bits=_modules_by_bits(checkpoint),
    )


def _modules_by_bits(checkpoint: Checkpoint) -> dict[int, int]:
    counts = Counter(checkpoint.module_config(m).bits for m in checkpoint.quantized_modules())
    return dict(sorted(counts.items())) if len(counts) > 1 else {}


def _name(folder: Path, root: Path) -> str | None:
    return None if folder == root else folder.name


def _order(branch: BranchFacts) -> tuple[object, ...]:
    """`main`, then by bits, then from coarse groups to fine ones."""
    group = -branch.config.group_size if branch.config.group_size > 0 else -(2**31)
    return branch.name != MAIN, branch.config.bits, group, branch.name


def _bits_per_weight(checkpoint: Checkpoint, shapes: list[tuple[int, int]]) -> float | None:
    weights = sum(k * n for k, n in shapes)
    stored = sum(
        info.nbytes for name, info in checkpoint.tensors.items() if name.rpartition(".")[2] in PACKED
    )
    return 8 * stored / weights if weights else None


def _optional_json(path: Path) -> Json | None:
    return read_json(path) if path.is_file() else None


def _recorded(quant: Json, key: str, kind: type) -> Any:
    """A value of the quantisation config or of its `meta`, None where neither has it."""
    meta = quant.get("meta")
    value = quant.get(key, meta.get(key) if isinstance(meta, dict) else None)
    return None if value is None else kind(value)


def read_making(folder: Path) -> Making | None:
    """A folder's `quantize_report.json`. Raises BadCheckpoint where an entry is not what quantmill writes."""
    path = folder / QUANTIZE_REPORT
    report = _optional_json(path)
    if report is None:
        return None
    source, calibration = _text(report.get("source")), report.get("calibration") or {}
    try:
        modules = tuple(ModuleReport(**module) for module in report.get("modules", ()))
    except TypeError as error:
        raise BadCheckpoint(
            f"{path}: an entry of modules is not understood ({error}): quantise again"
        ) from None
    return Making(
        quantmill=_text(report.get("quantmill")),
        source=Source(source) if source else None,
        preset=_text(report.get("preset")),
        command=_text(report.get("command")),
        versions=tuple((str(k), str(v)) for k, v in (report.get("versions") or {}).items()),
        calibration=Calibration(**{f.name: calibration.get(f.name) for f in fields(Calibration)}),
        seconds=report.get("seconds"),
        peak_ram_bytes=report.get("peak_ram_bytes"),
        modules=modules,
    )


def _foreign_calibration(quant: Json) -> Calibration:
    """What the configs of other makers say about their data, which is little."""
    dataset, seqlen = _recorded(quant, "dataset", str), _recorded(quant, "model_seqlen", int)
    return Calibration(dataset=dataset, seqlen=seqlen)


def read_measured(folder: Path) -> EvalReport | None:
    """A folder's `eval_report.json`; keys that EvalReport lacks are left alone. Raises BadCheckpoint."""
    path = folder / EVAL_REPORT
    stored = _optional_json(path)
    if stored is None:
        return None
    needed = [f.name for f in fields(EvalReport) if f.default is MISSING and stored.get(f.name) is None]
    if needed:
        raise BadCheckpoint(f"{path} has no {needed[0]}: run `quantmill eval {path.parent}` again")
    values: Json = {f.name: stored.get(f.name) for f in fields(EvalReport)}
    if values["mean_kl_ci"] is not None:
        low, high = values["mean_kl_ci"]
        values["mean_kl_ci"] = (low, high)
    return EvalReport(**values)


def _loaders(check: Json | None) -> Mapping[str, str] | None:
    loaders = (check or {}).get("loaders")
    return {str(k): str(v) for k, v in loaders.items()} if isinstance(loaders, dict) and loaders else None


def _original_card(
    folder: Path, branches: tuple[BranchFacts, ...], source: Source | None
) -> OriginalCard | None:
    """A copy kept with the weights, else the README of a source that lies on this machine."""
    places = [folder / ORIGINAL_CARD, *(b.folder / ORIGINAL_CARD for b in branches)]
    if source and source.hub_id is None:
        places.append(Path(source.typed) / "README.md")
    for path in places:
        if path.is_file():
            return parse_card(path.read_text(encoding="utf-8", errors="replace"))
    return None


def parse_card(text: str) -> OriginalCard:
    """Split a model card; a header that is no YAML object, as some are, counts as empty."""
    import yaml

    found = _FRONT_MATTER.match(text)
    if not found:
        return OriginalCard({}, text.strip())
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError:
        header = None
    return OriginalCard(header if isinstance(header, dict) else {}, text[found.end() :].strip())


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
