"""The classes through which Transformers reads quantised folders, and the switch that puts them in its tables.

Transformers owns the names "gptq", "awq" and "compressed-tensors" and needs more packages for each; here its
rows are replaced by ones that need none. Which modules are quantised is read from the weight files, not from
the config. The public door is `quantmill.hf`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from quantmill.errors import BadCheckpoint, BadRequest, UnsupportedModel
from quantmill.formats.config import module_config
from quantmill.formats.dialects import Layout
from quantmill.formats.gptq import config_from_json, config_to_json, probe_format, tensor_shapes
from quantmill.packed import LAYOUTS
from quantmill.runtime.foreign import ForeignLinear, tensor_info
from quantmill.runtime.linear import find_linear, prepare_linears, quant_linears, replace_linears
from quantmill.types import Json, QuantConfig

log = logging.getLogger(__name__)

Headers = dict[str, tuple[tuple[int, ...], str]]  # tensor name -> shape, dtype as safetensors spells it

_NEEDED = ("qweight", "qzeros", "scales", "g_idx")
_SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class GPTQConfig(transformers.GPTQConfig):  # Transformers compares class *names*: keep this one
    """A `quantization_config` with method "gptq", kept key for key so that saving writes what was read.

    Raises BadCheckpoint or UnsupportedModel where the keys ask for something that would be read wrongly:
    settings that differ from module to module, other packings.
    """

    def __init__(self, **keys: Any) -> None:
        self.parsed = config_from_json(keys)
        super().__init__(
            bits=self.parsed.bits,
            group_size=self.parsed.group_size,
            damp_percent=self.parsed.damp_percent,
            desc_act=self.parsed.desc_act,
            act_group_aware=False,  # the default makes Transformers warn next to desc_act
            sym=self.parsed.sym,
            true_sequential=self.parsed.true_sequential,
            format=str(self.parsed.zero_format),
        )
        self.file_keys = {**keys, "quant_method": "gptq"}

    def to_dict(self) -> Json:
        return dict(self.file_keys)

    def module(self, name: str) -> QuantConfig:
        """The parameters of one module."""
        return module_config(self.file_keys, name)


class AwqConfig(transformers.AwqConfig):  # likewise
    """A `quantization_config` with method "awq". Once loaded, the model holds GPTQ (v2) tensors and says so.

    Raises UnsupportedModel for another version than "gemm", BadCheckpoint for senseless values.
    """

    layout = Layout.AWQ

    def __init__(self, **keys: Any) -> None:
        self.parsed = config_from_json({**keys, "quant_method": "awq"})
        super().__init__(bits=4, group_size=self.parsed.group_size)
        self.file_keys = {**keys, "quant_method": "awq"}

    def to_dict(self) -> Json:
        return config_to_json(self.parsed)

    def module(self, name: str) -> QuantConfig:
        return module_config(self.file_keys, name)


class CompressedTensorsConfig(QuantizationConfigMixin):
    """A `quantization_config` with method "compressed-tensors", format "pack-quantized". Saved as GPTQ (v2).

    Raises UnsupportedModel for another format or several groups of settings.
    """

    layout = Layout.COMPRESSED

    def __init__(self, **keys: Any) -> None:
        self.file_keys = {**keys, "quant_method": "compressed-tensors"}
        self.parsed = config_from_json(self.file_keys)
        self.quant_method = QuantizationMethod.COMPRESSED_TENSORS

    def to_dict(self) -> Json:
        return config_to_json(self.parsed)

    def module(self, name: str) -> QuantConfig:
        return module_config(self.file_keys, name)


class QuantLinearQuantizer(HfQuantizer):
    """What a model of QuantLinears can do, whatever layout it was read from."""

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()`: ordinary linears with the dequantised weights."""
        for name, layer in quant_linears(model).items():
            model.set_submodule(name, layer.to_linear(dtype or model.dtype))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class GptqQuantizer(QuantLinearQuantizer):
    """Puts a QuantLinear wherever the checkpoint has a `qweight`, then lets Transformers load the buffers."""

    quantization_config: GPTQConfig

    def __init__(self, quantization_config: GPTQConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise BadRequest(
                "this folder is not quantised and GPTQConfig asks Transformers to do it: "
                "type `quantmill quantize SOURCE --out DIR`, or call quantmill.hf.unregister() first"
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config.parsed
        files = kwargs.get("checkpoint_files")
        if not files:  # a state dict was handed over: there is nothing to look at
            replace_linears(model, block_linears(model), config)
            return model
        headers = read_headers(files)
        for name, layer in match_layers(model, file_layers(headers)).items():
            own = self.quantization_config.module(layer.name)
            layer.check(find_linear(model, name), own)
            biased = (name,) if layer.bias else ()
            replace_linears(model, (name,), own, biased=biased, scales_dtype=layer.scales_dtype)
        check_shapes(model, headers)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in quant_linears(model).items():
            if layer.qzeros.device.type != "meta":
                own = self.quantization_config.module(name)
                layer.checkpoint_format = probe_format(layer.qzeros, layer.bits, own.sym, own.zero_format)
        if chosen := prepare_linears(model, model.dtype):
            log.info("%s", chosen)
        return model


class ForeignQuantizer(QuantLinearQuantizer):
    """Lets Transformers load the tensors of a foreign layout as they are, then rearranges them."""

    quantization_config: AwqConfig | CompressedTensorsConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        headers = read_headers(kwargs.get("checkpoint_files") or [])
        for name, layer in match_layers(model, foreign_layers(headers, config)).items():
            layer.check(find_linear(model, name))
            model.set_submodule(name, layer)
        check_shapes(model, headers)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, ForeignLinear)]:
            model.set_submodule(name, layer.to_quant_linear())
        if chosen := prepare_linears(model, model.dtype):
            log.info("%s", chosen)
        return model


