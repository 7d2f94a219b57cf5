"""The branches of a repository on a hub, ours or anybody's: parameters, sizes, measured loss, the best one here.

Reads a few small JSON files of each branch; what no file says is taken from the branch's name. Fetches no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadCheckpoint, UserError
from quantmill.files import read_json
from quantmill.formats.config import config_from_json
from quantmill.formats.dialects import Layout, method
from quantmill.hub.card_facts import CHECK_REPORT, EVAL_REPORT
from quantmill.hub.machine import Machine
from quantmill.hub.remote import RemoteFile, list_files
from quantmill.hub.variants import MAIN, parse_branch
from quantmill.hub_errors import in_our_words
from quantmill.types import Json, QuantConfig

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = ".safetensors"
GGUF = ".gguf"
OURS = ("gptq", "awq", "compressed-tensors", "auto-round")  # methods whose safetensors quantmill loads
_GGUF_KIND = re.compile(
    r"[-_.]((?:I?Q\d\w*)|[BF]F?(?:16|32)|MXFP4\w*)(?:-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE
)
LONGEST_METHOD = 30  # characters of somebody else's word
LONGEST = 4_000_000  # bytes of a JSON file that is fetched


@dataclass(frozen=True, slots=True)
class RemoteBranch:
    """A branch. `config` None: no parameters of ours, as far as its files and its name tell."""

    name: str
    commit: str
    method: str  # gptq, awq, gguf Q4_K_M, ...; none: not quantised; ?: nothing says it
    config: QuantConfig | None
    size: int  # bytes of the weight files
    mean_kl: float | None
    perplexity: float | None
    loaders: tuple[str, ...] | None  # who can load it; None where nobody has checked
    fits: str  # GPU, RAM or no
    best: bool = False

    def to_json(self) -> Json:
        """The keys of `quantmill branches --json`."""
        c = self.config
        return {
            "name": self.name,
            "method": self.method,
            "bits": c.bits if c else None,
            "group_size": c.group_size if c else None,
            "desc_act": c.desc_act if c else None,
            "sym": c.sym if c else None,
            "size_bytes": self.size,
            "mean_kl": self.mean_kl,
            "perplexity": self.perplexity,
            "loaders": None if self.loaders is None else list(self.loaders),
            "fits": self.fits,
            "best": self.best,
            "commit": self.commit,
        }


def read_branches(name: str, api: HfApi, machine: Machine) -> tuple[RemoteBranch, ...]:
    """Every branch, `main` first, the best for this machine marked. Raises SourceNotFound, BadRequest."""
    from dataclasses import replace

    with in_our_words(name):
        refs = {r.name: r.target_commit for r in api.list_repo_refs(name).branches}
        order = sorted(refs, key=lambda branch: (branch != MAIN, branch))
        found = [_read(name, branch, refs[branch], api, machine) for branch in order]
    best = _best(found)
    return tuple(replace(b, best=b.name == best) for b in found)


def _read(name: str, branch: str, commit: str, api: HfApi, machine: Machine) -> RemoteBranch:
    files = list_files(api, name, commit)
    size = sum(f.size for p, f in files.items() if p.endswith((WEIGHTS, GGUF)))
    papers = _Papers(name, commit, files, api)
    measured, checked = papers.read(EVAL_REPORT) or {}, papers.read(CHECK_REPORT) or {}
    loaders = checked.get("loaders")
    how = method_of(papers.read, branch, files)
    return RemoteBranch(
        name=branch,
        commit=commit,
        method=how,
        config=config_of(papers.read, branch) if size and how in OURS else None,
        size=size,
        mean_kl=_number(measured.get("mean_kl")),
        perplexity=_number(measured.get("perplexity")),
        loaders=tuple(k for k, v in loaders.items() if v == "yes") if isinstance(loaders, dict) else None,
        fits=machine.fits(size) if size else "-",
    )


@dataclass(frozen=True, slots=True)
class _Papers:
    """The small JSON files of a commit, fetched through the shared cache."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]
    api: HfApi

    def read(self, path: str) -> Json | None:
        """A JSON object, None where there is none that can be read: other people's files may hold anything."""
        if path not in self.files or self.files[path].size > LONGEST:
            return None
        try:
            return read_json(Path(self.api.hf_hub_download(self.name, path, revision=self.commit)))
        except BadCheckpoint:
            return None


def method_of(read: Callable[[str], Json | None], branch: str, paths: Iterable[str]) -> str:
    """How a branch's weights are quantised: its config's word, the kinds of its GGUF files, else its name's.

    `none` where plain weights are all there is, `?` where there are no weights that we know.
    """
    listed = list(paths)
    kinds = sorted({_gguf_kind(p) for p in listed if p.lower().endswith(GGUF)})
    if not any(p.endswith(WEIGHTS) for p in listed):
        return ("gguf " + (", ".join(kinds) if len(kinds) < 4 else f"({len(kinds)} kinds)")) if kinds else "?"
    quant = _quant(read)
    if quant is None:
        promised = branch != MAIN and parse_branch(branch) is not None
        return Layout.GPTQ if promised else "none"
    return "".join(c for c in method(quant) if c.isprintable())[:LONGEST_METHOD]


def _gguf_kind(path: str) -> str:
    found = _GGUF_KIND.search(path)
    return found[1].upper() if found else "?"


def _quant(read: Callable[[str], Json | None]) -> Json | None:
    quant = (read("config.json") or {}).get("quantization_config") or read("quantize_config.json")
    return quant if isinstance(quant, dict) else None


def config_of(read: Callable[[str], Json | None], branch: str) -> QuantConfig | None:
    """A branch's parameters, its files' word before its name's. `read` gives a JSON file or None."""
    quant = _quant(read)
    if quant is None:
        return None if branch == MAIN else parse_branch(branch)
    try:
        return config_from_json(quant)
    except UserError:  # another method, or nothing that we know
        return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _best(branches: list[RemoteBranch]) -> str | None:
    """Of what fits, on the GPU if there is one: least measured loss if all are measured, else most bytes."""
    usable = [b for b in branches if b.config and b.fits != "no"]
    usable = [b for b in usable if b.fits == "GPU"] or usable
    if not usable:
        return None
    if all(b.mean_kl is not None for b in usable):
        return min(usable, key=lambda b: (b.mean_kl, b.size)).name
    return max(usable, key=lambda b: b.size).name
