"""GGUF mixes against llama.cpp's own quantiser with an importance matrix of the same tokens, at equal size.

    python benchmarks/gguf_quality.py --ggml LIBRARY [--source FOLDER] [--mixes Q4_0,Q4_K_M,Q3_K_M,Q2_K]

LIBRARY exports `ggml_quantize_chunk`: the shared object inside the PyPI package xllamacpp does, and so does
ggml.c + ggml-quants.c (in the sdist of llama-cpp-python) compiled with `cc -O3 -shared -fPIC`. Both sides give
every tensor the type that llama.cpp's mixes give it, so sizes are equal. The importance matrix is the mean
square of every linear's inputs in the unquantised model over the same tokens, as llama-imatrix collects it.

The model is SmolLM2-135M in another basis. Its only published copy here is a Q4_1 file, on whose grid its
weights still lie, and its width of 576 holds no super-block of 256. So channels of the hidden and the
intermediate layer are shuffled, and 64 zeros are put behind every 192 (heads 9 -> 12): the function is the
same, printed as a difference of logits, and every K type applies. Scored: KL to that model on WikiText-2 test.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantmill import evaluate
from quantmill.formats import gguf
from quantmill.quantize import calibration
from quantmill.quantize.gguf_mix import tensor_types
from quantmill.quantize.job import Job
from quantmill.quantize.pipeline import quantize
from quantmill.types import CalibrationSet, QuantConfig, Variant
from quantmill.weights import save_tensors

REAL, WIDE = 192, 256  # of every 256 channels, 192 are the model's


def spread(count: int) -> Tensor:
    """Where `count` channels go: the first 192 of every 256."""
    return torch.arange(count) // REAL * WIDE + torch.arange(count) % REAL


def put(tensor: Tensor, places: Tensor, size: int, axis: int) -> Tensor:
    """`tensor` with channel i of `axis` at places[i], zeros elsewhere."""
    shape = list(tensor.shape)
    shape[axis] = size
    return torch.zeros(shape, dtype=tensor.dtype).index_copy(axis, places, tensor)


def widen(source: Path, out: Path) -> Path:
    """The same function with shuffled channels and a hidden size that 256 divides; see the top of the file."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, state = model.config, model.state_dict()
    hidden, head = config.hidden_size, config.head_dim
    generator = torch.Generator().manual_seed(0)
    wide = hidden // REAL * WIDE
    place = spread(hidden)[torch.randperm(hidden, generator=generator)]
    inner = torch.randperm(config.intermediate_size, generator=generator)
    heads, kv = wide // head, wide // head // (config.num_attention_heads // config.num_key_value_heads)
    tensors = {}
    for name, w in state.items():
        if name == "lm_head.weight":
            continue
        if "norm" in name:
            w = put(w, place, wide, 0) * (hidden / wide) ** 0.5
        elif "embed" in name or name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            w = put(w, place, wide, 1)
        elif name.endswith("o_proj.weight"):
            w = put(torch.cat([w, torch.zeros(hidden, wide - hidden)], 1), place, wide, 0)
        elif name.endswith("down_proj.weight"):
            w = put(w[:, inner], place, wide, 0)
        else:  # gate and up
            w = put(w[inner], place, wide, 1)
        rows = {"q_proj": heads * head, "k_proj": kv * head, "v_proj": kv * head}
        more = next((n for key, n in rows.items() if key in name), len(w)) - len(w)
        tensors[name] = torch.cat([w, torch.zeros(more, *w.shape[1:])]) if more else w
    facts = json.loads((source / "config.json").read_text())
    facts |= {
        "hidden_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "dtype": "float32",
    }
    facts |= {"rms_norm_eps": facts["rms_norm_eps"] * hidden / wide, "head_dim": head}
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(facts))
    for file in source.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    save_tensors(out, tensors.items())
    return out


def importance(model: torch.nn.Module, blocks: Tensor, device: str) -> dict[str, Tensor]:
    """Mean square of every linear's inputs, (K,) float32, by module."""
    sums: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().reshape(-1, inputs[0].shape[-1]).square().mean(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return hook

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    hooks = [m.register_forward_pre_hook(listen(n)) for n, m in linears]
    with torch.inference_mode():
        for ids in torch.split(blocks, 4):
            model(ids.to(device))
    for hook in hooks:
        hook.remove()
    return {n: s.cpu() for n, s in sums.items()}


class Ggml:
    """llama.cpp's quantiser, one tensor at a time."""

    def __init__(self, library: Path) -> None:
        self.chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self.chunk.restype = ctypes.c_size_t
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self.chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]

    def __call__(self, weight: Tensor, kind: gguf.BlockType, matrix: Tensor | None) -> Tensor:
        rows = np.ascontiguousarray(weight.numpy(), np.float32)
        raw = np.zeros((len(rows), gguf.row_bytes(kind, rows.shape[1])), np.uint8)
        importance = None if matrix is None else np.ascontiguousarray(matrix.numpy(), np.float32)
        where = None if importance is None else importance.ctypes.data
        self.chunk(kind.number, rows.ctypes.data, raw.ctypes.data, 0, *rows.shape, where)
        return torch.from_numpy(gguf.dequantize(kind, raw))


