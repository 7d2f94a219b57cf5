"""A model folder, quantised or plain -> a Transformers model in memory, ready to generate.

Errors of Transformers and safetensors come out as ours. Knows no network and no text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from quantmill.checkpoint import Checkpoint, modern_view, open_checkpoint
from quantmill.errors import BadCheckpoint, BadRequest, SourceNotFound, UnsupportedModel
from quantmill.runtime.adapter import registered

log = logging.getLogger(__name__)

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_GPU_MARGIN = 1.2  # times the file: room for the cache and for activations before a model is spread over GPUs


def load_model(
    folder: Path, *, device: str = "auto", dtype: str | torch.dtype = "auto", cache: Path | None = None
) -> PreTrainedModel:
    """Read a folder into a Transformers model, in evaluation mode.

    device: "auto" (a GPU where there is one that holds the model, several where it takes several, else
        the CPU), "cpu", "cuda" or "cuda:1".
    dtype: of activations and of unquantised weights. "auto": on a GPU what config.json says (float16
        where it says nothing or float32), on a CPU float32, in which nothing of the file is rounded.
    cache: where the patched view of a folder of the AutoGPTQ era is kept.

    Raises SourceNotFound, BadCheckpoint (missing, truncated or misshapen tensors), UnsupportedModel, and
    BadRequest for a device that is not here.
    """
    checkpoint = open_checkpoint(_folder(folder))
    if checkpoint.quant is not None:
        checkpoint.quant_config  # noqa: B018  # raises for what is not GPTQ, before Transformers asks for packages
    place = _device_map(device, checkpoint)
    wanted = _dtype(dtype, place, checkpoint)
    view = modern_view(folder, cache)
    with registered(), _quiet(), _translated(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            view,
            device_map=place,
            dtype=wanted,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by _complain, with the cure
        )
    model: PreTrainedModel = loaded[0]
    _complain(folder, loaded[1])
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises SourceNotFound, or BadCheckpoint where files are missing."""
    if not any((_folder(folder) / name).is_file() for name in _TOKENIZERS):
        raise BadCheckpoint(f"{folder} has none of {', '.join(_TOKENIZERS)}: download the model again")
    with _quiet(), _translated(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise SourceNotFound(f"{folder} is no folder: give a folder with config.json and *.safetensors")
    return folder


def _device_map(device: str, checkpoint: Checkpoint) -> str | dict[str, str]:
    """What Transformers calls device_map."""
    count = torch.cuda.device_count()
    if device == "auto":
        if not count:
            return {"": "cpu"}
        need = sum(t.nbytes for t in checkpoint.tensors.values()) * _GPU_MARGIN
        free = [torch.cuda.mem_get_info(i)[0] for i in range(count)]
        return {"": f"cuda:{free.index(max(free))}"} if max(free) > need else "auto"
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise BadRequest(f"device is {device!r}; use auto, cpu, cuda or cuda:0") from None
    if asked.type == "cuda" and (asked.index or 0) >= count:
        raise BadRequest(f"device is {device!r}, {count} CUDA GPUs are visible here: use --device cpu")
    return {"": device}


def _dtype(dtype: str | torch.dtype, place: str | dict[str, str], checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise BadRequest(f"dtype is {dtype!r}; use auto, {', '.join(_DTYPES)}")
    if place == {"": "cpu"}:
        # bfloat16 is faster but rounds the dequantised weights again: 0.002 nats per token on SmolLM2-135M.
        return torch.float32
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return torch.bfloat16 if named == "bfloat16" else torch.float16


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' own bars and reports off for a while: what matters in them is raised by us."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    """Foreign errors that a bad folder causes, as ours."""
    try:
        yield
    except SafetensorError as error:
        raise BadCheckpoint(f"{folder}: a weight file cannot be read ({error}): download it again") from error
    except OSError as error:
        raise BadCheckpoint(f"{folder}: {_first_line(error)}: run `quantmill check {folder}`") from error
    except ValueError as error:
        # Transformers' words for a model type or a tokenizer class that it does not have.
        raise UnsupportedModel(f"{folder}: Transformers refuses it ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _complain(folder: Path, report: dict[str, Any]) -> None:
    """Raise BadCheckpoint for missing or misshapen tensors: Transformers would fill them with noise."""
    problems = {"missing": report["missing_keys"], "misshapen": report["mismatched_keys"]}
    for what, keys in problems.items():
        if keys:
            first = sorted(str(k if isinstance(k, str) else k[0]) for k in keys)[0]
            raise BadCheckpoint(
                f"{folder}: {len(keys)} tensors are {what}, the first is {first}: "
                f"run `quantmill check {folder}`"
            )
    if report["unexpected_keys"]:
        log.info("%s: tensors that the model has no use for: %s", folder, sorted(report["unexpected_keys"]))
