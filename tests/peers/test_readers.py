"""Others read what is made here. Each peer is optional: without it its tests skip and say what to install.

llama.cpp (xllamacpp) and compressed-tensors run in this interpreter: pip install 'quantmill[peers]'. GPTQModel
pins its own torch and Transformers, so it runs in an interpreter of its own, named by QUANTMILL_PEER_PYTHON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptq_models import write_quantized
from quantmill.checkpoint import open_checkpoint
from quantmill.convert import convert
from quantmill.doctor import check
from quantmill.quantize.calibration import fingerprint
from quantmill.quantize.job import Job
from quantmill.quantize.pipeline import quantize
from quantmill.types import CalibrationSet, QuantConfig, Variant
from tiny_models import byte_level_tokenizer, tiny_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}

ASK_LLAMA = """
import sys
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.cpuparams.n_threads = sys.argv[1], 256, 1, False, 1
server = x.Server(p)
if sys.argv[2] == "chat":
    asked = {"messages": [{"role": "user", "content": sys.argv[3]}], "max_tokens": 16, "temperature": 0}
    print("ANSWER", server.handle_chat_completions(asked)["choices"][0]["message"]["content"])
else:
    answer = server.handle_completions({"prompt": sys.argv[3], "max_tokens": 4, "temperature": 0})
    print("ANSWER", answer["usage"]["prompt_tokens"], answer["choices"][0]["text"])
"""
ASK_GPTQMODEL = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
backend = BACKEND.TORCH_AWQ if sys.argv[3] == "awq" else BACKEND.TORCH
model = GPTQModel.load(sys.argv[1], device="cpu", backend=backend)
with torch.inference_mode():
    torch.save(model.model(torch.arange(5, 45)[None]).logits.float(), sys.argv[2])
"""


def run(python: str, code: str, *words: object) -> str:
    done = subprocess.run([python, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def llama_cpp(*words: object) -> str:
    python = os.environ.get("QUANTMILL_LLAMA_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", "import xllamacpp"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("xllamacpp is not installed: pip install 'quantmill[peers]'")
    return run(python, ASK_LLAMA, *words).partition("ANSWER ")[2].strip()


def gptqmodel() -> str:
    python = os.environ.get("QUANTMILL_PEER_PYTHON")
    if not python:
        pytest.skip(
            "QUANTMILL_PEER_PYTHON names no interpreter with GPTQModel (benchmarks/peer_gptqmodel.py)"
        )
    return python


def quantised(folder: Path, config: QuantConfig, family: str = "llama") -> torch.nn.Module:
    twin = write_quantized(folder, tiny_model(family, **SIZES), config)
    byte_level_tokenizer().save_pretrained(folder)
    return twin


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_llama_cpp_loads_a_converted_file_and_cuts_text_alike(tmp_path: Path, family: str) -> None:
    quantised(tmp_path / "model", QuantConfig(4, 32), family)
    path = convert(tmp_path / "model", "gguf:Q4_0", tmp_path / "m.gguf", lambda *_: None).path
    text = "the cat sat on 12 mats"
    count = llama_cpp(path, "complete", text).split()[0]
    assert int(count) == len(byte_level_tokenizer()(text).input_ids)
    assert check(path).loaders["llama.cpp"] == "yes"


def test_llama_cpp_refuses_what_check_says_it_does(tmp_path: Path) -> None:
    """A file whose last block lacks a tensor: the table names one that is not there."""
    quantised(tmp_path / "model", QuantConfig(4, 32), "mistral")
    path = convert(tmp_path / "model", "gguf:Q4_0", tmp_path / "m.gguf", lambda *_: None).path
    raw = path.read_bytes()
    assert raw.count(b"blk.1.ffn_up.weight") == 1
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    assert "blk.1.ffn_up.weight" in check(path).loaders["llama.cpp"]
    with pytest.raises(AssertionError):
        llama_cpp(path, "complete", "the cat")


@pytest.mark.slow
@pytest.mark.model
def test_llama_cpp_answers_sensibly(smol: Path, tmp_path: Path) -> None:
    from quantmill.gguf_target import GgufModel, GgufTensor, write_gguf
    from quantmill.quantize.gguf_mix import tensor_types
    from quantmill.quantize.gguf_out import ROWS_AT_ONCE
    from quantmill.quantize.gguf_solve import round_to_nearest
    from quantmill.quantize.gguf_step import to_bytes

    opened = open_checkpoint(smol)
    types = tensor_types(opened.config, "Q8_0")
    tensors = []
    for name, info in opened.tensors.items():
        kind = types.get(name.removesuffix(".weight"))

        def rows(name: str = name, kind=kind):
            tensor = opened.load(name)
            if kind is None:
                return tensor.float().numpy()
            parts = [to_bytes(round_to_nearest(p.float(), kind)) for p in torch.split(tensor, ROWS_AT_ONCE)]
            return torch.cat(parts).numpy()

        tensors.append(GgufTensor(name, info.shape, kind.name if kind else "F32", rows))
    write_gguf(tmp_path / "m.gguf", GgufModel("smol", opened.config, smol, "Q8_0"), tensors)
    # a prompt that the original goes on with by a wide margin: rounding cannot turn it
    assert "Paris" in llama_cpp(tmp_path / "m.gguf", "complete", "The capital of France is")
    assert llama_cpp(tmp_path / "m.gguf", "chat", "What is the capital of France?")


@pytest.mark.slow
def test_llama_cpp_loads_the_mixes_of_the_family(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_model("mistral", **sizes).half().save_pretrained(tmp_path / "source")
    byte_level_tokenizer().save_pretrained(tmp_path / "source")
    blocks = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    data = CalibrationSet(blocks, "random", 0, fingerprint(blocks), 4, 0)
    mixes = ("Q2_K", "Q3_K_M", "Q4_K_M")  # every K type is in one of them
    variants = tuple(Variant(m, QuantConfig(4, 32), f"gguf:{m}") for m in mixes)
    job = Job(tmp_path / "source", "some/Model", tmp_path / "out", variants, data)
    for done in quantize(job, lambda _: None):
        assert check(next(done.folder.glob("*.gguf"))).loaders["llama.cpp"] == "yes"
        answer = llama_cpp(next(done.folder.glob("*.gguf")), "complete", "the cat sat")
        assert int(answer.split()[0]) == len(byte_level_tokenizer()("the cat sat").input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["awq", "gptq"])
def test_gptqmodel_gives_the_same_logits(tmp_path: Path, to: str) -> None:
    python = gptqmodel()
    twin = quantised(tmp_path / "model", QuantConfig(4, 32))
    folder = tmp_path / "model"
    if to == "awq":
        folder = convert(folder, "awq", tmp_path / "awq", lambda *_: None).path
    assert check(folder).loaders["gptqmodel"] == "yes"
    run(python, ASK_GPTQMODEL, folder, tmp_path / "logits.pt", to)
    with torch.inference_mode():
        wanted = twin(torch.arange(5, 45)[None]).logits
    got = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)  # it computes in 16 bits
