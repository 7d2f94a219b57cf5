"""A `.gguf` file -> a folder that runs from the file's own codes: the same values, nothing rounded again.

Linears whose block type a packed linear holds (formats/gguf_linear.py) keep their codes and scales; the rest,
and embeddings, norms and the head, are dequantised to float16, as they are where a GGUF file is a source. Widths
differ within a file, so the folder's config names them module by module (`dynamic`). Knows no cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantmill.architectures import Dimensions, dimensions, module_names
from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.files import read_json, write_json
from quantmill.formats.config import config_to_json
from quantmill.formats.gguf import BY_NUMBER, FLOAT_TYPES, TYPES, Bytes, row_bytes
from quantmill.formats.gguf_linear import BITS_OF, GROUP, dense, to_packed
from quantmill.gguf_source import GgufHeader, Notify, TensorEntry, read_header, write_papers
from quantmill.gguf_target import architecture, find_name, from_llama_cpp, heads_of
from quantmill.types import ActOrder, CheckpointFormat, Json, PackedLinear, QuantConfig
from quantmill.weights import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

_ALWAYS = ("Q4_0", "Q5_0", "Q8_0")  # a packed linear holds these whatever their values
_NUMPY = {0: np.float32, 1: np.float16}


def runs_packed(path: Path) -> bool:
    """Whether some linear of the file can run from its own codes. Raises as `read_header`."""
    numbers = {e.kind for name, e in read_header(path).tensors.items() if name.startswith("blk.")}
    return any(TYPES[name].number in numbers for name in _ALWAYS)


def convert_packed(path: Path, out: Path, notify: Notify) -> None:
    """Write the folder to the existing `out`. Raises UnsupportedModel and BadCheckpoint, as gguf_source does."""
    header = read_header(path)
    notify(f"repacking {path.name}: {header.parameters / 1e6:.0f} M weights, their codes as they are")
    write_papers(path, header, out, notify)
    config = read_json(out / "config.json")
    reader = GgufTensors(path, header, config)
    widths: dict[str, int] = {}
    save_tensors(out, reader.everything(widths))
    write_json(out / "config.json", config | {"dtype": "float16", "quantization_config": _quant(widths)})
    write_json(out / "quantize_config.json", _quant(widths))


class GgufTensors:
    """The tensors of a file under Transformers' names, rows in Transformers' order, memory-mapped."""

    def __init__(self, path: Path, header: GgufHeader, config: Json) -> None:
        self.path, self.header, self.config = path, header, config
        self.sizes: Dimensions = dimensions(config)
        self.arch = architecture(config)
        self.data = np.memmap(path, mode="r", dtype=np.uint8)

    def everything(self, widths: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        """All tensors; modules that stay packed are noted in `widths` with the bits of their codes."""
        linears = module_names(self.config)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            yield name, self.dense(name)
        if not self.sizes.tied and self._entry("lm_head.weight") is not None:
            yield "lm_head.weight", self.dense("lm_head.weight")
        for name in self._norms():
            yield name, self.dense(name)
        for module in linears:
            packed = self.packed(module)
            if packed is None:
                yield f"{module}.weight", self.dense(f"{module}.weight")
            else:
                widths[module] = packed.bits
                for suffix in ("qweight", "qzeros", "scales", "g_idx"):
                    yield f"{module}.{suffix}", getattr(packed, suffix)
            if self._entry(f"{module}.bias") is not None:
                yield f"{module}.bias", self.dense(f"{module}.bias")

    def packed(self, module: str) -> PackedLinear | None:
        """A linear with its own codes, None where a packed linear cannot hold them."""
        name = f"{module}.weight"
        entry = self._needed(name)
        kind = BY_NUMBER.get(entry.kind)
        if kind is None or kind.name not in BITS_OF:
            return None
        return to_packed(kind, self._rows(name, entry))

    def dense(self, name: str) -> Tensor:
        """A tensor in float16. Raises BadCheckpoint where it holds what is not finite there."""
        import torch

        entry = self._needed(name)
        rows = self._rows(name, entry)
        if entry.kind in BY_NUMBER:
            tensor = dense(BY_NUMBER[entry.kind], rows, torch.float16)
        elif entry.kind in _NUMPY:
            tensor = torch.from_numpy(np.array(rows).view(_NUMPY[entry.kind])).half()
        elif entry.kind == FLOAT_TYPES["BF16"]:
            tensor = torch.from_numpy(np.array(rows)).view(torch.bfloat16).half()
        else:
            raise UnsupportedModel(
                f"{name} in {self.path.name} has ggml type {entry.kind}, which is not read"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise BadCheckpoint(f"{name} in {self.path} holds values that are not finite in fp16")
        return tensor.reshape(entry.shape)

    def _rows(self, name: str, entry: TensorEntry) -> Bytes:
        """The rows of a matrix (N, bytes), or a vector's bytes with one element a row."""
        width = entry.shape[-1] if len(entry.shape) > 1 else 1
        kind = BY_NUMBER.get(entry.kind)
        nbytes = row_bytes(kind, width) if kind else width * (4 if entry.kind == 0 else 2)
        count = entry.shape[0]
        rows = self.data[entry.start : entry.start + count * nbytes].reshape(count, nbytes)
        heads = heads_of(name, self.arch, self.sizes)
        return from_llama_cpp(rows, heads) if heads else rows

    def _norms(self) -> Iterator[str]:
        """Vectors of the blocks that are no linear's bias."""
        for block in range(self.sizes.layers):
            for norm in (
                "input_layernorm",
                "post_attention_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
            ):
                name = f"model.layers.{block}.{norm}.weight"
                if self._entry(name) is not None:
                    yield name

    def _entry(self, name: str) -> TensorEntry | None:
        found = find_name(name, self.arch, self.sizes.layers)
        return None if found is None else self.header.tensors.get(found)

    def _needed(self, name: str) -> TensorEntry:
        entry = self._entry(name)
        if entry is None:
            raise BadCheckpoint(f"{self.path} lacks {name}: fetch the file again")
        return entry


def _quant(widths: dict[str, int]) -> Json:
    """The commonest width for all, the others by module."""
    bits = Counter(widths.values()).most_common(1)[0][0]
    common = QuantConfig(
        bits=bits, group_size=GROUP, act_order=ActOrder.NONE, checkpoint_format=CheckpointFormat.GPTQ_V2
    )
    # What Q4_1 gives is asymmetric; "asymmetric" only keeps readers from supposing a zero point.
    quant = config_to_json(replace(common, sym=False), meta={"made_from": "gguf"})
    others = {f"+:{re.escape(m)}$": {"bits": b} for m, b in widths.items() if b != bits}
    return quant | ({"dynamic": others} if others else {})
