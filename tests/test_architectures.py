"""The table of architectures against the models Transformers builds."""

from __future__ import annotations

import pytest
from torch import nn

from gptq_models import FAMILIES
from quantmill.architectures import ARCHITECTURES, architecture_of, dimensions, linear_shapes, module_names
from tiny_models import tiny_model


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_rows_name_every_linear_with_its_shape(model_type: str) -> None:
    model = tiny_model(model_type, **FAMILIES[model_type])
    config = model.config.to_dict()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert set(module_names(config)) == set(linears)
    for suffix, shape in linear_shapes(config).items():
        linear = linears[f"model.layers.1.{suffix}"]
        assert (shape.out_features, shape.in_features) == tuple(linear.weight.shape)
        assert shape.bias == (linear.bias is not None)
    row, dims = architecture_of(config), dimensions(config)
    block = model.model.layers[0]
    others = sum(p.numel() for p in block.parameters()) - sum(
        p.numel() for m in block.modules() if isinstance(m, nn.Linear) for p in m.parameters()
    )
    assert row.norms_per_block(dims) == others
