"""Which backend opens which folder, and what is said about it."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

from gptq_models import write_quantized
from quantmill.errors import BadRequest, SourceNotFound, UnsupportedModel
from quantmill.runtime import opening
from quantmill.runtime.interface import Piece
from quantmill.runtime.opening import open_runtime
from quantmill.types import QuantConfig
from tiny_models import tiny_model

OPTIONS = {"threads": 1, "kv_tokens": 256}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(opening, "gpu_count", lambda: 0)
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path_factory.getbasetemp() / "home"))


def first(runtime):
    return np.asarray(runtime.forward([Piece([5, 6, 7], 0, [0])]))


@pytest.fixture
def llama(tmp_path):
    tiny_model("llama").half().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_known_model_runs_on_the_cpu(llama, caplog):
    with caplog.at_level(logging.INFO):
        runtime = open_runtime(llama, **OPTIONS)
    assert runtime.facts.name == "cpu int16"
    assert "llama: cpu int16; not cuda: there is no GPU" in caplog.text
    exact = open_runtime(llama, exact=True, **OPTIONS)
    assert exact.facts.name == "cpu exact"
    assert np.abs(first(exact) - first(runtime)).max() < 0.05


def test_an_unknown_one_goes_to_the_reference(tmp_path, caplog):
    model = tiny_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256)
    model.save_pretrained(tmp_path / "gpt2")
    with caplog.at_level(logging.INFO):
        runtime = open_runtime(tmp_path / "gpt2", **OPTIONS)
    assert runtime.facts.name.startswith("reference cpu float32")
    assert "not cpu: model_type is 'gpt2'" in caplog.text


def test_a_rotary_embedding_that_only_transformers_knows(tmp_path, caplog):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    tiny_model("llama", rope_parameters=rope).save_pretrained(tmp_path / "m")
    with caplog.at_level(logging.INFO):
        assert open_runtime(tmp_path / "m", **OPTIONS).facts.name.startswith("reference")
    assert "not cpu: rotary embedding 'dynamic'" in caplog.text


def test_the_numbers_of_a_row_reach_its_runtime(llama):
    facts = open_runtime(llama, context=100, kv_tokens=640, threads=1).facts
    assert (facts.context, facts.pages) == (100, 10)


def test_a_gpu_is_asked_first(llama, monkeypatch):
    asked = []
    rows = (opening.Row("cuda", lambda w: None, asked.append), *opening.BACKENDS[1:])

    def refuse(wanted):
        asked.append(wanted.device)
        raise UnsupportedModel("it does not know llamas")

    monkeypatch.setattr(opening, "BACKENDS", (opening.Row("cuda", lambda w: None, refuse), *rows[1:]))
    assert open_runtime(llama, **OPTIONS).facts.name == "cpu int16"
    assert asked == ["auto"]


@pytest.mark.parametrize("device", ["tpu", "cpu:1", "cuda:x", "cuda:99"])
def test_devices_that_are_not_there(llama, device):
    with pytest.raises(BadRequest, match="use --device cpu"):
        open_runtime(llama, device=device)


def test_no_folder(tmp_path):
    with pytest.raises(SourceNotFound):
        open_runtime(tmp_path / "nowhere")


def test_nothing_that_runs_it(llama, monkeypatch):
    monkeypatch.setattr(opening, "BACKENDS", opening.BACKENDS[:1])
    with pytest.raises(UnsupportedModel, match=r"no backend runs .*cuda: there is no GPU"):
        open_runtime(llama)


def test_a_packed_model_opens_without_torch(tmp_path):
    """The second start: everything is in the cache."""
    folder = tmp_path / "q"
    write_quantized(folder, tiny_model("llama"), QuantConfig(group_size=32))
    open_runtime(folder, **OPTIONS).close()
    code = (
        "import sys; from pathlib import Path; from quantmill.runtime.opening import open_runtime;"
        "from quantmill.runtime.interface import Piece;"
        "open_runtime(Path(sys.argv[1]), threads=1, kv_tokens=64).forward([Piece([5], 0, [0])]);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=300)
