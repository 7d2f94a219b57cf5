"""What a decoder's step needs from `config.json`: sizes, norms, rotary angles, windows. Knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmill.architectures import Dimensions, architecture_of, dimensions
from quantmill.errors import UnsupportedModel
from quantmill.types import Json

MODEL_TYPES = ("mistral", "llama", "qwen2", "qwen3", "phi3")
CURE = "load it with Transformers instead (quantmill.hf.register())"


@dataclass(frozen=True, slots=True)
class Settings:
    """The numbers of one model. `windows`: positions that each layer's queries see, 0 where all."""

    sizes: Dimensions
    epsilon: float
    positions: int  # as many as the model was made for
    windows: tuple[int, ...]
    head_norms: bool  # queries and keys are normalised head by head
    inverse_frequencies: NDArray[np.float32]  # (head_dim / 2,)
    rotary_scale: float = 1.0  # of cosines and sines


def read_settings(config: Json) -> Settings:
    """Raises UnsupportedModel for what the compiled step does not do, naming it."""
    architecture_of(config)
    kind = str(config["model_type"])
    if kind not in MODEL_TYPES:
        raise UnsupportedModel(f"our decoders know {', '.join(MODEL_TYPES)}, not {kind}: {CURE}")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act is {config['hidden_act']!r}; our decoders do silu: {CURE}")
    sizes = dimensions(config)
    for name in ("hidden", "intermediate", "head_dim"):
        if getattr(sizes, name) % 16:
            raise UnsupportedModel(f"{name} size {getattr(sizes, name)} is no multiple of 16: {CURE}")
    frequencies, scale = _rotary(config, sizes.head_dim)
    return Settings(
        sizes=sizes,
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        positions=int(config.get("max_position_embeddings", 2048)),
        windows=_windows(config, kind, sizes.layers),
        head_norms=kind == "qwen3",
        inverse_frequencies=frequencies,
        rotary_scale=scale,
    )


def _windows(config: Json, kind: str, layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window") or 0
    if kind == "llama" or not window:
        return (0,) * layers
    if kind in ("mistral", "phi3"):
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (0,) * layers
    if kinds := config.get("layer_types"):
        return tuple(window if k == "sliding_attention" else 0 for k in kinds)
    full = int(config.get("max_window_layers", layers))
    return tuple(0 if i < full else window for i in range(layers))


def _rotary(config: Json, head_dim: int) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies, and what cosines and sines are multiplied by."""
    rope: Json = {**config, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or 10000.0)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind not in _SCALINGS or float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel(f"rotary embedding {kind!r} is not one of {', '.join(_SCALINGS)}: {CURE}")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / theta ** exponents.astype(np.float64)).astype(np.float32)
    return _SCALINGS[kind](frequencies, rope, theta), _yarn_scale(rope) if kind == "yarn" else 1.0


def _unscaled(frequencies: NDArray[np.float32], rope: Json, theta: float) -> NDArray[np.float32]:
    return frequencies


def _linear(frequencies: NDArray[np.float32], rope: Json, theta: float) -> NDArray[np.float32]:
    return frequencies / np.float32(rope["factor"])


def _llama3(frequencies: NDArray[np.float32], rope: Json, theta: float) -> NDArray[np.float32]:
    """Llama 3.1: long waves are stretched, short ones kept, those between mixed."""
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _original_positions(rope)
    waves = 2 * math.pi / frequencies
    mix = ((original / waves - low) / (high - low)).clip(0, 1)
    return ((1 - mix) * frequencies / factor + mix * frequencies).astype(np.float32)


def _yarn(frequencies: NDArray[np.float32], rope: Json, theta: float) -> NDArray[np.float32]:
    """YaRN (Peng et al., 2023): stretched from the wave that turns beta_slow times in the original context on,
    kept up to the one that turns beta_fast times, mixed by a ramp over dimensions between them."""
    original, count = _original_positions(rope), len(frequencies)

    def dimension(turns: float) -> float:
        return count * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = dimension(float(rope.get("beta_fast") or 32))
    high = dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    ramp = ((np.arange(count) - low) / (high - low if high != low else 0.001)).clip(0, 1)
    mixed: NDArray[np.float32] = frequencies * (ramp / _yarn_factor(rope) + 1 - ramp)
    return mixed.astype(np.float32)


def _yarn_scale(rope: Json) -> float:
    def scale(weight: float) -> float:
        factor = _yarn_factor(rope)
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    first, every = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(float(first)) / scale(float(every)) if first and every else scale(1.0)


def _yarn_factor(rope: Json) -> float:
    factor = rope.get("factor")
    return float(
        factor if factor is not None else rope["max_position_embeddings"] / _original_positions(rope)
    )


def _original_positions(rope: Json) -> float:
    """Positions the model was trained on before its context was stretched."""
    return float(rope.get("original_max_position_embeddings") or rope["max_position_embeddings"])


_SCALINGS: dict[str, Callable[[NDArray[np.float32], Json, float], NDArray[np.float32]]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
