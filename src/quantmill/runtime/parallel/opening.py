"""One rank opens its part of a model, in whichever process. The only module here that knows back ends."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from quantmill.errors import BadRequest
from quantmill.runtime.interface import Runtime

SHARE_GPU = "QUANTMILL_SHARE_GPU"  # 1: ranks may share a GPU, slowly, without CUDA graphs: for tests


@dataclass(frozen=True, slots=True)
class Asked:
    """What a rank needs to know; goes to other processes as JSON."""

    folder: str
    meeting: str  # a private folder that all ranks see
    rank: int
    size: int
    device: str  # cpu or cuda
    threads: int | None = None  # of this rank
    exact: bool = False
    context: int | None = None
    kv_tokens: int | None = None
    selftest: bool = True


def open_part(asked: Asked) -> Runtime:
    """Join the others and open this rank's part. Raises what the back ends raise, and RankLost."""
    return (_open_gpu if asked.device == "cuda" else _open_cpu)(asked)


def gpus_shared(ranks: int, gpus: int) -> bool:
    """Whether ranks have to share GPUs. Raises BadRequest where they may not."""
    if ranks <= gpus:
        return False
    if gpus and os.environ.get(SHARE_GPU) == "1":
        return True
    raise BadRequest(
        f"{ranks} ranks need {ranks} GPUs, {gpus} are visible here: use --tensor-parallel {max(1, gpus)}, "
        "or --device cpu"
    )


def _open_cpu(asked: Asked) -> Runtime:
    import torch

    from quantmill.runtime.cpu.runtime import CpuRuntime
    from quantmill.runtime.parallel.team import Team

    team = Team(Path(asked.meeting), asked.rank, asked.size, torch.device("cpu"), nccl=False)
    return CpuRuntime.from_folder(
        asked.folder,
        threads=asked.threads,
        exact=asked.exact,
        context=asked.context,
        kv_tokens=asked.kv_tokens,
        team=team,
    )


def _open_gpu(asked: Asked) -> Runtime:
    import torch

    from quantmill.runtime.gpu.decoder import GpuRuntime
    from quantmill.runtime.parallel.team import Team

    gpus = torch.cuda.device_count()
    device = torch.device("cuda", asked.rank % max(1, gpus))
    torch.cuda.set_device(device)
    nccl = not gpus_shared(asked.size, gpus)
    team = Team(Path(asked.meeting), asked.rank, asked.size, device, nccl=nccl)
    return GpuRuntime.from_folder(
        asked.folder,
        device=device,
        context=asked.context,
        kv_tokens=asked.kv_tokens,
        selftest=asked.selftest,
        team=team,
    )
