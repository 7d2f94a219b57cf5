"""Pictures of measured numbers, as PNG files: size against loss, loss against layer.

Takes plain values, knows no reports and no folders but the file it writes. Figures are built as objects on
the Agg canvas: no global state, no display, and the same numbers give the same bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.errors import BadRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

INK, PALE, GRID = "#1f2933", "#7b8794", "#e4e7eb"
# Told apart by most colour-blind readers, dark enough for a white page (after Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3428a", "#b58900", "#3f4d5c", "#2f9fd0", "#8c3b1f")
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "h")
DPI = 144
KL_LABEL = "mean KL to the original (nats per token)"
LOSS_LABEL = "relative output error of a linear"

_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": INK, "pad": 12}
_LAYER = re.compile(r"\.(\d+)\.")
_PLACES = ((9, 0), (-9, 0), (0, 10), (0, -10), (8, 9), (-8, 9), (8, -9), (-8, -9), (22, 16), (-22, -16))
_LEGEND_WIDTH = 100  # characters
_SPAN = 3  # from this ratio of largest to smallest loss on, the axis is logarithmic

Point = tuple[float, float]
Curve = Sequence[tuple[str, float]]  # (module name, loss), as reported


@dataclass(frozen=True, slots=True)
class SizePoint:
    """One branch in the picture of size against loss."""

    label: str
    size_bytes: int
    loss: float  # in the unit of the y axis
    interval: tuple[float, float] | None = None  # confidence interval of the loss


def loss_by_size(points: Sequence[SizePoint], path: Path, *, y_label: str = KL_LABEL) -> None:
    """Every branch as a point: size of its weight files (GB or MB) against loss, log where that spans much.

    A dashed line joins the branches that no other beats in both. Raises BadRequest where there is no point.
    """
    drawn = sorted((p for p in points if math.isfinite(p.loss)), key=lambda p: (p.size_bytes, p.loss))
    if not drawn:
        raise BadRequest("no measured branch to draw: run `quantmill eval` on one first")
    figure, axes = _figure(7.2, 4.3)
    unit, divisor = ("GB", 1e9) if drawn[-1].size_bytes >= 1e9 else ("MB", 1e6)
    sizes, losses = [p.size_bytes / divisor for p in drawn], [p.loss for p in drawn]
    if min(losses) > 0 and max(losses) > _SPAN * min(losses):
        _log_scale(axes)
    front = [
        (sizes[i], losses[i]) for i in range(len(drawn)) if losses[i] < min(losses[:i], default=math.inf)
    ]
    axes.plot(*zip(*front, strict=True), "--", color=PALE, linewidth=1, zorder=1)
    for i, point in enumerate(drawn):
        _draw_interval(axes, sizes[i], point.interval)
        axes.plot(sizes[i], losses[i], "o", color=COLOURS[0], markersize=7, markeredgecolor="white", zorder=3)
    axes.margins(0.12, 0.14)
    axes.set_xlabel(f"size of the weight files ({unit})")
    axes.set_ylabel(y_label)
    axes.set_title("Size against loss (lower left is better)", **_TITLE)
    figure.canvas.draw()  # fixes the layout, so that places in pixels are final
    labelled = [((sizes[i], losses[i]), point.label) for i, point in enumerate(drawn)]
    _label_points(axes, labelled, [_pixel_box(axes, at, 7) for at, _ in labelled] + _line_boxes(axes, front))
    _save(figure, path)


def loss_by_layer(curves: Mapping[str, Curve], path: Path) -> None:
    """Loss against layer, log: a line per kind of linear or, for several branches, a line per branch.

    A branch's line is the geometric mean over the linears of a layer, its band runs from the least to the
    largest. Modules without a layer number and losses that are not positive are left out. Raises BadRequest
    where nothing is left.
    """
    from matplotlib.ticker import MaxNLocator

    layers = {branch: _by_layer(curve) for branch, curve in curves.items()}
    layers = {branch: found for branch, found in layers.items() if found}
    if not layers:
        raise BadRequest("no loss per layer to draw: a quantize_report.json lists them")
    figure, axes = _figure(7.2, 4.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    _log_scale(axes)
    if len(layers) == 1:
        branch, only = next(iter(layers.items()))
        _draw_kinds(axes, only)
        axes.set_title(f"Loss of every linear, layer by layer: {branch}", **_TITLE)
    else:
        _draw_branches(axes, layers)
        axes.set_title("Loss of the linears, layer by layer", **_TITLE)
    numbers = [number for found in layers.values() for number in found]
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.set_xlabel("layer")
    axes.set_ylabel(LOSS_LABEL)
    figure.legend(
        loc="outside lower center", ncols=_columns(axes), frameon=False, fontsize=8.5, labelcolor=INK
    )
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure in the house style, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(which="both", colors=PALE, labelcolor=INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(9.5)
    return figure, axes


def _log_scale(axes: Axes) -> None:
    """A log y axis with plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-")))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path) -> None:
    """Write the picture whole or not at all; without metadata, which would carry a version into the bytes."""
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, format="png", metadata={"Software": None})
    os.replace(partial, path)