def model_with(source: Path, weights: dict[str, Tensor], device: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)
    return model.to(device).eval()


def theirs(
    original: torch.nn.Module, source: Path, mix: str, matrix: dict[str, Tensor], ggml: Ggml
) -> dict[str, Tensor]:
    facts = json.loads((source / "config.json").read_text())

    def one(module: str, kind: gguf.BlockType) -> Tensor:
        return ggml(original.get_parameter(f"{module}.weight").data.cpu(), kind, matrix.get(module))

    types = tensor_types(facts, mix)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # ctypes lets other threads run
        found = pool.map(one, types.keys(), types.values())
        return {f"{module}.weight": weight for module, weight in zip(types, found, strict=True)}


def ours(
    source: Path, mix: str, data: CalibrationSet, device: str, preset: str, out: Path
) -> tuple[dict[str, Tensor], float, int]:
    """Dequantised weights as read back from the .gguf file, seconds, bytes."""
    import gguf as package

    from quantmill.gguf_model import GgufTensors
    from quantmill.gguf_source import read_header

    began = time.perf_counter()
    variant = Variant(mix, QuantConfig(bits=4, group_size=32), f"gguf:{mix}")
    done = quantize(Job(source, "model", out, (variant,), data, preset, device=device), lambda _: None)[0]
    took = time.perf_counter() - began
    facts = json.loads((source / "config.json").read_text())
    path = next(done.folder.glob("*.gguf"))
    reader = GgufTensors(path, read_header(path), facts)
    assert len(package.GGUFReader(path).tensors) == len(reader.header.tensors)
    weights = {}
    for module, kind in tensor_types(facts, mix).items():
        name = f"{module}.weight"
        entry = reader._needed(name)
        assert entry.kind == kind.number
        weights[name] = torch.from_numpy(gguf.dequantize(kind, np.array(reader._rows(name, entry))))
    return weights, took, done.size_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ggml", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--blocks", type=Path, required=True, help=".npy of token ids (samples, seqlen)")
    parser.add_argument("--test", type=Path, required=True, help=".npy of token ids (T,)")
    parser.add_argument("--mixes", default="Q4_0,Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--presets", default="best,fast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    blocks = torch.from_numpy(np.load(args.blocks).astype(np.int64))
    ids = torch.from_numpy(np.load(args.test).astype(np.int64)).flatten()
    data = CalibrationSet(blocks, "wikitext", 0, calibration.fingerprint(blocks), len(blocks), 0)
    work = Path(tempfile.mkdtemp())
    source = widen(args.source, work / "wide")
    original = model_with(source, {}, args.device)
    plain = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).to(args.device)
    with torch.inference_mode():
        probe = ids[None, :256].to(args.device)
        gap = (original(probe).logits - plain(probe).logits).abs().max()
    print(f"the same function in another basis: logits differ by at most {float(gap):.2e}")
    del plain
    matrix = importance(original, blocks, args.device)
    cut = evaluate.token_windows(ids, ctx=1024, windows=args.windows)
    ggml = Ggml(args.ggml)
    print(f"{'mix':<8}{'maker':<10}{'bytes':>11}{'KL':>10}  of llama.cpp's (95 %)     top-1   seconds")
    for mix in args.mixes.split(","):
        began = time.perf_counter()
        peer = model_with(source, theirs(original, source, mix, matrix, ggml), args.device)
        seconds = time.perf_counter() - began
        for preset in args.presets.split(","):
            weights, took, size = ours(source, mix, data, args.device, preset, work / preset)
            pair = {preset: model_with(source, weights, args.device), "llama.cpp": peer}
            scores = evaluate.score(pair, cut, original=original)
            for name, spent in ((preset, took), ("llama.cpp", seconds)):
                report = evaluate.report(scores[name])
                ratio = evaluate.compare(scores[name], scores["llama.cpp"]).kl_ratio
                print(
                    f"{mix:<8}{name:<10}{size:>11}{report.mean_kl:>10.5f}"
                    f"  {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
                    f"  {report.top1_agreement:.4f}  {spent:.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
