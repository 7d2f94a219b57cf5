"""Checks a GPTQ folder against every rule of docs/formats.md, and a `.gguf` file against what its readers need.

    folder -> open_checkpoint -> facts (measured) -> rules (findings) -> readers (verdicts) -> CheckReport
    file.gguf -> gguf_rules.py -> CheckReport

Loads tensors one at a time and runs no model, so it knows nothing of quality: that is `quantmill eval`.
"""

from __future__ import annotations

from pathlib import Path

from quantmill.checkpoint import open_checkpoint
from quantmill.doctor.facts import gather
from quantmill.doctor.folder_rules import PAPER_RULES, TENSOR_RULES, manifest_findings
from quantmill.doctor.gguf_rules import check_gguf
from quantmill.doctor.mend import Mended, fix
from quantmill.doctor.private import privacy_findings
from quantmill.doctor.quant_rules import LABEL_RULES, PACKED_RULES
from quantmill.doctor.readers import READERS, verdicts
from quantmill.errors import BadCheckpoint, SourceNotFound
from quantmill.types import CheckReport, Finding, Level

__all__ = ["Mended", "check", "fix"]


def check(folder: Path, *, hashes: bool = True) -> CheckReport:
    """Everything that can be said of a model folder, or a `.gguf` file, without running it.

    hashes: its manifest, too.

    A folder that cannot be opened gives a report with one error. Raises SourceNotFound if there is none.
    """
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        return check_gguf(folder, hashes=hashes)
    if not folder.is_dir():
        raise SourceNotFound(f"{folder} is no folder: give a folder with config.json and *.safetensors")
    try:
        checkpoint = open_checkpoint(folder)
    except BadCheckpoint as error:
        finding = Finding(Level.ERROR, folder.resolve().name, str(error))
        return CheckReport((finding,), dict.fromkeys(READERS, "the folder cannot be opened"))
    facts = gather(checkpoint)
    of_tensors = [f for rule in TENSOR_RULES for f in rule(facts)]
    of_papers = [f for rule in PAPER_RULES for f in rule(facts)]
    of_papers += list(privacy_findings(folder))
    of_papers += list(manifest_findings(folder)) if hashes else []
    if facts.config is not None:
        of_tensors += [f for rule in PACKED_RULES for f in rule(facts, facts.config)]
        of_papers += [f for rule in LABEL_RULES for f in rule(facts, facts.config)]
    return CheckReport((*of_tensors, *of_papers), verdicts(facts, of_tensors, of_papers))
