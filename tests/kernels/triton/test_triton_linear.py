"""Every kernel of the GPU's linears beside its slow twin: tile edges here, all of it and real shapes on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from gptq_models import exact_weight, random_linear
from quantmill.formats.gptq import dequantize, pack
from quantmill.types import CheckpointFormat, QuantConfig

pytest.importorskip("triton.language", reason="triton is not installed")

from quantmill.kernels.triton import linear, packing, tuning
from quantmill.kernels.triton.tuning import Cut

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU here: the interpreter would take hours")
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}  # a rounding of the result, relative to its norm


def make(k, n, bits=4, group=128, *, sym=True, shuffled=False, bias=False, device="cpu"):
    """A packed linear on the device and its exact weight there."""
    config = QuantConfig(bits=bits, group_size=group, sym=sym)
    solved = random_linear(k, n, config, shuffled=shuffled)
    packed = pack(solved, config, torch.randn(n) if bias else None)
    fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    moved = {a: v.to(device) if isinstance(v, torch.Tensor) else v for a, v in fields.items()}
    return dataclasses.replace(packed, **moved), exact_weight(solved).to(device)


def wrong(y, x, weight, bias=None):
    wanted = x.double() @ weight.T
    if bias is not None:
        wanted += bias.double()
    return float((y.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(packed, weight, rows, dtype=torch.float16, cut=None):
    """One product against float64."""
    tiled = linear.RunnableLinear.of(packing.tile(packed))
    x = torch.randn(rows, packed.in_features, device=weight.device).to(dtype)
    y = linear.matmul(x, tiled) if cut is None else linear.tiled_product(x, tiled, cut)
    assert y.dtype == dtype
    assert wrong(y, x, weight, packed.bias) < TOLERANCE[dtype]
    assert not tiled.arrived.any(), "the counters are zeros again"
    return tiled, x, y


# K, N, group: one tile, one tile and a bit, the real small model's 576, a short last group, one group,
# groups that no plane honours, more than one block of rows
EDGES = [
    (128, 32, 128), (160, 32, 32), (576, 32, 128), (96, 64, -1), (96, 32, 24), (192, 160, 96), (64, 32, 16),
]  # fmt: skip


@pytest.mark.parametrize(("k", "n", "group"), EDGES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_dense_weight_is_bit_for_bit_the_twins(device, bits, sym, k, n, group):
    packed, _ = make(k, n, bits, group, sym=sym, device=device)
    tiled = packing.tile(packed)
    weight = linear.dense_weight(tiled, torch.float16)
    wanted = dequantize(packed, torch.float16)
    if tiled.order is not None:
        wanted = torch.nn.functional.pad(wanted, (0, 1)).index_select(1, tiled.order.long() % (k + 1))
    assert torch.equal(weight, wanted)


@pytest.mark.parametrize(("k", "n", "group"), EDGES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product_is_the_twins(device, bits, k, n, group):
    packed, weight = make(k, n, bits, group, sym=bits != 4, bias=True, device=device)
    check(packed, weight, 2, cut=Cut(64, 2, 4, 3))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "group"), [(192, 32), (160, 128)])
def test_true_act_order_is_read_through_the_order(device, bits, k, group):
    packed, weight = make(k, 32, bits, group, sym=False, shuffled=True, device=device)
    tiled, _, _ = check(packed, weight, 3, cut=Cut(32, 1, 4, 3))
    assert tiled.tiled.order is not None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_exact_in_bfloat16(device, bits):
    """With scales of 1: the interpreter rounds to bfloat16 by cutting off, and multiplies none of it."""
    packed, _ = make(256, 32, bits, 32, sym=False, device=device)
    packed = dataclasses.replace(packed, scales=torch.ones_like(packed.scales))
    weight = linear.dense_weight(packing.tile(packed), torch.bfloat16)
    assert torch.equal(weight, dequantize(packed, torch.bfloat16))


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 40])
def test_any_number_of_rows_and_strided_x(device, rows):
    packed, weight = make(128, 32, device=device)
    tiled = linear.RunnableLinear.of(packing.tile(packed))
    x = torch.randn(rows, 256, device=device).half()[:, 64:192]
    y = linear.matmul(x, tiled)
    assert y.shape == (rows, 32)
    assert rows == 0 or wrong(y, x, weight) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("shuffled", [False, True])
def test_many_rows_go_through_a_dense_copy(device, shuffled, monkeypatch):
    monkeypatch.setattr(tuning, "MOST_ROWS", 4)
    packed, weight = make(160, 32, group=32, shuffled=shuffled, bias=True, device=device)
    check(packed, weight, 5)


def test_v1_and_v2_zero_points(device):
    packed, weight = make(128, 32, device=device)
    old = dataclasses.replace(
        packed, qzeros=packed.qzeros - 0x11111111, checkpoint_format=CheckpointFormat.GPTQ
    )
    if packed.checkpoint_format is CheckpointFormat.GPTQ:
        old = dataclasses.replace(
            packed, qzeros=packed.qzeros + 0x11111111, checkpoint_format=CheckpointFormat.GPTQ_V2
        )
    assert packing.tile(old).zeros is None
    check(old, weight, 1)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(device):
    packed, _ = make(512, 96, device=device)
    tiled = linear.RunnableLinear.of(packing.tile(packed))
    x = torch.randn(20, 512, device=device).half()
    together = linear.tiled_product(x, tiled, Cut(64, 2, 4, 3))
    alone = linear.tiled_product(x[7:8], tiled, Cut(32, 2, 4, 4))
    assert torch.equal(together[7:8], alone)


# What follows runs on a GPU only: the whole product of kinds, and the shapes of real models.
REAL = [(576, 576), (576, 1536), (1536, 576), (4096, 6144), (4096, 4096), (14336, 4096)]
MANY_ROWS = [1, 2, 3, 4, 8, 16, 17, 64, 128, 129, 256, 2048]


@needs_gpu
@pytest.mark.parametrize("group", [16, 32, 64, 128, -1, 40])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_kind_on_a_gpu(device, bits, group):
    for sym, shuffled, dtype in itertools.product((True, False), (False, True), TOLERANCE):
        if group == -1 and shuffled:
            continue
        k = 1600 if group == 40 else 1536
        packed, weight = make(k, 576, bits, group, sym=sym, shuffled=shuffled, device=device)
        for rows in (1, 33, 128):
            check(packed, weight, rows, dtype)


@needs_gpu
@pytest.mark.parametrize(("k", "n"), REAL)
@pytest.mark.parametrize("bits", [3, 4])
def test_real_shapes_on_a_gpu(device, bits, k, n):
    packed, weight = make(k, n, bits, device=device)
    tiled = linear.RunnableLinear.of(packing.tile(packed))
    x = torch.randn(max(MANY_ROWS), k, device=device).half()
    for rows in MANY_ROWS:
        y = linear.matmul(x[:rows], tiled)
        assert wrong(y, x[:rows], weight) < TOLERANCE[torch.float16]
        again = linear.matmul(x[:rows], tiled)
        assert torch.equal(y, again)
    few, many = linear.matmul(x[:1], tiled), linear.matmul(x[:128], tiled)
    assert torch.equal(linear.matmul(x[:16], tiled), many[:16])
    assert torch.equal(few, many[:1])


@needs_gpu
def test_dependent_launches_in_a_graph(device):
    """A chain of layers, each launched before the one ahead of it ends, gives what it gives one by one."""
    layers = []
    for seed in range(6):
        packed, _ = make(1024, 1024, group=64, shuffled=seed % 2 == 1, device=device)
        layers.append(linear.RunnableLinear.of(packing.tile(packed)))
    x = torch.randn(4, 1024, device=device).half()

    def chain(early):
        y = x
        for layer in layers:
            y = linear.tiled_product(y, layer, Cut(64, 4, 4, 4), early=early) * 0.1
            y = linear.tiled_product(y, layer, Cut(64, 4, 4, 4), early=early) * 0.1
        return y

    wanted = chain(False)
    chain(None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(None)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)
