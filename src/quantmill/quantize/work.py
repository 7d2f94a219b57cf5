"""The work folder of an unfinished run: one file per finished block of a variant, whole or not there.

    OUT/.quantmill-work/<branch>/run.json            what this run is; another run may not go on here
    OUT/.quantmill-work/<branch>/block-00003.safetensors   packed tensors, module reports in the header

No activations are kept: a resumed run sends its tokens through the finished blocks again, with the packed
weights.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantmill.errors import BadCheckpoint, CannotResume
from quantmill.files import write_json
from quantmill.formats.container import map_tensors
from quantmill.types import Json, ModuleReport

WORK = ".quantmill-work"


@dataclasses.dataclass(frozen=True, slots=True)
class SolvedBlock:
    """One finished block of one variant, as it will be written."""

    tensors: dict[str, Tensor]  # full names: model.layers.3.self_attn.q_proj.qweight, ...
    reports: tuple[ModuleReport, ...]


class WorkFolder:
    """Finished blocks of one variant. Raises CannotResume when the folder belongs to another run."""

    def __init__(self, out: Path, branch: str, identity: Json, resume: bool) -> None:
        self.folder = out / WORK / branch
        marker = self.folder / "run.json"
        if marker.exists() and not resume:
            raise CannotResume(
                f"{out} holds an unfinished run of {branch}: add --resume, or remove {out / WORK}"
            )
        if marker.exists() and json.loads(marker.read_text()) != identity:
            raise CannotResume(
                f"the unfinished run of {branch} in {out} had another source, data set or setting: "
                f"repeat its command, or remove {out / WORK}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, identity)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def finished(self) -> int:
        """How many blocks are there, from the first on."""
        index = 0
        while self._path(index).exists():
            index += 1
        return index

    def read(self, index: int) -> SolvedBlock | None:
        """Block `index`, if it was finished. Raises CannotResume when its file is damaged."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as f:
                reports = json.loads(f.metadata()["modules"])
            tensors = map_tensors(path)  # a variant's blocks are written one tensor after the other
        except (SafetensorError, BadCheckpoint, KeyError, ValueError, TypeError) as e:
            raise CannotResume(f"{path} is damaged ({e}): remove it and run again with --resume") from e
        return SolvedBlock(tensors, tuple(ModuleReport(**r) for r in reports))

    def write(self, index: int, block: SolvedBlock) -> None:
        """Keep block `index`: visible only once it is complete."""
        path, partial = self._path(index), self._path(index).with_suffix(".partial")
        reports = json.dumps([dataclasses.asdict(r) for r in block.reports])
        save_file(block.tensors, partial, metadata={"format": "pt", "modules": reports})
        partial.replace(path)

    def remove(self) -> None:
        """Called once the variant's folder is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in (p for p in self.folder.parents if WORK in p.parts):
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
