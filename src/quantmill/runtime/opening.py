"""A model folder -> the best runtime for it here: one table of backends, and a line that says why.

Importing this loads neither torch nor numba; whether there is a GPU is asked of its driver.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantmill.errors import BadRequest, SourceNotFound, UnsupportedModel
from quantmill.runtime.interface import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `open_runtime` was asked for."""

    folder: Path
    device: str
    threads: int | None
    exact: bool
    context: int | None
    kv_tokens: int | None
    selftest: bool
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run a model.

    refuses(wanted) -> why not, or None. open(wanted) raises UnsupportedModel for a model that it does not know,
    which the next row may.
    """

    name: str
    refuses: Callable[[Wanted], str | None]
    open: Callable[[Wanted], Runtime]


def open_runtime(
    folder: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    exact: bool = False,
    context: int | None = None,
    kv_tokens: int | None = None,
    selftest: bool = True,
    tensor_parallel: int = 1,
) -> Runtime:
    """Open a model folder, quantised or plain, with the first backend of the table that serves it.

    device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1". threads: of the processor; None: one
    per core. exact: float32 activations. context: positions a sequence may have; None: the model's, at most
    32768. kv_tokens: positions the cache holds, all sequences together; None: by the free memory. selftest:
    let a GPU compare its kernels with the reference first. tensor_parallel: processes that share every layer,
    each on a GPU of its own, or on some of the processor's cores.

    Raises SourceNotFound, BadCheckpoint, BadRequest, and UnsupportedModel where no backend knows the model.
    """
    if not folder.is_dir():
        raise SourceNotFound(f"{folder} is no folder: give a folder with config.json and *.safetensors")
    _check_device(device)
    wanted = Wanted(folder, device, threads, exact, context, kv_tokens, selftest, tensor_parallel)
    if wanted.ranks != 1:
        return _open_parallel(wanted)
    passed: list[str] = []
    for row in BACKENDS:
        reason = row.refuses(wanted)
        if reason is None:
            try:
                runtime = row.open(wanted)
            except UnsupportedModel as error:
                reason = str(error)
            else:
                log.info("%s: %s%s", folder.name, runtime.facts.name, _said(passed))
                return runtime
        passed.append(f"{row.name}: {reason}")
    raise UnsupportedModel(f"no backend runs {folder} ({'; '.join(passed)}): run `quantmill check {folder}`")


def gpu_count() -> int:
    """CUDA GPUs that the driver shows this process; 0 without a driver. Does not load torch."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _said(passed: list[str]) -> str:
    return "".join(f"; not {reason}" for reason in passed)


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise BadRequest(f"there is no device {device!r}: use --device cpu, cuda or auto")
    if kind == "cuda":
        import torch  # it also knows GPUs that this driver does not show, as AMD's

        count = torch.cuda.device_count()
        if int(number or 0) >= count:
            raise BadRequest(f"device is {device!r}, {count} GPUs are visible here: use --device cpu")


def _gpu_refuses(wanted: Wanted) -> str | None:
    if wanted.device == "cpu":
        return "the device is to be the CPU"
    if wanted.exact:
        return "exact means float32, it computes in 16 bits"
    if wanted.device == "auto" and not gpu_count():
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _open_gpu(wanted: Wanted) -> Runtime:
    from quantmill.runtime.gpu.decoder import GpuRuntime

    device = "cuda" if wanted.device == "auto" else wanted.device
    return GpuRuntime.from_folder(
        wanted.folder,
        device=device,
        kv_tokens=wanted.kv_tokens,
        context=wanted.context,
        selftest=wanted.selftest,
    )


def _cpu_refuses(wanted: Wanted) -> str | None:
    if wanted.device.startswith("cuda"):
        return "the device is to be a GPU"
    if wanted.device == "auto" and gpu_count():
        return "there is a GPU"
    return None


def _open_cpu(wanted: Wanted) -> Runtime:
    from quantmill.runtime.cpu.runtime import CpuRuntime

    return CpuRuntime.from_folder(
        wanted.folder,
        threads=wanted.threads,
        exact=wanted.exact,
        context=wanted.context,
        kv_tokens=wanted.kv_tokens,
    )


def _open_parallel(wanted: Wanted) -> Runtime:
    """On several ranks. Everything that can be refused is, before a weight is read."""
    from quantmill.checkpoint import open_checkpoint
    from quantmill.runtime.cpu.settings import read_settings
    from quantmill.runtime.parallel.opening import Asked, gpus_shared
    from quantmill.runtime.parallel.part import shares
    from quantmill.runtime.parallel.runtime import ParallelRuntime

    checkpoint = open_checkpoint(wanted.folder)
    read_settings(checkpoint.config)
    shares(checkpoint, wanted.ranks)
    refused = _gpu_refuses(wanted)
    on_gpu = refused is None
    if wanted.device.startswith("cuda") and (refused or wanted.device != "cuda"):
        why = refused or "ranks take the first GPUs, which CUDA_VISIBLE_DEVICES chooses"
        raise BadRequest(f"--device {wanted.device} with several ranks: {why}: use --device cuda or cpu")
    if on_gpu:
        gpus_shared(wanted.ranks, gpu_count())
    threads = wanted.threads
    if not on_gpu:
        from quantmill.kernels.cpu.pool import default_threads

        threads = max(1, (threads or default_threads()) // wanted.ranks)
    runtime = ParallelRuntime.start(
        Asked(
            folder=str(wanted.folder),
            meeting="",
            rank=0,
            size=wanted.ranks,
            device="cuda" if on_gpu else "cpu",
            threads=threads,
            exact=wanted.exact,
            context=wanted.context,
            kv_tokens=wanted.kv_tokens,
            selftest=wanted.selftest,
        )
    )
    log.info("%s: %s", wanted.folder.name, runtime.facts.name)
    return runtime


def _never(wanted: Wanted) -> str | None:
    return None


def _open_reference(wanted: Wanted) -> Runtime:
    from quantmill.runtime.reference import ReferenceRuntime

    return ReferenceRuntime.from_folder(
        wanted.folder,
        device=wanted.device,
        threads=wanted.threads,
        context=wanted.context,
        kv_tokens=wanted.kv_tokens,
        exact=wanted.exact,
    )


BACKENDS = (
    Row("cuda", _gpu_refuses, _open_gpu),
    Row("cpu", _cpu_refuses, _open_cpu),
    Row("reference", _never, _open_reference),
)
