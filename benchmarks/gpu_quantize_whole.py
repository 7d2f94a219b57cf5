"""A whole 7B quantised on a GPU as a user does it, from the command line: seconds and memory of that process.

    python benchmarks/gpu_quantize_whole.py TEXT [--layers 32] [--preset fast] [--variant 4bit-128g ...]
                                           [--max-vram 16GB] [--max-ram 12GB] [--scratch /dev/shm]
                                           [--source FOLDER] [--limit SECONDS] [--eval WINDOWS]

The folder has Mistral-7B's shapes, random bfloat16 weights and a small tokenizer trained on TEXT, which is also
what is calibrated on; it lies in memory, as does what is made. This process only watches: what that process
holds of the GPU as the driver says it (else what the device has given out since before the start), what the
machine has taken (pinned memory is not in a process's resident size) and the events. Beside them stand the plan's
prediction and the floor of `gpu_quantize.py`: operations over rates measured here. `--eval` then scores what was
made against the original.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from gpu_quantize import floor_seconds, make_model, measured_rates

from quantmill.files import read_json
from quantmill.hub.variants import parse_variant
from quantmill.quantize import memory
from quantmill.quantize.presets import recipe_of

EVERY = 0.05  # seconds between two looks
VOCABULARY = 2000  # of the tokenizer: small, so that a small text gives 128 x 2048 tokens


@dataclass
class Peaks:
    """The most that was taken since `base`, in bytes, and where the process said so, its resident size."""

    base_gpu: int
    base_host: int
    gpu: int = 0
    host: int = 0
    resident: int = 0
    own: int = 0  # of what is resident, what is no file

    def look(self, pid: int) -> None:
        status = Path(f"/proc/{pid}/status")
        self.gpu = max(self.gpu, process_bytes(pid) or device_bytes() - self.base_gpu)
        self.host = max(self.host, machine_bytes() - self.base_host)
        self.resident = max(self.resident, status_bytes(status, "VmHWM"))
        self.own = max(self.own, status_bytes(status, "RssAnon"))

    def __str__(self) -> str:
        taken, resident, own = (gigabytes(v) for v in (self.host, self.resident, self.own))
        return f"the machine took {taken}, the process had {resident} resident, {own} of it no file"


@dataclass
class Watched:
    """What one command did: when each line of its events came, how much it took, how it ended."""

    seconds: float
    code: int | None  # None: it was stopped at the limit
    peaks: Peaks
    solving: Peaks | None = None  # the peaks until the last linear was solved
    events: list[tuple[float, dict]] = field(default_factory=list)

    def when(self, kind: str) -> list[float]:
        return [at for at, event in self.events if event["event"] == kind]


def device_bytes() -> int:
    free, whole = torch.cuda.mem_get_info()
    return whole - free


@functools.cache
def driver():
    """The driver's library, and its handle of the first GPU; None where it cannot be asked."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None


def process_bytes(pid: int) -> int:
    """What a process holds of the first GPU as the driver says; 0 where it says nothing."""
    if driver() is None:
        return 0
    library, gpu = driver()
    held = {p.pid: p.usedGpuMemory for p in library.nvmlDeviceGetComputeRunningProcesses(gpu)}
    return held.get(pid) or 0


def status_bytes(file: Path, *names: str) -> int:
    """The sum of lines `Name:  123 kB` of a file in /proc; 0 once the process is gone."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.split(":")[0] in names)


def machine_bytes() -> int:
    """What the machine's processes hold: files in memory, which Cached counts, are left out."""
    info = Path("/proc/meminfo")
    return status_bytes(info, "MemTotal") - status_bytes(info, "MemFree", "Buffers", "Cached", "SReclaimable")


def watch(words: list[str], log: Path, events: Path | None, limit: float, tell: float = 10.0) -> Watched:
    """Run `quantmill WORDS` and look at it from outside; stopped after `limit` seconds."""
    torch.cuda.empty_cache()
    began, told = time.perf_counter(), 0.0
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "quantmill", *words], stdout=output, stderr=subprocess.STDOUT
        )
        seen = Watched(0.0, None, Peaks(device_bytes(), machine_bytes()))
        read = 0
        while child.poll() is None and seen.seconds < limit:
            time.sleep(EVERY)
            seen.seconds = time.perf_counter() - began
            seen.peaks.look(child.pid)
            lines = events.read_text().splitlines(keepends=True) if events and events.exists() else []
            for line in lines[read:]:
                if line.endswith("\n"):
                    seen.events.append((seen.seconds, json.loads(line)))
                    read += 1
                    if seen.events[-1][1]["event"] == "solved":
                        seen.solving = replace(seen.peaks)
            if seen.seconds - told > tell:
                told = seen.seconds
                print(f"  {told:6.1f} s: {len(seen.when('solved'))} linears solved", flush=True)
        seen.code = child.poll()
        if seen.code is None:
            child.terminate()
            child.wait(20)
    return seen


