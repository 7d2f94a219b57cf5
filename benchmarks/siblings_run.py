"""One quantised model in every container: the same tokens as its dequantised weights, and at what speed.

    python benchmarks/siblings_run.py FOLDER[=awq,gguf] ... [--device cuda] [--keep DIR] [--more FOLDER_OR_FILE ...]
        [--rounded SOURCE:4bit-64g=awq,gguf ...] [--show tokens,speed,hf] [--threads 2]

FOLDER: a GPTQ folder. It is converted to the containers named (all that can hold it, if none are), and each runs
on the fast runtime of the device. --rounded: a plain SOURCE is first rounded to nearest to such a folder; the
codes are poor, the layout and the speed are those of any. Tokens: three prompts, 48 tokens each, greedy, read back
by the reference (the folder's dequantised weights in float32 through Transformers): how many are its first choice,
and by how much it preferred another where not. Speed: a prompt of 512 tokens and 64 more, in turn, medians;
ratios to the GPTQ folder's of the same run. --more: further models, compared with their own dequantised weights.
--show hf: GPTQ and AWQ once more through plain Transformers after quantmill.hf.register(). --keep: where what is
made stays, to be used again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantmill.architectures import module_names
from quantmill.checkpoint import Checkpoint, open_checkpoint
from quantmill.convert import convert
from quantmill.convert.folders import copy_companions
from quantmill.errors import UnsupportedModel
from quantmill.formats.config import config_to_json
from quantmill.formats.gptq import dequantize, pack
from quantmill.hub.variants import parse_variant
from quantmill.quantize.grids import ASYM, SYM, encode, round_fp16, start
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.single import SingleSequence
from quantmill.sources import resolve
from quantmill.types import CheckpointFormat, IntLinear, QuantConfig
from quantmill.weights import save_tensors

PROMPTS = ("The capital of France is", "Once upon a time there was a", "In mathematics, a prime number")
NEW, PREFILL, DECODE, REPEATS = 48, 512, 64, 5
CONTAINERS = ("awq", "compressed-tensors", "gguf")
PACKED = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
)


@dataclass
class Model:
    """A folder that runs, and what was seen of it."""

    name: str
    folder: Path
    sequence: SingleSequence
    prefill: list[float]
    decode: list[float]


def rounded(source: Path, config: QuantConfig, out: Path, device: str) -> Path:
    """A GPTQ folder of a plain one, every linear rounded to nearest on its groups' own grids."""
    plain = open_checkpoint(source)
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out, rounded_tensors(plain, config, device))
    quant = config_to_json(config, meta={})
    facts = plain.config | {"dtype": "float16", "quantization_config": quant}
    (out / "quantize_config.json").write_text(json.dumps(quant))
    copy_companions(source, out)
    (out / "config.json").write_text(json.dumps(facts))  # last: what tells that it is complete
    return out


