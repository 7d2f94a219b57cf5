"""The CPU runtime on the siblings: AWQ, compressed-tensors and repacked GGUF give the GPTQ folder's logits."""

from pathlib import Path

import numpy as np
import pytest

from gptq_models import write_quantized
from quantmill.convert import convert
from quantmill.runtime.opening import open_runtime
from quantmill.runtime.single import SingleSequence
from quantmill.sources import resolve
from quantmill.types import QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model

PROMPT = list(range(5, 25))


def logits(folder: Path) -> np.ndarray:
    runtime = open_runtime(folder, device="cpu", threads=1, selftest=False)
    try:
        assert type(runtime).__name__ == "CpuRuntime"
        return np.asarray(SingleSequence(runtime).score(PROMPT))
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_quantized(folder, tiny_model("mistral", hidden_size=128, intermediate_size=256), QuantConfig(4, 32))
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", ["awq", "compressed-tensors", "gguf"])
def test_the_same_logits(source: Path, tmp_path: Path, to: str) -> None:
    converted = convert(source, to, tmp_path / "out", lambda *_: None).path
    folder = resolve(str(converted), cache_dir=tmp_path / "cache", run=True)
    np.testing.assert_allclose(logits(folder), logits(source), rtol=1e-4, atol=1e-4)
