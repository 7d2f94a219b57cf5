"""How many dequantised values of a real model differ after conversion to another container: none, or it says which.

    python benchmarks/lossless.py FOLDER [FOLDER ...]

Every FOLDER (GPTQ, AWQ or compressed-tensors) is converted to each container; both are read back and dequantised in
float32, and values are compared bit for bit. Q4_1 stores a group's minimum in float16: its notes say how many are
rounded; values that differ lie in those groups.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantmill.checkpoint import open_checkpoint
from quantmill.convert import convert
from quantmill.errors import UnsupportedModel
from quantmill.formats import gguf
from quantmill.formats.gptq import dequantize
from quantmill.gguf_model import GgufTensors
from quantmill.gguf_source import read_header

TARGETS = ("gguf", "awq", "compressed-tensors", "gptq", "gptq_v2")


def values(path: Path, config: dict) -> dict[str, Tensor]:
    """Weights by module, float32, as the container's own formula gives them."""
    if path.is_dir():
        opened = open_checkpoint(path)
        return {m: dequantize(opened.packed(m), torch.float32) for m in opened.quantized_modules()}
    reader, found = GgufTensors(path, read_header(path), config), {}
    from quantmill.architectures import module_names

    for module in module_names(config):
        name = f"{module}.weight"
        entry = reader._needed(name)
        rows = np.array(reader._rows(name, entry))
        found[module] = torch.from_numpy(gguf.dequantize(gguf.BY_NUMBER[entry.kind], rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        opened = open_checkpoint(folder)
        before = {m: dequantize(opened.packed(m), torch.float32) for m in opened.quantized_modules()}
        total = sum(w.numel() for w in before.values())
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as work:
                try:
                    done = convert(folder, target, Path(work) / "out", lambda *_: None)
                except UnsupportedModel as error:
                    print(f"{folder.name} -> {target}: refused: {error}", flush=True)
                    continue
                after = values(done.path, opened.config)
                differ = sum(int((before[m] != after[m]).sum()) for m in before)
                moved = max(
                    float(((before[m] - after[m]).abs() / before[m].abs().amax()).max()) for m in before
                )
            kind = done.path.suffixes[-2].strip(".") if target == "gguf" else target
            print(
                f"{folder.name} -> {kind}: {differ} of {total} values differ (by {moved:.1e} of the largest) "
                f"{'; '.join(done.notes)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
