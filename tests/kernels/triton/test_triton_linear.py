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

from quantmill.kernels.triton import linear, many, packing, tuning
from quantmill.kernels.triton.ends import Gated, Norm, Plain, Residual, gated_order
from quantmill.kernels.triton.tuning import Cut, WideCut

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU here: the interpreter would take hours")
# Relative to the result's norm. Rounding it may cost half an eps (4.9e-4, 3.9e-3); the rest is for the sums before.
TOLERANCE = {dtype: 0.6 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}


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
    runnable = linear.RunnableLinear.of(packing.tile(packed))
    x = torch.randn(rows, packed.in_features, device=weight.device).to(dtype)
    y = linear.matmul(x, runnable) if cut is None else linear.few_product(x, runnable, cut=cut)
    assert y.dtype == dtype
    assert wrong(y, x, weight, packed.bias) < TOLERANCE[dtype]
    return runnable, x, y


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "group"), [(192, 32), (160, 128)])
def test_a_product_with_true_act_order(device, bits, k, group):
    packed, weight = make(k, 32, bits, group, sym=False, shuffled=True, bias=True, device=device)
    runnable, _, _ = check(packed, weight, 3)
    assert runnable.tiled.order is not None


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
    monkeypatch.setattr(tuning, "MOST_FEW", 4)
    packed, weight = make(160, 32, group=32, shuffled=shuffled, bias=True, device=device)
    check(packed, weight, 5)


@pytest.mark.parametrize(
    ("cut", "programs"),
    [
        (WideCut(64, 8, 1, 2), 4),
        (WideCut(64, 8, 1, 1, 1), 1),
        (tuning.simple_wide(70), 1),
        (WideCut(64, 8, 1, 2, tuning.SIMPLE, 2, 2), 4),
    ],
)
def test_a_launch_for_many_rows_gives_its_kernel_all_it_takes(monkeypatch, cut, programs):
    monkeypatch.setattr(tuning, "processors", lambda device: 1)
    packed, _ = make(512, 128)
    runnable = linear.RunnableLinear.of(packing.tile(packed))
    y, launch = many.wide_call(torch.randn(70, 512).half(), runnable, cut, True)
    assert y.shape == (70, 128)
    assert launch.programs == programs
    of_triton = {"num_warps", "maxnreg", "launch_pdl"}
    assert launch.kernel.arg_names[len(launch.arguments) :] == [
        name for name in launch.kernel.arg_names if name in set(launch.options) - of_triton
    ]
    assert set(launch.options) <= of_triton | set(launch.kernel.arg_names)