def rounded_tensors(
    plain: Checkpoint, config: QuantConfig, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    linears = {f"{m}.weight" for m in module_names(plain.config)}
    lowest = 0 if config.zero_format is CheckpointFormat.GPTQ_V2 else 1
    for name in plain.tensors:
        weight = plain.load(name)
        if name not in linears:
            yield name, weight.half()
            continue
        rows, columns = weight.shape
        size = config.effective_group(columns)
        groups = weight.to(device).float().reshape(-1, size)
        scale, zero = start(groups, config.max_code, SYM if config.sym else ASYM)
        scale, zero = round_fp16(scale), zero.round().clamp(lowest, config.max_code)
        codes = encode(groups, scale, zero, config.max_code).to(torch.uint8).reshape(rows, columns)
        per_group = (scale.half().reshape(rows, -1).cpu(), zero.to(torch.uint8).reshape(rows, -1).cpu())
        packed = pack(IntLinear(codes.cpu(), *per_group, torch.arange(columns) // size), config)
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            yield f"{name.removesuffix('weight')}{suffix}", getattr(packed, suffix)


def reference(folder: Path, device: str) -> torch.nn.Module:
    """The folder's weights, dequantised, in float32."""
    opened = open_checkpoint(folder)
    facts = {k: v for k, v in opened.config.items() if k != "quantization_config"}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(facts))
        config = AutoConfig.from_pretrained(name)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    packed = opened.quantized_modules()
    state = {n: opened.load(n).to(device) for n in opened.tensors if n.rpartition(".")[2] not in PACKED}
    for module in packed:
        linear = opened.packed(module)
        there = {n: getattr(linear, n).to(device) for n in ("qweight", "qzeros", "scales", "g_idx")}
        state[f"{module}.weight"] = dequantize(replace(linear, **there), torch.float32)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"]), missing
    model.tie_weights()
    return model.to(device).eval()


def greedy(sequence: SingleSequence, prompt: list[int]) -> list[int]:
    sequence.reset()
    logits, out = sequence.read(prompt), []
    for _ in range(NEW):
        out.append(int(logits[0].argmax()))
        logits = sequence.read(out[-1:])
    return out


def behind(twin: torch.nn.Module, prompt: list[int], out: list[int]) -> torch.Tensor:
    """By how much the reference preferred another token at each place of `out`: 0 where it is its first choice."""
    with torch.inference_mode():
        ids = torch.tensor([prompt + out], device=twin.device)
        logits = twin(ids).logits[0, len(prompt) - 1 : -1].cpu()
    return logits.amax(1) - logits.gather(1, torch.tensor(out)[:, None])[:, 0]


def tokens_agree(model: Model, twin: torch.nn.Module, prompts: list[list[int]]) -> str:
    same, total, worst, gap = 0, 0, 0.0, 0.0
    for prompt in prompts:
        out = greedy(model.sequence, prompt)
        lost = behind(twin, prompt, out)
        same, total, worst = same + int((lost == 0).sum()), total + NEW, max(worst, float(lost.max()))
        model.sequence.reset()
        ours = torch.as_tensor(model.sequence.score(prompt)).float().cpu()
        with torch.inference_mode():
            theirs = twin(torch.tensor([prompt], device=twin.device)).logits[0].cpu()
        gap = max(gap, float((ours - theirs).abs().max()))
    return f"{same}/{total} tokens are the reference's, worst by {worst:.3f}; logits within {gap:.3f}"


def timed(model: Model) -> None:
    ids = [(7919 * i) % 20000 + 100 for i in range(PREFILL)]
    model.sequence.reset()
    began = time.perf_counter()
    token = int(model.sequence.read(ids)[0].argmax())
    middle = time.perf_counter()
    for _ in range(DECODE):
        token = int(model.sequence.read([token])[0].argmax())
    model.prefill.append(PREFILL / (middle - began))
    model.decode.append(DECODE / (time.perf_counter() - middle))


def through_transformers(places: dict[str, Path], prompts: list[list[int]], device: str) -> None:
    """Plain Transformers after register(): greedy tokens against the dequantised weights, speed beside GPTQ's."""
    from quantmill import hf

    hf.register()
    dtype = torch.float16 if device == "cuda" else torch.float32
    models = {
        name: AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device).eval()
        for name, place in places.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in models}
    outs: dict[str, list[list[int]]] = {name: [] for name in models}
    for model in models.values():
        generated(model, prompts[0], 4)  # compiled
    for prompt in prompts:
        for name, model in models.items():
            began = time.perf_counter()
            outs[name].append(generated(model, prompt, NEW))
            speeds[name].append(NEW / (time.perf_counter() - began))
    first = next(iter(speeds.values()))
    for name, seen in speeds.items():
        twin = reference(places[name], device)
        lost = torch.cat([behind(twin, *pair) for pair in zip(prompts, outs[name], strict=True)])
        same, worst = int((lost == 0).sum()), float(lost.max())
        ratio = median(a / b for a, b in zip(seen, first, strict=True))
        print(
            f"hf {name:<17} {same}/{len(lost)} tokens are the reference's, worst by {worst:.3f}; "
            f"{median(seen):.1f} tok/s ({ratio:.2f} of GPTQ's)",
            flush=True,
        )
        del twin


def generated(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    rules = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **rules)
    return out[0, len(prompt) :].tolist()


def opened(name: str, place: Path, work: Path, asked: argparse.Namespace) -> Model:
    folder = resolve(str(place), cache_dir=work / "cache", run=True)
    threads = asked.threads if asked.device == "cpu" else None
    began = time.perf_counter()
    runtime = open_runtime(folder, device=asked.device, threads=threads, kv_tokens=4096)
    print(f"{name:<20} {runtime.facts.name}, open in {time.perf_counter() - began:.1f} s", flush=True)
    return Model(name, folder, SingleSequence(runtime), [], [])


def converted(folder: Path, targets: str, keep: Path) -> dict[str, Path]:
    """The folder and what it can be converted to, by container."""
    places = {"gptq": folder}
    for to in targets.split(",") if targets else CONTAINERS:
        place = keep / f"{folder.name}.{to}"
        try:
            places[to] = place if place.exists() else convert(folder, to, place, lambda *_: None).path
        except UnsupportedModel as reason:
            print(f"{folder.name} {to}: not converted: {reason}", flush=True)
    return places


def wanted(asked: argparse.Namespace, keep: Path) -> Iterator[tuple[str, dict[str, Path]]]:
    """Models that are compared with each other, the first of them by name gptq; then those of --more, alone."""
    for text in asked.folders:
        folder, _, targets = text.partition("=")
        yield Path(folder).name, converted(Path(folder), targets, keep)
    for text in asked.rounded:
        made, _, targets = text.partition("=")
        source, _, spec = made.rpartition(":")
        folder = keep / f"rounded-{spec}"
        if not (folder / "config.json").is_file():
            rounded(Path(source), parse_variant(spec).config, folder, asked.device)
        yield spec, converted(folder, targets, keep)
    for place in asked.more:
        yield place.name, {"itself": place}


def compare(name: str, places: dict[str, Path], keep: Path, asked: argparse.Namespace) -> None:
    """Open the models of one group, time them in turn, look at their tokens."""
    shown = asked.show.split(",")
    print(f"-- {name}", flush=True)
    models = [opened(container, place, keep, asked) for container, place in places.items()]
    if "speed" in shown:
        for _ in range(REPEATS + 1):
            for model in models:
                timed(model)
        show_speeds(models)
    for model in models if "tokens" in shown else ():
        twin = reference(model.folder, asked.device)
        print(f"{model.name:<20} {tokens_agree(model, twin, prompts_of(model.folder))}", flush=True)
        del twin


def prompts_of(folder: Path) -> list[list[int]]:
    """The prompts as tokens; a folder without a tokenizer gets some numbers."""
    if not (folder / "tokenizer.json").is_file():
        return [[1, *((7919 * i * k) % 20000 + 100 for i in range(1, 7))] for k in (1, 2, 3)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(p).input_ids for p in PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", help="FOLDER or FOLDER=awq,gguf")
    parser.add_argument("--rounded", nargs="*", default=[], help="SOURCE:4bit-64g=awq,gguf")
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--show", default="tokens,speed", help="of tokens, speed, hf, and nothing: only convert"
    )
    parser.add_argument("--keep", type=Path, help="where what is made stays")
    asked = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        keep = asked.keep or Path(name)
        keep.mkdir(parents=True, exist_ok=True)
        groups = list(wanted(asked, keep))
        print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
        if asked.show == "nothing":
            return
        for group, places in groups if asked.show != "hf" else ():
            compare(group, places, keep, asked)
        if "hf" in asked.show.split(","):
            folders = {n: p for n, p in groups[0][1].items() if n in ("gptq", "awq")}
            through_transformers(folders, prompts_of(folders["gptq"]), asked.device)
    print(f"all in {time.perf_counter() - began:.0f} s", flush=True)


def show_speeds(models: list[Model]) -> None:
    first = models[0]
    for model in models:
        prefill, decode = (median(s[1:]) for s in (model.prefill, model.decode))
        ratios = [
            median(a / b for a, b in zip(mine[1:], theirs[1:], strict=True))
            for mine, theirs in ((model.prefill, first.prefill), (model.decode, first.decode))
        ]
        print(
            f"{model.name:<20} prefill {prefill:8.0f} tok/s ({ratios[0]:.2f} of GPTQ's)  "
            f"decode {decode:7.1f} tok/s ({ratios[1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
