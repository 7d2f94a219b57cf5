"""What a run holds at its worst moment, on the GPU and in host memory, and the fastest way that fits.

Works from shapes alone. The terms name the pipeline's own tensors; `benchmarks/gpu_quantize.py` prints the
prediction beside what was counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantmill.architectures import architecture_of, dimensions, linear_shapes
from quantmill.errors import BadRequest
from quantmill.quantize.job import rows_share
from quantmill.types import Json, Variant

LANE_TOKENS = {"cpu": 4096, "cuda": 16384}  # tokens that run through a block at once
GPU_BASE = 600 << 20  # the driver's context and the libraries' work space
CPU_BASE = 900 << 20  # Python, torch, Transformers, numba, their buffers, the calibration text
HOST_BASE = 2458 << 20  # the same with a GPU's libraries
GPU_HOLES = 0.07  # what torch holds between tensors, a share of what they take


@dataclass(frozen=True, slots=True)
class Residence:
    """Where hidden states lie between blocks, and whether batches wait at a group or start again for each."""

    name: str
    on_host: bool
    waiting: bool
    originals_on_host: bool = False  # of preset best's two streams, the original's


RESIDENCES = (  # from the fastest to the most frugal
    Residence("resident", on_host=False, waiting=True),
    Residence("rerun", on_host=False, waiting=False),
    Residence("shared", on_host=False, waiting=False, originals_on_host=True),
    Residence("host", on_host=True, waiting=False, originals_on_host=True),
)


@dataclass(frozen=True, slots=True)
class Load:
    """The sizes that decide memory."""

    hidden: int
    intermediate: int
    groups: tuple[tuple[int, int], ...]  # (N, K) of the linears that are solved as one
    tokens: tuple[int, ...]  # of every variant's hidden states
    originals: int  # tokens of the original's hidden states, where variants take them along
    waiting: int  # tokens of the largest variant, whose batches wait at a group, one or two for each token
    lane_tokens: int

    @property
    def two_streams(self) -> bool:
        """Preset best: the original's activations beside the quantised model's."""
        return self.originals > 0

    @property
    def weights(self) -> int:
        """Weights of a block's linears."""
        return sum(n * k for n, k in self.groups)

    @property
    def widest(self) -> int:
        return max(k for _, k in self.groups)


def load_of(
    config: Json,
    variants: Sequence[Variant],
    samples: int,
    seqlen: int,
    device: str,
    paired: Sequence[bool] = (),
) -> Load:
    """The sizes of a run; `paired` says which variants take the original's stream along, none by default.

    Raises UnsupportedModel or BadCheckpoint for a bad config.
    """
    dims, shapes = dimensions(config), linear_shapes(config)
    groups = tuple(
        (sum(shapes[m].out_features for m in group.modules), shapes[group.modules[0]].in_features)
        for group in architecture_of(config).groups
    )
    own = [max(1, round(samples * rows_share(v.config))) * seqlen for v in variants]
    beside = [tokens for tokens, two in zip(own, paired, strict=False) if two]
    widest = max(beside or own)
    lane = lane_tokens(device, seqlen)
    return Load(dims.hidden, dims.intermediate, groups, tuple(own), sum(beside), widest, lane)


def lane_tokens(device: str, seqlen: int) -> int:
    """Tokens of one batch: whole rows, at least one."""
    return max(1, LANE_TOKENS[device] // seqlen) * seqlen


def states_bytes(load: Load, residence: Residence) -> tuple[int, int]:
    """Hidden states between blocks, in float16: bytes on the GPU, bytes in pinned host memory."""
    own, originals = 2 * load.hidden * sum(load.tokens), 2 * load.hidden * load.originals
    on_host = own * residence.on_host + originals * residence.originals_on_host
    return own + originals - on_host, on_host


def gpu_bytes(load: Load, residence: Residence) -> int:
    """What tensors take of a GPU at the worst moment, and the driver's part."""
    states, _ = states_bytes(load, residence)
    block = 4 * load.weights  # as stored, and what taps multiply with
    lane = load.lane_tokens * (16 * load.hidden + 12 * load.intermediate)
    # a token at the last group: the block's input, the residual and the normed residual, that group's input in
    # float32 and in 16 bits; of two streams, the residual that the gap is taken from as well
    held = 12 * load.hidden + 6 * load.widest
    held = 2 * (held + 4 * load.hidden) if load.two_streams else held
    waiting = load.waiting * held if residence.waiting else 0
    beside = load.lane_tokens * held // 2 if load.two_streams and not residence.waiting else 0
    matrices, stacks = (43, 44) if load.two_streams else (30, 24)  # bytes per element of K x K and of N x K
    solving = max(matrices * k * k + stacks * n * k for n, k in load.groups)
    return GPU_BASE + states + block + waiting + max(lane + beside, solving)


def gpu_peak(load: Load, residence: Residence) -> int:
    """GPU memory that the process holds at its worst moment, what lies free between its tensors included."""
    need = gpu_bytes(load, residence)
    return need + round(GPU_HOLES * (need - GPU_BASE))


def host_bytes(load: Load, residence: Residence) -> int:
    """Host memory at the worst moment of a run on a GPU: pinned states, pinned weights of two blocks, as much
    again for the file they are read from, packed blocks on their way to disk and the embedding."""
    _, states = states_bytes(load, residence)
    return HOST_BASE + states + 8 * load.weights


def cpu_bytes(load: Load, residence: Residence) -> int:
    """Host memory at the worst moment of a run on the CPU."""
    streams = 1 + load.two_streams
    states = 4 * (sum(load.tokens) + load.originals) * load.hidden
    held = load.waiting if residence.waiting else load.lane_tokens
    lanes = (
        2 * 4 * held * (3 * load.hidden + load.widest) * streams
    )  # twice: the allocator keeps as much again
    return CPU_BASE + states + 6 * load.weights + lanes + 40 * load.widest**2 * streams


def choose(load: Load, device: str, *, vram: int | None, ram: int | None) -> Residence:
    """The fastest way to run within `vram` and `ram` bytes. Raises BadRequest naming what the least would take."""
    ways = RESIDENCES[:2] if device == "cpu" else RESIDENCES
    if device == "cpu":
        need = [(r, 0, cpu_bytes(load, r)) for r in ways]
    else:
        need = [(r, gpu_peak(load, r), host_bytes(load, r)) for r in ways]
    for residence, on_gpu, on_host in need:
        if (vram is None or on_gpu <= vram) and (ram is None or on_host <= ram):
            return residence
    raise BadRequest(_too_little(need, vram, ram))


def _too_little(need: list[tuple[Residence, int, int]], vram: int | None, ram: int | None) -> str:
    ways = " or ".join(
        f"{on_gpu / 1e9:.1f} GB of GPU and {on_host / 1e9:.1f} GB of host memory"
        if on_gpu
        else f"{on_host / 1e9:.1f} GB"
        for _, on_gpu, on_host in need[-2:]
    )
    limits = ", ".join(f"{v / 1e9:.1f} GB {n}" for v, n in ((vram, "--max-vram"), (ram, "--max-ram")) if v)
    return f"this run needs {ways}; there is {limits}: use fewer --samples or variants, or raise the limits"
