"""Which GGUF type each tensor of a file gets: llama.cpp's mixes, tensor by tensor. Works from config.json alone.

A mix has a type for most linears and exceptions where errors cost more: attn_v and ffn_down in some layers,
attn_output, the output head, the embedding. A type whose blocks do not divide a row gives way to another of
about its size. Source: llama.cpp's llama-quant.cpp (`llama_tensor_get_type`, `tensor_type_fallback`), dense
models with 32-bit rotations; where it falls back to IQ4_NL, this table takes Q4_0, which has the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from quantmill.architectures import Dimensions, dimensions
from quantmill.errors import UnsupportedModel
from quantmill.formats.gguf import TYPES, BlockType, row_bytes
from quantmill.types import Json


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the model a linear is."""

    layer: int
    layers: int
    queries_per_key: int  # attention heads that share one key/value head

    @property
    def early(self) -> bool:
        return self.layer < self.layers // 8

    @property
    def costly(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        n, i = self.layers, self.layer
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


Choice = str | Callable[[Place], str]


@dataclass(frozen=True, slots=True)
class Mix:
    """One row: the type of most linears, and the exceptions by module suffix."""

    base: str
    exceptions: dict[str, Choice] = field(default_factory=dict)


V, O, DOWN = "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"  # noqa: E741
QKV = "self_attn.qkv_proj"  # Phi-3's


def _if(condition: Callable[[Place], bool], then: str, otherwise: str) -> Callable[[Place], str]:
    return lambda place: then if condition(place) else otherwise


def _costly(place: Place) -> bool:
    return place.costly


def _early(place: Place) -> bool:
    return place.early


MIXES = {
    **{name: Mix(name) for name in ("Q4_1", "Q5_1", "Q8_0", "Q6_K")},
    "Q4_0": Mix("Q4_0", {DOWN: _if(_early, "Q4_1", "Q4_0")}),
    "Q5_0": Mix("Q5_0", {DOWN: _if(_early, "Q5_1", "Q5_0")}),
    "Q2_K": Mix("Q2_K", {V: _if(lambda p: p.queries_per_key >= 4, "Q4_K", "Q3_K"), DOWN: "Q3_K", O: "Q3_K"}),
    "Q2_K_S": Mix(
        "Q2_K",
        {V: _if(lambda p: p.queries_per_key >= 4, "Q4_K", "Q2_K"), DOWN: _if(_early, "Q4_K", "Q2_K")},
    ),
    "Q3_K_S": Mix("Q3_K"),
    "Q3_K_M": Mix(
        "Q3_K",
        {
            V: _if(lambda p: p.layer < 2, "Q5_K", "Q4_K"),
            DOWN: _if(lambda p: p.layer < p.layers // 16, "Q5_K", "Q4_K"),
            O: "Q4_K",
            QKV: "Q4_K",
        },
    ),
    "Q3_K_L": Mix("Q3_K", {V: "Q5_K", DOWN: "Q5_K", O: "Q5_K", QKV: "Q4_K"}),
    "Q4_K_S": Mix("Q4_K", {V: _if(lambda p: p.layer < 4, "Q5_K", "Q4_K"), DOWN: _if(_early, "Q5_K", "Q4_K")}),
    "Q4_K_M": Mix("Q4_K", {V: _if(_costly, "Q6_K", "Q4_K"), DOWN: _if(_costly, "Q6_K", "Q4_K"), QKV: "Q5_K"}),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", {V: _if(_costly, "Q6_K", "Q5_K"), DOWN: _if(_costly, "Q6_K", "Q5_K"), QKV: "Q6_K"}),
}
SYNONYMS = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize takes them
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def mix_name(name: str) -> str:
    """The row's own name for what a user typed. Raises UnsupportedModel, naming the rows."""
    found = SYNONYMS.get(name.upper(), name.upper())
    if found not in MIXES:
        fault = f"there is no GGUF type or mix {name!r}" if name else "no GGUF type is named"
        raise UnsupportedModel(f"{fault}: use gguf: and one of {', '.join(sorted(MIXES))}")
    return found


def tensor_types(config: Json, name: str) -> dict[str, BlockType]:
    """Type of every linear of the blocks, of `lm_head` and of `model.embed_tokens`, by module name.

    Raises UnsupportedModel for a mix, or a family of models, that GGUF files are not written for.
    """
    from quantmill.architectures import linear_shapes
    from quantmill.gguf_target import architecture

    architecture(config)  # refused now, not when all blocks are solved
    mix, sizes = MIXES[mix_name(name)], dimensions(config)
    types = {}
    for layer in range(sizes.layers):
        place = Place(layer, sizes.layers, sizes.heads // sizes.kv_heads)
        for module, shape in linear_shapes(config).items():
            choice = mix.exceptions.get(module, mix.base)
            wanted = choice if isinstance(choice, str) else choice(place)
            types[f"model.layers.{layer}.{module}"] = fitting(wanted, shape.in_features)
    return types | _outer(mix.base, sizes)


def gguf_bytes(config: Json, name: str) -> int:
    """Bytes of a file's tensors: linears, embedding and head on their types, norms in float32."""
    from quantmill.architectures import architecture_of, linear_shapes

    sizes, shapes = dimensions(config), linear_shapes(config)
    total = 4 * (sizes.hidden + sizes.layers * architecture_of(config).norms_per_block(sizes))
    for module, kind in tensor_types(config, name).items():
        shape = shapes.get(module.split(".", 3)[-1])
        rows, columns = (shape.out_features, shape.in_features) if shape else (sizes.vocab, sizes.hidden)
        total += rows * row_bytes(kind, columns)
    return total


def _outer(base: str, sizes: Dimensions) -> dict[str, BlockType]:
    """The head gets six bits or more; a tied embedding is the head."""
    head = "Q8_0" if base == "Q8_0" or sizes.hidden % 256 else "Q6_K"
    embedding = head if sizes.tied else base
    types = {"model.embed_tokens": fitting(embedding, sizes.hidden)}
    return types if sizes.tied else types | {"lm_head": fitting(head, sizes.hidden)}


def fitting(name: str, columns: int) -> BlockType:
    """The type itself where its blocks divide a row, else what llama.cpp takes instead. Raises UnsupportedModel."""
    kind = TYPES[name]
    if columns % kind.block and name in FALLBACKS:
        kind = TYPES[FALLBACKS[name]]
    if columns % kind.block:
        raise UnsupportedModel(
            f"rows of {columns} weights are no multiple of {kind.block}: no GGUF type holds them"
        )
    return kind
