"""One quantised model in every container: the same tokens as its dequantised weights, and at what speed.

    python benchmarks/siblings_run.py FOLDER [--device cuda] [--more FOLDER_OR_FILE ...] [--threads 2]
        [--only gptq,awq] [--show tokens,speed,hf]

FOLDER: a GPTQ folder, 4 bits, symmetric, groups of 32 n in order. It is converted to AWQ, compressed-tensors and
GGUF, and each runs on the fast runtime of the device. Tokens: three prompts, 48 tokens each, greedy, read back by
the reference (the folder's dequantised weights in float32 through Transformers): how many are its first choice,
and by how much it preferred another where not. Speed: a prompt of 512 tokens and 64 more, in turn, medians;
ratios to the GPTQ folder's. --more: further models, compared with their own dequantised weights. --show hf:
GPTQ and AWQ once more through plain Transformers after quantmill.hf.register().
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantmill.checkpoint import open_checkpoint
from quantmill.convert import convert
from quantmill.formats.gptq import dequantize
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.single import SingleSequence
from quantmill.sources import resolve

PROMPTS = ("The capital of France is", "Once upon a time there was a", "In mathematics, a prime number")
NEW, PREFILL, DECODE, REPEATS = 48, 512, 64, 5


@dataclass
class Model:
    """A folder that runs, and what was seen of it."""

    name: str
    folder: Path
    sequence: SingleSequence
    prefill: list[float]
    decode: list[float]


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
    suffixes = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape")
    state = {n: opened.load(n).float() for n in opened.tensors if n.rpartition(".")[2] not in suffixes}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", default="tokens,speed", help="of tokens, speed, hf")
    parser.add_argument("--to", default="awq,compressed-tensors,gguf", help="what the folder is converted to")
    parser.add_argument("--only", help="of all these, the ones to run: names as printed")
    asked = parser.parse_args()
    shown = asked.show.split(",")
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    prompts = [tokenizer(p).input_ids for p in PROMPTS]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        places = {"gptq": asked.folder}
        for to in filter(None, asked.to.split(",")):
            places[to] = convert(asked.folder, to, work / to, lambda *_: None).path
        places |= {p.name: p for p in asked.more}
        if asked.only:
            places = {name: places[name] for name in asked.only.split(",")}
        models = []
        for named, place in places.items():
            models.append(opened(named, place, work, asked))
            if "tokens" in shown:
                twin = reference(models[-1].folder, asked.device)
                print(f"{named:<20} {tokens_agree(models[-1], twin, prompts)}", flush=True)
                del twin
        for _ in range(REPEATS + 1 if "speed" in shown else 0):
            for model in models:
                timed(model)
        if "speed" in shown:
            show_speeds(models)
        if "hf" in shown:
            folders = {n: p for n, p in places.items() if n in ("gptq", "awq")}
            through_transformers(folders, prompts, asked.device)


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
