"""How fast GGUF files and AWQ folders become the project's packed linears: GB of file read per second and core.

    python benchmarks/read_speed.py [--gb 4] [--only Q4_0,Q4_1,Q8_0,AWQ] [--runs 3] [--folder DIR]

Writes a .gguf file of one type and an AWQ folder with linears in the shapes of Mistral-7B, random codes, as many
layers as give the size, and reads every linear with the readers that `quantmill` runs models with: headers,
checks, the order of rows that llama.cpp keeps q and k in, codes repacked to GPTQ's words, float16 scales, zeros.
Files lie in the page cache, one thread, median of the runs. Beside it in the same run the bound of this machine:
copying the same bytes out of the page cache into new memory, piece by piece.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf as package
import numba
import numpy as np
import torch
from torch import Tensor

from quantmill.architectures import linear_shapes, module_names
from quantmill.checkpoint import open_checkpoint
from quantmill.files import write_json
from quantmill.formats import awq, gguf
from quantmill.gguf_model import GgufTensors
from quantmill.gguf_source import read_header
from quantmill.quantize.awq_out import quant_json
from quantmill.types import Json, QuantConfig
from quantmill.weights import save_tensors

LAYOUTS = ("Q4_0", "Q4_1", "Q8_0", "AWQ")
SHARD = 500_000_000  # what lies in memory while a folder is written
NAMES = {  # llama.cpp's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config_of(layers: int) -> Json:
    """Mistral-7B with other numbers of layers and tokens."""
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 1024,
        "rms_norm_eps": 1e-5,
    }


def layers_for(size: float, bytes_per_weight: float) -> int:
    weights = sum(s.out_features * s.in_features for s in linear_shapes(config_of(1)).values())
    return max(1, round(size * 1e9 / weights / bytes_per_weight))


def random_rows(rng: np.random.Generator, kind: gguf.BlockType, rows: int, columns: int) -> np.ndarray:
    """Blocks of random codes; scales are powers of two, minima whole multiples of them."""
    raw = rng.integers(0, 256, (rows, columns // kind.block, kind.nbytes), dtype=np.uint8)
    d = np.exp2(-rng.integers(4, 10, raw.shape[:2])).astype(np.float16)
    raw[..., :2] = d[..., None].view(np.uint8)
    if kind.has_min:
        m = (-d.astype(np.float32) * rng.integers(0, 16, d.shape)).astype(np.float16)
        raw[..., 2:4] = m[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(path: Path, kind: gguf.BlockType, config: Json) -> None:
    rng, writer = np.random.default_rng(0), package.GGUFWriter(path, "llama")
    shapes = linear_shapes(config)
    listed = [
        (f"blk.{layer}.{NAMES[module]}.weight", shape)
        for layer in range(config["num_hidden_layers"])
        for module, shape in shapes.items()
    ]
    raw_type = package.GGMLQuantizationType(kind.number)
    for name, shape in listed:
        nbytes = shape.out_features * gguf.row_bytes(kind, shape.in_features)
        stored = (shape.out_features, gguf.row_bytes(kind, shape.in_features))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape in listed:
        writer.write_tensor_data(random_rows(rng, kind, shape.out_features, shape.in_features))
    writer.close()


def awq_tensors(config: Json) -> Iterator[tuple[str, Tensor]]:
    rng = np.random.default_rng(0)
    shapes = linear_shapes(config)
    for module in module_names(config):
        shape = shapes[module.split(".", 3)[-1]]
        sizes = awq.tensor_shapes(128, shape.in_features, shape.out_features)
        for suffix in ("qweight", "qzeros"):
            words = rng.integers(-(2**31), 2**31, sizes[suffix], dtype=np.int32)
            yield f"{module}.{suffix}", torch.from_numpy(words)
        scales = rng.random(sizes["scales"], dtype=np.float32).astype(np.float16)
        yield f"{module}.scales", torch.from_numpy(scales)


def gguf_read(
    folder: Path, kind: gguf.BlockType, size: float
) -> tuple[int, Callable[[], None], Callable[[], None]]:
    """Bytes of the linears, what reads them, what copies them."""
    path, config = folder / f"{kind.name}.gguf", config_of(layers_for(size, kind.nbytes / kind.block))
    write_gguf(path, kind, config)
    modules = module_names(config)

    def read() -> None:
        tensors = GgufTensors(path, read_header(path), config)
        for module in modules:
            assert tensors.packed(module) is not None, "a packed linear holds these types"

    tensors = GgufTensors(path, read_header(path), config)
    pieces = [
        (e.start, e.shape[0] * gguf.row_bytes(kind, e.shape[1])) for e in tensors.header.tensors.values()
    ]

    def copy() -> None:
        for start, nbytes in pieces:
            np.array(tensors.data[start : start + nbytes])

    return sum(nbytes for _, nbytes in pieces), read, copy


def awq_read(folder: Path, size: float) -> tuple[int, Callable[[], None], Callable[[], None]]:
    place, config = folder / "awq", config_of(layers_for(size, 0.5 + 2.5 / 128))
    place.mkdir()
    save_tensors(place, awq_tensors(config), max_shard_bytes=SHARD)
    write_json(
        place / "config.json", config | {"quantization_config": quant_json(QuantConfig(4, 128, sym=False))}
    )

    def read() -> None:
        opened = open_checkpoint(place)
        for module in opened.quantized_modules():
            opened.packed(module)

    opened = open_checkpoint(place)

    def copy() -> None:
        for name in opened.tensors:
            opened.load(name).clone()

    return sum(f.stat().st_size for f in place.glob("*.safetensors")), read, copy


def timed(work: Callable[[], None], runs: int) -> float:
    work()  # compiled and in the page cache
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.0, help="size of each file")
    parser.add_argument("--only", default=",".join(LAYOUTS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    print(
        f"one thread, median of {args.runs}\n"
        f"{'layout':<8}{'file, GB':>10}{'repacked, GB/s':>16}{'copied, GB/s':>14}"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for layout in args.only.split(","):
            work = Path(name) / layout
            work.mkdir()
            made = (
                awq_read(work, args.gb) if layout == "AWQ" else gguf_read(work, gguf.TYPES[layout], args.gb)
            )
            total, read, copy = made
            fast, bound = (total / timed(job, args.runs) / 1e9 for job in (read, copy))
            print(f"{layout:<8}{total / 1e9:>10.2f}{fast:>16.2f}{bound:>14.2f}", flush=True)
            shutil.rmtree(work)  # one file at a time lies on the disk


if __name__ == "__main__":
    main()