def _draw_interval(axes: Axes, size: float, interval: tuple[float, float] | None) -> None:
    if interval:
        axes.plot(
            [size, size], interval, color=COLOURS[0], linewidth=2, alpha=0.45, solid_capstyle="butt", zorder=2
        )


def _label_points(axes: Axes, labels: Sequence[tuple[Point, str]], taken: list[Bbox]) -> None:
    """Write each label beside its point, at the first place where it covers nothing, else at the best."""
    for point, label in labels:
        tried: list[tuple[float, Annotation, Bbox]] = []
        for offset in _PLACES:
            text = _annotate(axes, label, point, offset)
            box = text.get_window_extent()
            tried.append((_overlap(box, taken, axes.bbox), text, box))
            if tried[-1][0] == 0:
                break
        _, chosen, box = min(tried, key=lambda t: t[0])
        for _, text, _ in tried:
            if text is not chosen:
                text.remove()
        taken.append(box)


def _annotate(axes: Axes, label: str, point: Point, offset: tuple[int, int]) -> Annotation:
    x, y = offset
    return axes.annotate(
        label,
        point,
        xytext=offset,
        textcoords="offset points",
        ha="left" if x > 0 else "right" if x < 0 else "center",
        va="bottom" if y > 0 else "top" if y < 0 else "center",
        fontsize=8.5,
        color=INK,
    )


def _pixel_box(axes: Axes, point: Point, radius: float) -> Bbox:
    """The square of half-width `radius` pixels around a point of the data."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(point)
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _line_boxes(axes: Axes, line: Sequence[Point]) -> list[Bbox]:
    """Small boxes along a polyline of the data, a few pixels apart, for labels to keep clear of."""
    from matplotlib.transforms import Bbox

    boxes: list[Bbox] = []
    corners = [axes.transData.transform(point) for point in line]
    for start, end in pairwise(corners):
        steps = max(1, int(math.dist(start, end) // 6))
        for x, y in (start + (end - start) * (i / steps) for i in range(steps + 1)):
            boxes.append(Bbox.from_extents(x - 2, y - 2, x + 2, y + 2))
    return boxes


def _overlap(box: Bbox, taken: Iterable[Bbox], inside: Bbox) -> float:
    """Square pixels of `box` that cover something else or lie outside the axes."""

    def area(b: Bbox | None) -> float:
        return float(b.width * b.height) if b is not None else 0.0

    covered = sum(area(box.intersection(box, other)) for other in taken)
    return round(covered + area(box) - area(box.intersection(box, inside)), 3)


def _by_layer(curve: Curve) -> dict[int, dict[str, float]]:
    """Layer -> kind of linear (`q_proj`) -> loss, in order of layers."""
    layers: dict[int, dict[str, float]] = {}
    for module, loss in curve:
        number = _LAYER.search(module)
        if number and loss > 0 and math.isfinite(loss):
            layers.setdefault(int(number[1]), {})[module.rpartition(".")[2]] = loss
    return dict(sorted(layers.items()))


def _draw_kinds(axes: Axes, layers: dict[int, dict[str, float]]) -> None:
    kinds = list(dict.fromkeys(kind for found in layers.values() for kind in found))
    for i, kind in enumerate(kinds):
        x = [layer for layer, found in layers.items() if kind in found]
        _line(axes, x, [layers[layer][kind] for layer in x], kind, i)


def _draw_branches(axes: Axes, layers: dict[str, dict[int, dict[str, float]]]) -> None:
    for i, (branch, found) in enumerate(layers.items()):
        x, losses = list(found), [list(kinds.values()) for kinds in found.values()]
        middle = [math.exp(sum(map(math.log, v)) / len(v)) for v in losses]
        least, largest = [min(v) for v in losses], [max(v) for v in losses]
        axes.fill_between(x, least, largest, color=COLOURS[i % len(COLOURS)], alpha=0.10, linewidth=0)
        _line(axes, x, middle, branch, i)


def _line(axes: Axes, x: list[int], y: list[float], label: str, i: int) -> None:
    axes.plot(
        x,
        y,
        color=COLOURS[i % len(COLOURS)],
        marker=MARKERS[i % len(MARKERS)],
        markersize=4,
        markeredgecolor="white",
        markeredgewidth=0.5,
        linewidth=1.5,
        label=label,
    )


def _columns(axes: Axes) -> int:
    """Legend columns: one row if it fits the width, else rows of about equal length."""
    widths = [len(str(line.get_label())) + 5 for line in axes.get_lines()]
    if sum(widths) <= _LEGEND_WIDTH:
        return len(widths)
    rows = math.ceil(len(widths) / max(1, _LEGEND_WIDTH // max(widths)))
    return math.ceil(len(widths) / rows)
