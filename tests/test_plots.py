import subprocess
import sys

import pytest
from PIL import Image

from quantmill.errors import BadRequest
from quantmill.plots import SizePoint, loss_by_layer, loss_by_size

POINTS = [
    SizePoint("main", 4_160_000_000, 0.031, (0.029, 0.034)),
    SizePoint("4-bit 32g", 4_570_000_000, 0.022),
    SizePoint("8-bit 128g", 7_680_000_000, 0.0005, (0.0004, 0.0006)),
]
KINDS = ("self_attn.q_proj", "mlp.down_proj")


def curve(scale):
    names = [f"model.layers.{layer}.{kind}" for layer in range(4) for kind in KINDS]
    return [(name, scale * (i + 1)) for i, name in enumerate(names)]


def drawn(monkeypatch):
    """The axes of every picture that is saved from here on."""
    import quantmill.plots

    kept = []
    save = quantmill.plots._save

    def keep(figure, path):
        kept.append(figure.axes[0])
        save(figure, path)

    monkeypatch.setattr(quantmill.plots, "_save", keep)
    return kept


def texts(axes):
    return {text.get_text() for text in axes.texts}


def test_the_picture_of_sizes_is_a_png_of_useful_size(tmp_path):
    path = tmp_path / "size.png"
    loss_by_size(POINTS, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] > 900
        assert "Software" not in image.info
    assert [p.name for p in tmp_path.iterdir()] == ["size.png"]


def test_same_numbers_same_bytes(tmp_path):
    for draw, data in ((loss_by_size, POINTS), (loss_by_layer, {"a": curve(1e-3), "b": curve(1e-5)})):
        draw(data, tmp_path / "one.png")
        draw(data, tmp_path / "two.png")
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_every_branch_is_a_labelled_point_at_its_size(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    loss_by_size(POINTS, tmp_path / "size.png", y_label="perplexity")
    assert texts(axes[0]) == {"main", "4-bit 32g", "8-bit 128g"}
    points = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in axes[0].lines if line.get_marker() == "o"
    ]
    assert points == [(4.16, 0.031), (4.57, 0.022), (7.68, 0.0005)]
    assert axes[0].get_xlabel() == "size of the weight files (GB)"
    assert axes[0].get_ylabel() == "perplexity"
    assert axes[0].get_yscale() == "log"


def test_small_files_are_drawn_in_megabytes_and_narrow_losses_linearly(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    loss_by_size([SizePoint("a", 90_000_000, 29.1), SizePoint("b", 130_000_000, 23.7)], tmp_path / "size.png")
    assert axes[0].get_xlabel() == "size of the weight files (MB)"
    assert axes[0].get_yscale() == "linear"


def test_the_dashed_line_leaves_out_what_another_branch_beats(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    loss_by_size([*POINTS, SizePoint("worse", 5_000_000_000, 0.03)], tmp_path / "size.png")
    front = next(line for line in axes[0].lines if line.get_linestyle() == "--")
    assert list(front.get_xdata()) == [4.16, 4.57, 7.68]


def test_labels_of_neighbours_do_not_cover_each_other(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    crowd = [
        SizePoint(f"gptq-4bit-{i}g-actorder_True", 4_000_000_000 + i * 20_000_000, 0.03) for i in range(3)
    ]
    loss_by_size([*crowd, SizePoint("far", 8_000_000_000, 0.001)], tmp_path / "size.png")
    boxes = [text.get_window_extent() for text in axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_two_branches_at_one_place_both_have_labels(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    loss_by_size([SizePoint("a", 10**9, 0.1), SizePoint("b", 10**9, 0.1)], tmp_path / "size.png")
    assert texts(axes[0]) == {"a", "b"}


def test_one_branch_has_a_line_per_kind_of_linear(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    loss_by_layer({"main": curve(1e-3)}, tmp_path / "layer.png")
    lines = {line.get_label(): line for line in axes[0].lines}
    assert set(lines) == {"q_proj", "down_proj"}
    assert list(lines["q_proj"].get_xdata()) == [0, 1, 2, 3]
    assert list(lines["q_proj"].get_ydata()) == pytest.approx([1e-3, 3e-3, 5e-3, 7e-3])
    assert axes[0].get_yscale() == "log"
    assert "main" in axes[0].get_title(loc="left")


def test_several_branches_have_a_line_each_at_the_geometric_mean(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    loss_by_layer({"main": curve(1e-3), "other": curve(1e-5)}, tmp_path / "layer.png")
    lines = {line.get_label(): line for line in axes[0].lines}
    assert set(lines) == {"main", "other"}
    assert lines["main"].get_ydata()[0] == pytest.approx((1e-3 * 2e-3) ** 0.5)


def test_modules_without_a_layer_and_zero_losses_are_left_out(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    losses = [("lm_head", 0.5), ("model.layers.0.mlp.up_proj", 0.0), ("model.layers.1.mlp.up_proj", 0.25)]
    loss_by_layer({"main": losses}, tmp_path / "layer.png")
    assert list(axes[0].lines[0].get_xdata()) == [1]


@pytest.mark.parametrize("curves", [{}, {"main": []}, {"main": [("lm_head", 0.5)]}])
def test_no_losses_no_picture(tmp_path, curves):
    with pytest.raises(BadRequest, match=r"quantize_report\.json"):
        loss_by_layer(curves, tmp_path / "layer.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("points", [[], [SizePoint("main", 10**9, float("nan"))]])
def test_no_points_no_picture(tmp_path, points):
    with pytest.raises(BadRequest, match="quantmill eval"):
        loss_by_size(points, tmp_path / "size.png")


def test_the_import_is_light_and_touches_no_global_state(tmp_path):
    code = """
import sys, pathlib, quantmill.plots as p
assert not {"matplotlib", "numpy", "torch"} & set(sys.modules)
p.loss_by_size([p.SizePoint("a", 10**9, 0.1)], pathlib.Path(sys.argv[1]) / "a.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
