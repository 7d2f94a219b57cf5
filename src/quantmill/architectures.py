"""One table of model families: the linears of a decoder block, in running order, and which share an input.

Works from `config.json` alone. Knows no tensors and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantmill.errors import BadCheckpoint, UnsupportedModel
from quantmill.types import Json


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear of one block: y (N,) = W (N, K) x (K,) + bias."""

    out_features: int
    in_features: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears that read the same activations, hence share one Hessian (and must share a setting)."""

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The numbers of a `config.json` that fix every tensor's shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model family: groups in running order, and the shape of every linear."""

    model_type: str
    groups: tuple[LinearGroup, ...]
    shapes: Callable[[Dimensions], dict[str, LinearShape]]
    norms_per_block: Callable[[Dimensions], int]  # elements of a block that are never quantised, biases apart
    blocks_prefix: str = "model.layers"
    embedding_scale: Callable[[Dimensions], float] = lambda _: (
        1.0
    )  # what looked-up embeddings are multiplied by

    @property
    def modules(self) -> tuple[str, ...]:
        """Linears of one block in running order, as suffixes of its prefix."""
        return tuple(m for group in self.groups for m in group.modules)


def _split(bias: bool) -> Callable[[Dimensions], dict[str, LinearShape]]:
    """Shapes of the Llama skeleton; `bias` tells whether q, k and v carry one (Qwen2)."""

    def shapes(d: Dimensions) -> dict[str, LinearShape]:
        q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        return {
            "self_attn.q_proj": LinearShape(q, d.hidden, bias),
            "self_attn.k_proj": LinearShape(kv, d.hidden, bias),
            "self_attn.v_proj": LinearShape(kv, d.hidden, bias),
            "self_attn.o_proj": LinearShape(d.hidden, q),
            "mlp.gate_proj": LinearShape(d.intermediate, d.hidden),
            "mlp.up_proj": LinearShape(d.intermediate, d.hidden),
            "mlp.down_proj": LinearShape(d.hidden, d.intermediate),
        }

    return shapes


def _fused(d: Dimensions) -> dict[str, LinearShape]:
    """Shapes of Phi-3: q, k, v in one matrix, gate and up in another."""
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    return {
        "self_attn.qkv_proj": LinearShape(q + 2 * kv, d.hidden),
        "self_attn.o_proj": LinearShape(d.hidden, q),
        "mlp.gate_up_proj": LinearShape(2 * d.intermediate, d.hidden),
        "mlp.down_proj": LinearShape(d.hidden, d.intermediate),
    }


_SPLIT_GROUPS = (
    LinearGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    LinearGroup("o", ("self_attn.o_proj",)),
    LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    LinearGroup("down", ("mlp.down_proj",)),
)
_FUSED_GROUPS = (
    LinearGroup("qkv", ("self_attn.qkv_proj",)),
    LinearGroup("o", ("self_attn.o_proj",)),
    LinearGroup("gate_up", ("mlp.gate_up_proj",)),
    LinearGroup("down", ("mlp.down_proj",)),
)
# Names of their own: nothing may be folded into Gemma's norms, which multiply by 1 + w, and its o and down pass a
# norm on their way to the residual stream.
_NORMED_GROUPS = (
    LinearGroup("normed_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    LinearGroup("o_normed", ("self_attn.o_proj",)),
    LinearGroup("normed_gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    LinearGroup("down_normed", ("mlp.down_proj",)),
)


def _two_norms(d: Dimensions) -> int:
    return 2 * d.hidden


def _two_norms_and_heads(d: Dimensions) -> int:
    return 2 * d.hidden + 2 * d.head_dim  # Qwen3 normalises queries and keys, too


def _four_norms_and_heads(d: Dimensions) -> int:
    return 4 * d.hidden + 2 * d.head_dim


ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture("mistral", _SPLIT_GROUPS, _split(bias=False), _two_norms),
        Architecture("llama", _SPLIT_GROUPS, _split(bias=False), _two_norms),
        Architecture("qwen2", _SPLIT_GROUPS, _split(bias=True), _two_norms),
        Architecture("qwen3", _SPLIT_GROUPS, _split(bias=False), _two_norms_and_heads),
        Architecture("phi3", _FUSED_GROUPS, _fused, _two_norms),
        Architecture(
            "gemma3_text",
            _NORMED_GROUPS,
            _split(bias=False),
            _four_norms_and_heads,
            embedding_scale=lambda d: d.hidden**0.5,
        ),
    )
}


def architecture_of(config: Json) -> Architecture:
    """The row for a `config.json`. Raises UnsupportedModel, naming the rows there are."""
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(str(model_type))
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"model_type is {model_type!r}; quantmill knows {known}: pick such a model")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UnsupportedModel(
            f"this {model_type} model sets attention_bias or mlp_bias, a layout quantmill has no row for yet"
        )
    return row


def dimensions(config: Json) -> Dimensions:
    """The sizes in a `config.json`. Raises BadCheckpoint naming a key that is missing or not a number."""

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise BadCheckpoint(
                f"config.json: {key} is {config.get(key)!r}; a positive number is needed there"
            )
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    return Dimensions(
        hidden=hidden,
        intermediate=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", max(1, hidden // heads)),
        vocab=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def linear_shapes(config: Json) -> dict[str, LinearShape]:
    """Shape of every linear of a block, keyed by its suffix, in running order."""
    return architecture_of(config).shapes(dimensions(config))


def module_names(config: Json) -> tuple[str, ...]:
    """Full names of every linear that is quantised, block by block in running order."""
    row, layers = architecture_of(config), dimensions(config).layers
    return tuple(f"{row.blocks_prefix}.{i}.{m}" for i in range(layers) for m in row.modules)
