"""Pictures: one that follows the reader's light or dark setting, and accuracy against the fraction of channels kept."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intrafusion.io.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#c2571a", "#1f5f99", "#4b7f3a", "#7a4f9e")
INK, GREY, FAINT, PAPER = "#222222", "#666666", "#e4e4e4", "#ffffff"
_DARK = {
    INK: "#e6e6e6",
    GREY: "#a3a7b0",
    FAINT: "#3b3f49",
    PAPER: "#1c1e26",
    **dict(zip(COLOURS, ("#f2995a", "#74b3ea", "#94cf7c", "#c7a2ea"), strict=True)),
}
"""What each colour of a picture becomes for readers who want dark pages."""
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), PAPER),
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "legend.frameon": False,
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "intrafusion",  # the same picture, the same bytes
}


@contextlib.contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of this size in inches, written to an image file (.png, .pdf, .svg) at the end.

    An .svg is dark for readers who want dark pages.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        yield figure
        drawn = path.suffix == ".svg"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, metadata={"Date": None} if drawn else None)
            if drawn:
                temporary.write_text(follow_reader(temporary.read_text(encoding="utf-8")), encoding="utf-8")


def follow_reader(svg: str) -> str:
    """The picture, with colours that are those of dark pages where the reader asked for such; places to 0.1 points."""
    svg = re.sub(r' (d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d)\d+", r"\1", place[0]), svg)
    light = "".join(f"--c{colour[1:]}:{colour};" for colour in _DARK)
    dark = "".join(f"--c{colour[1:]}:{other};" for colour, other in _DARK.items())
    for colour in _DARK:
        svg = svg.replace(f": {colour}", f": var(--c{colour[1:]})").replace(f'"{colour}"', f'"var(--c{colour[1:]})"')
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    head, found, rest = svg.partition("<svg")
    tag, closed, body = rest.partition(">")
    return f"{head}{found}{tag}{closed}{style}{body}"


def accuracy_plot(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], *, original: float, title: str = ""
) -> None:
    """Draw the curves, and the accuracy of the original as a horizontal line, to an image file (.png, .svg, .pdf).

    Args:
        curves: (fraction of channels kept, accuracy), both in [0, 1], by name of the method.
        original: accuracy of the network before.
    """
    with drawing(path, (6.4, 4.2)) as figure:
        axes = figure.subplots()
        axes.axhline(100 * original, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)))
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
            color=GREY,
        )
        axes.grid(axis="y", linewidth=0.8)
        axes.legend(loc="best")