def foreign_layers(headers: Headers, config: AwqConfig | CompressedTensorsConfig) -> dict[str, ForeignLinear]:
    """The quantised modules that the files hold, by name, empty."""
    row, layers = LAYOUTS[config.layout], {}
    ending = f".{row.marker}"
    for module in (n.removesuffix(ending) for n in headers if n.endswith(ending)):
        names = {s: f"{module}.{s}" for s in row.dtypes if f"{module}.{s}" in headers}
        own = {s: tensor_info(headers[n][1], headers[n][0]) for s, n in names.items()}
        layers[module] = ForeignLinear(module, config.layout, config.module(module), own)
    return layers


@dataclass(frozen=True, slots=True)
class FileLayer:
    """What the headers of the weight files say of one quantised module."""

    name: str
    shapes: dict[str, tuple[int, ...]]  # by suffix: qweight, qzeros, scales, g_idx, bias
    scales_dtype: torch.dtype

    @property
    def bias(self) -> bool:
        return "bias" in self.shapes

    def check(self, linear: nn.Linear, config: QuantConfig) -> None:
        """Raises BadCheckpoint where a tensor is missing or not of the shape that config and model need."""
        needed = tensor_shapes(config.bits, config.group_size, linear.in_features, linear.out_features)
        for suffix in _NEEDED:
            found = self.shapes.get(suffix)
            if found is None or found != tuple(needed[suffix]):
                raise BadCheckpoint(
                    f"{self.name}.{suffix} is {found or 'missing'}; {config.bits} bits with group size "
                    f"{config.group_size} need {tuple(needed[suffix])}: run `quantmill check` on the folder"
                )


def read_headers(files: list[str]) -> Headers:
    """Shape and dtype of every tensor. Raises BadCheckpoint for a file that is no safetensors."""
    headers: Headers = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise BadCheckpoint(
                f"{file} is not safetensors; quantmill opens no pickle: take a safetensors branch"
            )
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  # no mapping
                tensor = f.get_slice(name)
                headers[name] = (tuple(tensor.get_shape()), str(tensor.get_dtype()))
    return headers


def file_layers(headers: Headers) -> dict[str, FileLayer]:
    """The quantised modules that the files hold, by name."""
    layers = {}
    for module in (name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")):
        shapes = {s: headers[f"{module}.{s}"][0] for s in (*_NEEDED, "bias") if f"{module}.{s}" in headers}
        scales = headers.get(f"{module}.scales", ((), "F16"))[1]
        layers[module] = FileLayer(module, shapes, _SCALES.get(scales, torch.float16))
    return layers


def check_shapes(model: Any, headers: Headers) -> None:
    """Raises BadCheckpoint for a tensor not of the model's shape: older Transformers would take it."""
    for name, tensor in model.state_dict().items():
        found = headers[name][0] if name in headers else tuple(tensor.shape)
        if found != tuple(tensor.shape):
            raise BadCheckpoint(
                f"{name} is {found}, the model needs {tuple(tensor.shape)}: "
                "run `quantmill check` on the folder"
            )


Layer = TypeVar("Layer", FileLayer, ForeignLinear)


def match_layers(model: Any, layers: dict[str, Layer]) -> dict[str, Layer]:
    """The same layers by their names in the model: a class without a head drops the file's "model.".

    Raises UnsupportedModel for a quantised module that the model does not have.
    """
    base = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}
    head = model.get_output_embeddings() is not None
    matched = {}
    for name, layer in layers.items():
        here = next((n for n in (name, name.removeprefix(base), base + name) if n in modules), None)
        if here is not None:
            matched[here] = layer
        elif head or name.startswith(base):
            raise UnsupportedModel(
                f"the checkpoint holds a quantised {name}, {type(model).__name__} has nothing of that name: "
                "quantmill serves plain linear layers"
            )
    return matched


def block_linears(model: nn.Module) -> list[str]:
    """Every linear of the decoder blocks: what a GPTQ file holds where nobody says otherwise."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]


# (Transformers' table, the name in it) -> our row.
_Table = dict[str, Any]
_QUANTIZERS: _Table = auto.AUTO_QUANTIZER_MAPPING
_CONFIGS: _Table = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
_ROWS: tuple[tuple[_Table, str, type], ...] = (
    (_QUANTIZERS, "gptq", GptqQuantizer),
    (_CONFIGS, "gptq", GPTQConfig),
    (_QUANTIZERS, "awq", ForeignQuantizer),
    (_CONFIGS, "awq", AwqConfig),
    (_QUANTIZERS, "compressed-tensors", ForeignQuantizer),
    (_CONFIGS, "compressed-tensors", CompressedTensorsConfig),
)
_replaced: dict[int, Any] = {}


def register() -> None:
    """Replace Transformers' rows; a second call changes nothing."""
    for number, (table, name, ours) in enumerate(_ROWS):
        if table.get(name) is not ours:
            _replaced[number] = table.get(name)
            table[name] = ours


def unregister() -> None:
    """Put Transformers' own rows back."""
    for number, theirs in list(_replaced.items()):
        table, name, _ = _ROWS[number]
        table[name] = theirs
        del _replaced[number]


@contextmanager
def registered() -> Iterator[None]:
    """Ours for the length of a `with`; afterwards the rows are as they were before."""
    before = [table.get(name) for table, name, _ in _ROWS]
    for table, name, ours in _ROWS:
        table[name] = ours
    try:
        yield
    finally:
        for (table, name, _), theirs in zip(_ROWS, before, strict=True):
            table[name] = theirs
