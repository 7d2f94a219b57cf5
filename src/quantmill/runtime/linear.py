"""QuantLinear: a packed linear as a torch module whose buffers are the tensors of the file, byte for byte.

Multiplies through the kernels' front door. Knows no bit layout, no file and no model but the module tree
it is put in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.errors import UnsupportedModel
from quantmill.formats.gptq import tensor_shapes
from quantmill.kernels import front_door as kernels
from quantmill.kernels.backend import spec_of
from quantmill.kernels.reference import dense_weight
from quantmill.types import PackedLinear, QuantConfig


class QuantLinear(nn.Module):
    """y = x Wᵀ + bias with W packed.

    Buffers as in the file (formats.md): `qweight`, `qzeros`, `scales`, `g_idx`, and `bias` where the
    layer has one. Whatever a backend makes of them is kept beside the buffers and is no part of the state
    dict.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantConfig,
        *,
        bias: bool = False,
        scales_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        """Buffers of zeros in the shapes that `config` gives; fill them by loading a state dict."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = config.bits
        self.group_size = config.group_size
        self.checkpoint_format = config.zero_format
        self.kept_weights = in_features * out_features
        self.backend: str | None = None
        self.reason = "chosen at the first call"
        self._ready: tuple[Tensor, kernels.Prepared] | None = None
        shapes = tensor_shapes(config.bits, config.group_size, in_features, out_features)
        for name in ("qweight", "qzeros", "g_idx"):
            self.register_buffer(name, torch.zeros(shapes[name], dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(shapes["scales"], dtype=scales_dtype, device=device))
        empty = torch.zeros(out_features, dtype=scales_dtype, device=device) if bias else None
        self.register_buffer("bias", empty)

    @classmethod
    def from_packed(cls, packed: PackedLinear) -> QuantLinear:
        """A module that holds the tensors of `packed` themselves, not copies."""
        config = QuantConfig(packed.bits, packed.group_size, checkpoint_format=packed.checkpoint_format)
        biased = packed.bias is not None
        layer = cls(packed.in_features, packed.out_features, config, bias=biased, device="meta")
        for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            setattr(layer, name, getattr(packed, name))
        return layer

    def to_packed(self) -> PackedLinear:
        """The buffers themselves, with the numbers that say how to read them."""
        return PackedLinear(
            qweight=self.qweight,
            qzeros=self.qzeros,
            scales=self.scales,
            g_idx=self.g_idx,
            bias=self.bias,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            out_features=self.out_features,
            checkpoint_format=self.checkpoint_format,
        )

    def prepare(self, dtype: torch.dtype, steps: kernels.Plan | None = None) -> kernels.Prepared:
        """Get ready for activations of `dtype`; `forward` does so by itself where nobody did before."""
        with torch.inference_mode(False), torch.no_grad():
            ready = kernels.prepare(
                self.to_packed(), dtype, kept_weights=self.kept_weights, backend=self.backend, steps=steps
            )
        self._ready = (self.qweight, ready)
        return ready

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        # `is` notices every move of the buffers, also by hooks that bring offloaded ones in for one call.
        if self._ready is None or self._ready[0] is not self.qweight or self._ready[1].dtype != x.dtype:
            return self.prepare(x.dtype)(x)
        return self._ready[1](x)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary linear with the dequantised weight, cast to `dtype`."""
        dense = dense_weight(self.to_packed(), torch.float32)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=dense.bias is not None)
        linear.weight = nn.Parameter(dense.weight.to(dtype), requires_grad=False)
        if dense.bias is not None:
            linear.bias = nn.Parameter(dense.bias.to(dtype), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        group = self.in_features if self.group_size == -1 else self.group_size
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, bits={self.bits}, group={group}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}  # copies and pickles hold the file's tensors only

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Moves between devices; a change of dtype, as by `.half()`, leaves the file's values alone."""
        kept = {name: b for name, b in (("scales", self.scales), ("bias", self.bias)) if b is not None}
        self._ready = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = None  # the copy is in place: nothing else would tell
        super()._load_from_state_dict(*args, **kwargs)


def replace_linears(
    model: nn.Module,
    names: Iterable[str],
    config: QuantConfig,
    *,
    biased: Collection[str] | None = None,
    scales_dtype: torch.dtype = torch.float16,
) -> None:
    """Put an empty QuantLinear, on the same device, in the place of each named `nn.Linear`.

    `biased`: the names that get a bias; by default those whose linear has one. Raises UnsupportedModel
    where a name is no linear of the model.
    """
    for name in names:
        old = find_linear(model, name)
        bias = old.bias is not None if biased is None else name in biased
        new = QuantLinear(
            old.in_features,
            old.out_features,
            config,
            bias=bias,
            scales_dtype=scales_dtype,
            device=old.weight.device,
        )
        new.training = old.training
        model.set_submodule(name, new)


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear called `name`. Raises UnsupportedModel where there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UnsupportedModel(
            f"the checkpoint holds a quantised {name}, the model has nothing there"
        ) from None
    if not isinstance(module, nn.Linear):
        raise UnsupportedModel(
            f"the checkpoint holds a quantised {name}, the model has a {type(module).__name__} there: "
            "quantmill serves plain linear layers"
        )
    return module


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every QuantLinear of a model by its name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def prepare_linears(model: nn.Module, dtype: torch.dtype, backend: str | None = None) -> str:
    """Choose a backend for every QuantLinear, then get all ready for activations of `dtype`.

    All are chosen before the first is prepared, so that one model gets one answer. Returns one line that
    says what was chosen and why. Raises BadRequest where `backend` names a row that is not there or does
    not serve.
    """
    layers = [layer for layer in quant_linears(model).values() if layer.qweight.device.type != "meta"]
    kept: dict[torch.device, int] = {}
    for layer in layers:
        device = layer.qweight.device
        kept[device] = kept.get(device, 0) + layer.in_features * layer.out_features
    plans = []
    for layer in layers:
        layer.backend, layer.kept_weights = backend, kept[layer.qweight.device]
        spec = spec_of(layer.to_packed(), layer.kept_weights)
        plans.append(kernels.plan(spec, layer.qweight.device, dtype, backend))
        layer.reason = kernels.explain(spec, layer.qweight.device, dtype, 1, backend)
    for layer, steps in zip(layers, plans, strict=True):
        layer.prepare(dtype, steps)
    return explain_linears(model)


def explain_linears(model: nn.Module) -> str:
    """What multiplies in this model when it decodes, and why; a line for each different answer."""
    counts = Counter(layer.reason for layer in quant_linears(model).values())
    return "\n".join(f"{count} linears: {reason}" for reason, count in counts.most_common())
