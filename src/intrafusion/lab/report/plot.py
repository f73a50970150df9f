"""Accuracy against the fraction of channels kept, one line per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from intrafusion.io.atomic import atomic_file

COLOURS = ("#c2571a", "#1f5f99", "#4b7f3a", "#7a4f9e")
_LINE_GREY = "#666666"


def accuracy_plot(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], *, original: float, title: str = ""
) -> None:
    """Draw the curves, and the accuracy of the original as a horizontal line, to an image file (.png, .svg, .pdf).

    Args:
        curves: (fraction of channels kept, accuracy), both in [0, 1], by name of the method.
        original: accuracy of the network before.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * original, color=_LINE_GREY, linewidth=1.2, linestyle=(0, (5, 3)))
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        x, y = ([100 * value for value in values] for values in zip(*points, strict=True))
        axes.plot(x, y, color=colour, linewidth=2, marker="o", markersize=5, label=name)
    kept = sorted({100 * x for points in curves.values() for x, _ in points})
    axes.set(xlabel="channels kept (%)", ylabel="test accuracy (%)", ylim=(0, 104), xticks=kept)
    axes.invert_xaxis()
    axes.set_title(title, loc="left", fontsize=11)
    axes.annotate(
        f"original {original:.1%}",
        (kept[0], 100 * original),
        (0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=_LINE_GREY,
    )
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    with atomic_file(path) as temporary:
        figure.savefig(temporary)