def test_slices_begin_where_groups_do_or_the_other_way_round():
    for bits, group, k in itertools.product(
        (2, 3, 4, 8), (16, 32, 64, 128, 256, 1024, -1), (576, 1536, 14336)
    ):
        shape = packing.tile_shape(bits, group, k)
        units = -(-k // shape.columns)
        groups = 1 if group == -1 else -(-units * shape.columns // shape.group)
        words = torch.empty(8, units, shape.words, 32, 4, dtype=torch.int32, device="meta")
        scales = torch.empty(8, groups, 8, dtype=torch.int32, device="meta")
        tiled = packing.TiledLinear(words, scales, None, None, None, shape, k, 128)
        for slices in (1, 2, 4, 8, 16):
            length = linear.slice_units(tiled, slices) * shape.columns
            assert length * slices >= units * shape.columns
            assert groups == 1 or length % shape.group == 0 or shape.group % length == 0


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


# What follows runs on a GPU only: the whole product of kinds, and the shapes of real models.
REAL = [(576, 576), (576, 1536), (1536, 576), (4096, 6144), (4096, 4096), (14336, 4096)]
MANY_ROWS = [1, 2, 3, 4, 8, 9, 16, 17, 33, 64, 65, 128, 129, 256, 300, 2048]
CUTS = [
    Cut(8, 8, 4, 1, 1, 8, 4, False, False),
    Cut(8, 4, 2, 2, 2, 2, 1, False, False),
    Cut(16, 4, 4, 4, 1, 1, 1, True, True),
    Cut(16, 8, 2, 4, 2, 2, 1, True, True, True),
    Cut(32, 4, 2, 4, 2, 1, 1, True, True, True),
]


@needs_gpu
@pytest.mark.parametrize(("k", "n", "group"), EDGES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_cut_at_the_edges(device, bits, k, n, group):
    packed, weight = make(k, n, bits, group, sym=bits != 4, bias=True, device=device)
    for cut in CUTS:
        for rows in (1, 7, 8, 9, 33):
            check(packed, weight, rows, cut=cut)


@needs_gpu
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(device, parts):
    packed, _ = make(2048, 256, device=device)
    runnable = linear.RunnableLinear.of(packing.tile(packed))
    x = torch.randn(40, 2048, device=device).half()
    together = linear.few_product(x, runnable, cut=Cut(32, 8, parts, 4, 2, 2, 1, True, True, True))
    for cut in (
        Cut(8, 8, parts, 1, 1, 4, 4, False, False),
        Cut(16, 8, parts, 2, 1, 4, 2, False, False),
        Cut(16, 8, parts, 4, 1, 2, 1, True, True),
    ):
        assert torch.equal(together[7:8], linear.few_product(x[7:8], runnable, cut=cut))
        assert torch.equal(together[:12], linear.few_product(x[:12], runnable, cut=cut))


STAY = [
    Cut(16, 8, 2, 2, 1, 1, 1, True, True, False, 2),
    Cut(16, 4, 4, 4, 1, 1, 1, True, True, False, 1),
    Cut(8, 8, 8, 1, 2, 1, 1, False, True, False, 1),
]


@needs_gpu
@pytest.mark.parametrize(
    ("bits", "group", "sym"), [(4, 128, True), (3, 32, False), (8, 64, True), (4, 16, False)]
)
def test_programs_that_stay(device, bits, group, sym):
    """More blocks of rows than programs, a last slice that is shorter; the bits of programs that do not stay."""
    packed, weight = make(1888, 4640, bits, group, sym=sym, bias=True, device=device)
    runnable = linear.RunnableLinear.of(packing.tile(packed))
    for cut in STAY:
        wanted = Cut(8, cut.slices, cut.parts, 1, 1, 2, 2, False, False)
        for rows in (1, cut.rows - 1, cut.rows):
            x = torch.randn(rows, 1888, device=device).half()
            for _ in range(3):
                y = linear.few_product(x, runnable, cut=cut)
                assert wrong(y, x, weight, packed.bias) < TOLERANCE[torch.float16]
                assert torch.equal(y, linear.few_product(x, runnable, cut=wanted))
    assert not runnable.arrived.any(), "the counters are zeros again"


def made(n, k, m, device):
    packed, weight = make(k, n, device=device)
    x = torch.randn(m, k, device=device).half()
    return linear.RunnableLinear.of(packing.tile(packed)), x, x.double() @ weight.T


ENDS = [
    (5, Cut(8, 8, 8, 1, 1, 4, 4, False, False)),
    (3, Cut(8, 8, 2, 1, 2, 4, 4, False, False)),
    (29, Cut(16, 8, 8, 4, 2, 2, 1, True, True, True)),
    (40, Cut(32, 8, 2, 2, 2, 2, 1, True, True, True)),
    (13, Cut(16, 8, 2, 2, 1, 1, 1, True, True, False, 1)),
    (8, Cut(8, 8, 8, 1, 2, 1, 1, False, True, False, 1)),
]


def near(got, wanted):
    assert torch.isfinite(got).all(), "every element was written"
    assert float((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[torch.float16]


@needs_gpu
@pytest.mark.parametrize(("m", "cut"), ENDS)
def test_norm_before_and_rows_apart(device, m, cut):
    runnable, x, y = made(512, 1024, m, device)
    squares = torch.rand(m, 37, device=device) * 30
    out = torch.full((m, 520), torch.nan, device=device)[:, :512]
    linear.few_product(x, runnable, Plain(out), norm=Norm(squares, 1024, 1e-5, 2.0), cut=cut)
    near(out, y * torch.rsqrt(squares.double().sum(1, keepdim=True) / 1024 + 1e-5) / 2)


@needs_gpu
@pytest.mark.parametrize(("m", "cut"), ENDS)
def test_gate_times_up(device, m, cut):
    runnable, x, y = made(512, 1024, m, device)
    position = torch.randperm(256, device=device).int()
    out = torch.full((m, 256), torch.nan, device=device).half()
    linear.few_product(x, runnable, Gated(out, position, 2.0), cut=cut)
    gate, up = (y.view(m, 32, 2, 8)[:, :, i].reshape(m, 256) for i in range(2))
    near(out[:, position.long()], torch.nn.functional.silu(gate) * up * 2)


@needs_gpu
@pytest.mark.parametrize(("m", "cut"), ENDS)
def test_residual_and_what_is_after(device, m, cut):
    runnable, x, y = made(512, 1024, m, device)
    position = torch.randperm(512, device=device).int()
    before, gain = torch.randn(m, 512, device=device), (torch.rand(512, device=device) + 0.5).half()
    after = torch.full((m, 512), torch.nan, device=device).half()
    held = [before.clone(), after, torch.empty(m, 32, device=device)]
    end = Residual(held[0], held[1], gain, held[2], position, 0.5, 0.25)
    linear.few_product(x, runnable, end, cut=cut)
    wanted = before + y * 0.5
    near(held[0], wanted)
    near(held[1][:, position.long()], wanted * gain * 0.25)
    near(held[2], wanted.square().view(m, 32, 16).sum(2))
    alone = [before[2:3].clone(), held[1][2:3].clone(), torch.empty(1, 32, device=device)]
    end = Residual(alone[0], alone[1], gain, alone[2], position, 0.5, 0.25)
    linear.few_product(x[2:3], runnable, end, cut=Cut(8, 8, cut.parts, 1, 1, 8, 4, False, False))
    assert all(torch.equal(a, h[2:3]) for a, h in zip(alone, held, strict=True))


@needs_gpu
def test_an_overflow_is_no_infinity(device):
    runnable, x, _ = made(128, 256, 2, device)
    out = linear.few_product(
        x * 1e4, runnable, Plain(torch.empty(2, 128, device=device, dtype=torch.float16))
    )
    assert torch.isfinite(out).all()


def test_gated_order_puts_eight_rows_of_each_side_by_side():
    order = gated_order(24)
    assert order[:16].tolist() == [*range(8), *range(24, 32)]
    assert sorted(order.tolist()) == list(range(48))


# bits, group, symmetric, dtype, inputs: whole turns of 256 columns or not; (rows of x, warps, tiles) of a cut
WIDE_KINDS = [
    (4, 128, True, torch.float16, 1088, (256, 8, 1)), (4, 128, True, torch.float16, 1024, (128, 8, 1)),
    (8, 128, True, torch.float16, 1088, (64, 8, 1)), (8, 64, False, torch.float16, 1024, (128, 16, 1)),
    (3, 128, True, torch.float16, 1088, (256, 8, 1)), (3, 32, False, torch.bfloat16, 1024, (32, 16, 1)),
    (2, 64, True, torch.float16, 1088, (128, 8, 2)), (2, -1, False, torch.bfloat16, 1024, (64, 4, 1)),
    (4, 32, False, torch.float16, 1088, (64, 16, 1)), (4, -1, True, torch.bfloat16, 1024, (16, 8, 1)),
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize(("bits", "group", "sym", "dtype", "k", "shape"), WIDE_KINDS)
def test_the_kernel_for_many_rows(device, monkeypatch, bits, group, sym, dtype, k, shape):
    if not linear.has_wide(device):
        pytest.skip("no wgmma here")
    packed, weight = make(k, 512, bits, group, sym=sym, bias=True, device=device)
    runnable = linear.RunnableLinear.of(packing.tile(packed))
    shares = ((1, 0), (3, 0), (1, 1), (1, 2), (1, tuning.SIMPLE), (3, tuning.SIMPLE))  # parts of K, who stays
    for rows, processors, (parts, stay) in itertools.product((17, 65, 300), (132, 3), shares):
        monkeypatch.setattr(tuning, "processors", lambda device, n=processors: n)
        x = torch.randn(rows, k, device=device).to(dtype)
        cut = tuning.WideCut(*shape, parts, stay)
        first = linear.wide_product(x, runnable, cut)
        assert wrong(first, x, weight, packed.bias) < (5e-4 if dtype == torch.float16 else 4e-3)
        for _ in range(3):  # a race would show in one of them
            assert torch.equal(linear.wide_product(x, runnable, cut), first)
        assert not runnable.arrived.any(), "the counters are zeros again"


@needs_gpu
@pytest.mark.parametrize("group", [16, 32, 64, 128, -1, 40])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_kind_on_a_gpu(device, bits, group):
    for sym, shuffled, dtype in itertools.product((True, False), (False, True), TOLERANCE):
        if group == -1 and shuffled:
            continue
        k = 1600 if group == 40 else 1536
        packed, weight = make(k, 576, bits, group, sym=sym, shuffled=shuffled, device=device)
        for rows in (1, 13, 33, 128):
            check(packed, weight, rows, dtype)


@needs_gpu
@pytest.mark.parametrize(("k", "n"), REAL)
@pytest.mark.parametrize("bits", [3, 4])
def test_real_shapes_on_a_gpu(device, bits, k, n):
    packed, weight = make(k, n, bits, device=device)
    runnable = linear.RunnableLinear.of(packing.tile(packed))
    x = torch.randn(max(MANY_ROWS), k, device=device).half()
    for rows in MANY_ROWS:
        y = linear.matmul(x[:rows], runnable)
        assert wrong(y, x[:rows], weight) < TOLERANCE[torch.float16]
        assert torch.equal(y, linear.matmul(x[:rows], runnable))
    few, many = linear.matmul(x[:1], runnable), linear.few_product(x[: tuning.MOST_FEW], runnable)
    assert torch.equal(linear.matmul(x[:16], runnable), many[:16])
    assert torch.equal(few, many[:1])


@needs_gpu
def test_dependent_launches_in_a_graph(device):
    """A chain of layers, each launched before the one ahead of it ends, gives what it gives one by one."""
    layers = []
    for seed in range(6):
        packed, _ = make(1024, 1024, group=64, shuffled=seed % 2 == 1, device=device)
        layers.append(linear.RunnableLinear.of(packing.tile(packed)))
    x = torch.randn(4, 1024, device=device).half()

    cut = Cut(8, 8, 8, 4, 1, 2, 1, True, True, True)

    def chain(early):
        y = x
        for layer in layers:
            for _ in range(2):
                y = linear.few_product(y, layer, cut=cut, early=early) * 0.1
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
