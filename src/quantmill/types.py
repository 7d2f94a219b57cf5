"""The frozen dataclasses that every lane passes on. Imports no torch: tensors are annotations only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)


class ActOrder(StrEnum):
    """In which order a linear's input columns are quantised, and what that costs a reader.

    NONE     left to right; groups are consecutive columns
    STATIC   most active first, with every group's grid fixed beforehand; groups stay consecutive columns
    GROUPED  most active first, groups follow that order: readers must honour `g_idx`
    """

    NONE = "none"
    STATIC = "static"
    GROUPED = "grouped"


class CheckpointFormat(StrEnum):
    """How `qzeros` stores a zero point: GPTQ (v1) stores zero - 1, GPTQ_V2 the zero itself."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """One parameter set: what distinguishes one branch of a repository from another.

    Raises BadRequest when a value cannot be served.
    """

    bits: int = 4
    group_size: int = 128  # -1: one scale per output row
    act_order: ActOrder = ActOrder.STATIC
    sym: bool = True
    damp_percent: float = 0.05  # a fraction, as in every GPTQ config: 0.05 adds 5 % of the mean diagonal
    true_sequential: bool = True
    checkpoint_format: CheckpointFormat | None = None  # None: v1 where symmetric, v2 where not

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadRequest(
                f"bits is {self.bits}; GPTQ files hold {', '.join(map(str, BITS))}: use --bits 4"
            )
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise BadRequest(
                f"group size {self.group_size} is not -1 or a multiple of 8: use --group-size 128"
            )
        if not 0 < self.damp_percent < 1:
            raise BadRequest(f"damp is {self.damp_percent}; it is a fraction between 0 and 1: use --damp 0.1")

    @property
    def desc_act(self) -> bool:
        return self.act_order is not ActOrder.NONE

    @property
    def zero_format(self) -> CheckpointFormat:
        """The format that is written: v1 cannot hold every asymmetric zero point, so those go to v2."""
        default = CheckpointFormat.GPTQ if self.sym else CheckpointFormat.GPTQ_V2
        return self.checkpoint_format or default

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)

    @property
    def sym_zero(self) -> int:
        return int(2 ** (self.bits - 1))

    def effective_group(self, in_features: int) -> int:
        """Columns per group in a linear with `in_features` inputs (the last group may be shorter)."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.effective_group(in_features))


@dataclass(frozen=True, slots=True)
class Variant:
    """A parameter set and the branch (also the folder) that holds it."""

    branch: str
    config: QuantConfig
    container: str = "gptq"  # or gguf:MIX, awq
    dynamic: tuple[tuple[str, QuantConfig], ...] = ()  # full names of modules that differ -> their parameters

    def config_of(self, module: str) -> QuantConfig:
        """The parameters of one module, by its full name."""
        return dict(self.dynamic).get(module, self.config)


@dataclass(frozen=True, slots=True)
class IntLinear:
    """A solved linear, unpacked: W[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), g = g_idx[k]."""

    codes: Tensor  # (N, K) uint8
    scales: Tensor  # (N, groups) float16, may be negative where symmetric
    zeros: Tensor  # (N, groups) uint8, the true zero point
    g_idx: Tensor  # (K,) int32


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A quantised linear as it lies in a GPTQ file (formats.md)."""

    qweight: Tensor  # (ceil(K * bits / 32), N) int32
    qzeros: Tensor  # (groups, ceil(N * bits / 32)) int32
    scales: Tensor  # (groups, N) float16
    g_idx: Tensor  # (K,) int32
    bias: Tensor | None  # (N,) float16
    bits: int
    group_size: int  # as configured: -1 or a number of columns
    in_features: int
    out_features: int
    checkpoint_format: CheckpointFormat


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token blocks and the record of how they came about."""

    blocks: Tensor  # (samples, seqlen) int64
    name: str  # what the user typed: wikitext, python-docs, a file name, ...
    seed: int
    fingerprint: str  # sha256 of the token ids
    documents: int  # read from the source
    dropped: int  # too short, empty, or not needed

    @property
    def tokens(self) -> int:
        return int(self.blocks.numel())


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What became of one linear."""

    name: str  # model.layers.3.self_attn.q_proj
    loss: float  # relative output error tr(E H E') / tr(W H W') on the calibration tokens
    damp_percent: float  # what was used; more than was asked for where the Hessian was not positive definite
    tokens: int
    seconds: float
    fallback: str | None = None  # why this module is not what was asked for
    choice: str | None = None  # what preset best chose for it: damping, order, shift, refinements kept


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Measured quality of one checkpoint on one text. KL in nats per token, to the original model."""

    perplexity: float
    tokens: int
    windows: int
    ctx: int
    text: str
    text_sha256: str
    protocol: str
    original_perplexity: float | None = None
    mean_kl: float | None = None
    mean_kl_ci: tuple[float, float] | None = None
    median_kl: float | None = None
    p99_kl: float | None = None
    p999_kl: float | None = None
    max_kl: float | None = None
    top1_agreement: float | None = None
    rms_delta_p: float | None = None
    top1_agreement_ci: tuple[float, float] | None = None
    rms_delta_p_ci: tuple[float, float] | None = None
    mean_delta_p: float | None = None  # of the token that came: below 0, the model has become less sure
    perplexity_ratio: float | None = None  # to the original's
    perplexity_ratio_ci: tuple[float, float] | None = None


class Level(StrEnum):
    """How bad a finding is: an error makes `check` fail."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `quantmill check`."""

    level: Level
    where: str  # a file, a module or a config key
    message: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Everything `quantmill check` found; `loaders` maps a reader's name to "yes" or the reason why not."""

    findings: tuple[Finding, ...]
    loaders: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(f.level is not Level.ERROR for f in self.findings)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Temperature 0 is greedy."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 40  # 0: off
    repetition_penalty: float = 1.1  # divides positive logits of tokens seen in prompt or answer; 1: off
    max_new_tokens: int = 512
    seed: int | None = None
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability are out; 0: off
    typical_p: float = 1.0  # locally typical sampling; 1: off
    presence_penalty: float = 0.0  # subtracted once for tokens of the answer
    frequency_penalty: float = 0.0  # subtracted for every occurrence in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report per token; None: no log probabilities
    n: int = 1  # answers wanted
    best_of: int | None = None  # answers drawn, of which the n likeliest are given

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "use 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "it lies above 0 and at most at 1"),
            ("top_k", self.top_k >= 0, "use 0 (off) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "use 1 (off) or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "use 1 or more"),
            ("min_p", 0 <= self.min_p <= 1, "it lies from 0 (off) to 1"),
            ("typical_p", 0 < self.typical_p <= 1, "it lies above 0 and at most at 1 (off)"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "it lies from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "it lies from -2 to 2"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "use 0 to 20"),
            ("n", 1 <= self.n <= 128, "use 1 to 128"),
            ("best_of", self.best_of is None or self.n <= self.best_of <= 128, "use n to 128"),
        )
        for name, fine, cure in rules:
            if not fine:
                raise BadRequest(f"{name} is {getattr(self, name)}; {cure}")


Json = dict[str, Any]
