"""Quantised folder -> `.gguf` file: every packed linear as the block type that holds it, the rest in float16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantmill import __version__
from quantmill.checkpoint import Checkpoint
from quantmill.errors import BadRequest, UnsupportedModel
from quantmill.formats.gguf import TYPES, BlockType
from quantmill.formats.gguf_linear import from_packed, lossless_type
from quantmill.formats.gptq import unpack_zeros
from quantmill.gguf_target import GgufModel, GgufTensor, write_gguf
from quantmill.packed import SUFFIXES
from quantmill.types import PackedLinear

Advance = Callable[[int, str], None]


def write_file(
    checkpoint: Checkpoint, asked: str | None, out: Path, advance: Advance
) -> tuple[Path, tuple[str, ...]]:
    """Write a `.gguf` file. `asked` is the type that the linears shall have; None: whichever loses nothing.

    Raises UnsupportedModel, naming the module and the reason, where a linear does not fit.
    """
    modules = checkpoint.quantized_modules()
    kinds = {m: _kind(checkpoint, m, asked) for m in modules}
    common = Counter(k.name for k in kinds.values()).most_common(1)[0][0]
    path = target_path(out, checkpoint.folder, common)
    notes: list[str] = []
    tensors = [
        *(_plain(checkpoint, name) for name in _unpacked_names(checkpoint)),
        *(_packed(checkpoint, m, kinds[m], notes, advance) for m in modules),
    ]
    model = GgufModel(
        name=checkpoint.folder.resolve().name,
        config=checkpoint.config,
        folder=checkpoint.folder,
        file_type=common,
        quantized_by=f"quantmill {__version__}",
    )
    doubts = write_gguf(path, model, tensors)
    return path, (*_summed(notes), *doubts)


def target_path(out: Path, source: Path, kind: str) -> Path:
    """`out` itself where it is a .gguf name, else NAME.TYPE.gguf in that folder."""
    if out.suffix.lower() == ".gguf" and not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        return out
    if out.is_file():
        raise BadRequest(f"{out} is a file; name a folder, or a file that ends in .gguf")
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{source.resolve().name.lower()}.{kind}.gguf"


def _kind(checkpoint: Checkpoint, module: str, asked: str | None) -> BlockType:
    try:
        kind = lossless_type(checkpoint.packed(module))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{module}: {error}") from None
    if asked is not None and kind.name != asked:
        if (kind.name, asked) == ("Q4_0", "Q4_1"):
            return TYPES["Q4_1"]
        raise UnsupportedModel(f"{module} fits {kind.name}, not {asked}: use --to gguf:{kind.name}")
    return kind


def _unpacked_names(checkpoint: Checkpoint) -> list[str]:
    packed = {f"{m}.{s}" for m in checkpoint.quantized_modules() for s in SUFFIXES if s != "bias"}
    return [n for n in checkpoint.tensors if n not in packed and not n.endswith("rotary_emb.inv_freq")]


def _plain(checkpoint: Checkpoint, name: str) -> GgufTensor:
    """Matrices in float16, vectors in float32, as llama.cpp wants them."""
    shape = checkpoint.tensors[name].shape
    kind = "F16" if len(shape) > 1 else "F32"
    dtype = torch.float16 if kind == "F16" else torch.float32

    def rows() -> NDArray[Any]:
        tensor = checkpoint.load(name)
        stored = tensor.to(dtype)
        if bool((torch.isinf(stored) & torch.isfinite(tensor)).any()):
            raise UnsupportedModel(f"{name} overflows float16: GGUF holds matrices in it")
        return stored.numpy()

    return GgufTensor(name, shape, kind, rows)


def _packed(
    checkpoint: Checkpoint, module: str, kind: BlockType, notes: list[str], advance: Advance
) -> GgufTensor:
    in_features, out_features = checkpoint.module_size(module)

    def rows() -> NDArray[np.uint8]:
        packed = checkpoint.packed(module)
        if kind.has_min and (lost := rounded_minima(packed)):
            notes.append(f"{lost}")
        advance(1, module)
        return from_packed(packed, kind)

    return GgufTensor(f"{module}.weight", (out_features, in_features), kind.name, rows)


def rounded_minima(packed: PackedLinear) -> int:
    """Groups whose minimum -scale * zero float16 does not hold exactly."""
    zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, packed.checkpoint_format)
    exact = packed.scales.T.float() * zeros.float()
    return int((exact.half().float() != exact).sum())


def _summed(notes: list[str]) -> tuple[str, ...]:
    lost = sum(int(n) for n in notes)
    if not lost:
        return ()
    return (
        f"Q4_1 stores each group's minimum in float16: {lost} of them are rounded, codes and scales are not",
    )