def add_tokenizer(folder: Path, text: Path) -> None:
    """A byte-level BPE trained on the text, as Transformers finds it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def tell_memory(seen: Watched, asked: argparse.Namespace, config: dict, free: int) -> None:
    """The peaks beside what `memory.py`, and so `plan`, predicts for the way that it chooses."""
    variants = [parse_variant(v) for v in asked.variant]
    paired = [recipe_of(asked.preset, v).two_streams for v in variants]
    load = memory.load_of(config, variants, asked.samples, asked.seqlen, "cuda", paired)
    vram, ram = (
        int(float(v.removesuffix("GB")) * 1e9) if v else None for v in (asked.max_vram, asked.max_ram)
    )
    way = memory.choose(load, "cuda", vram=min(free, vram or free), ram=ram)
    gpu, host = memory.gpu_peak(load, way), memory.host_bytes(load, way)
    print(
        f"GPU memory, all of it: {gigabytes(seen.peaks.gpu)}, planned {gigabytes(gpu)} ({way.name}), ratio "
        f"{seen.peaks.gpu / gpu:.3f}\nhost memory while solving: {seen.solving}\nhost memory in all: {seen.peaks}; "
        f"planned {gigabytes(host)}, ratio {max(seen.peaks.host, seen.peaks.resident) / host:.3f}",
        flush=True,
    )


def tell_time(seen: Watched, asked: argparse.Namespace, config: dict) -> None:
    """Seconds by part, and the floor of the layers that were solved."""
    solved = [(at, event) for at, event in seen.events if event["event"] == "solved"]
    if not solved:
        print("nothing was solved")
        return
    variants = [parse_variant(v) for v in asked.variant]
    started, last = seen.when("started")[0], solved[-1][0]
    of_layer = [at for at, e in solved if ".layers.0." in e["module"]]
    done = 1 + max(int(e["module"].split(".")[2]) for _, e in solved)
    finished = len(solved) == 7 * asked.layers * len(variants)
    floor = sum(floor_seconds(config, variants, asked.samples, asked.seqlen, asked.preset).values())
    each = (last - max(of_layer)) / max(1, done - 1)
    print(
        f"{len(variants)} variant(s), {asked.preset}, {asked.samples} x {asked.seqlen} tokens: until the first "
        f"block {started:.2f} s (Python, calibration text), {done} layers {last - started:.2f} s, first "
        f"{max(of_layer) - started:.2f}, further {each:.3f} each; floor {done * floor:.1f} s, ratio "
        f"{(last - started) / (done * floor):.2f}"
    )
    if finished:
        print(
            f"writing folders and checksums {seen.seconds - last:.2f} s; whole command {seen.seconds:.2f} s"
        )
    else:
        print(f"cut off; 32 layers would be {max(of_layer) - started + 31 * each:.1f} s")


def quantise(asked: argparse.Namespace, source: Path, scratch: Path) -> Path:
    out, events = scratch / "out", scratch / "events.jsonl"
    words = ["quantize", str(source), "--out", str(out), "--device", "cuda", "--preset", asked.preset]
    words += ["--dataset", str(asked.text), "--samples", str(asked.samples), "--seqlen", str(asked.seqlen)]
    words += [w for v in asked.variant for w in ("--variant", v)] + ["--events", str(events), "--json"]
    words += [
        w for n, v in (("--max-vram", asked.max_vram), ("--max-ram", asked.max_ram)) if v for w in (n, v)
    ]
    print("== quantmill " + " ".join(words), flush=True)
    free = torch.cuda.mem_get_info()[0]
    seen = watch(words, scratch / "log.txt", events, asked.limit)
    config = read_json(source / "config.json")
    tell_time(seen, asked, config)
    tell_memory(seen, asked, config, free)
    said = (scratch / "log.txt").read_text()
    if seen.code == 0:
        told = json.loads(said[said.index("\n{") :])
        held, tensors = (gigabytes(told[f"peak_vram_{k}bytes"] or 0) for k in ("", "tensors_"))
        fallbacks = sum(len(v["fallbacks"]) for v in told["variants"])
        print(
            f"it says: tensors took {tensors} of the GPU, torch held {held}; {fallbacks} fallbacks",
            flush=True,
        )
    else:
        print(f"exit code {seen.code}: {said.strip()[-800:]}", flush=True)
    return out


def score(asked: argparse.Namespace, source: Path, out: Path, scratch: Path) -> None:
    """`quantmill eval` of what was made first, against the original."""
    made = sorted((f for f in out.iterdir() if (f / "config.json").exists()), key=lambda f: f.name != "main")
    if not made:
        print("nothing to score: no folder was finished")
        return
    words = ["eval", str(made[0]), "--against", str(source), "--text", str(asked.text), "--device", "cuda"]
    words += ["--ctx", str(asked.seqlen), "--windows", str(asked.eval), "--json"]
    print("== quantmill " + " ".join(words), flush=True)
    seen = watch(words, scratch / "eval.txt", None, asked.limit)
    print(
        f"{seen.seconds:.2f} s, GPU {gigabytes(seen.peaks.gpu)}, host {gigabytes(seen.peaks.host)} taken, "
        f"{gigabytes(seen.peaks.resident)} resident; "
        + " ".join((scratch / "eval.txt").read_text()[-1500:].split())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--variant", action="append")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--max-vram")
    parser.add_argument("--max-ram")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds until a command is stopped")
    parser.add_argument("--eval", type=int, default=0, help="windows to score afterwards")
    parser.add_argument("--source", type=Path, help="made there if it does not exist, and kept")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    asked = parser.parse_args()
    asked.variant = asked.variant or ["4bit-128g"]
    scratch = Path(tempfile.mkdtemp(dir=asked.scratch))
    try:
        source, began = asked.source or scratch / "source", time.perf_counter()
        if not source.exists():
            make_model(source, asked.layers)
            add_tokenizer(source, asked.text)
        asked.layers = int(read_json(source / "config.json")["num_hidden_layers"])
        rates = ", ".join(f"{k} {v / 1e12:.0f}" for k, v in measured_rates().items())
        print(f"source there after {time.perf_counter() - began:.1f} s; measured rates, TFLOP/s: {rates}")
        out = quantise(asked, source, scratch)
        if asked.eval and out.is_dir():
            score(asked, source, out, scratch)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
