"""Run times of schedules as stacked bars, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from intrafusion.io.atomic import atomic_file
from intrafusion.lab.report.plot import COLOURS

_MORE = (*COLOURS, "#b08a1e", "#2f8f8a", "#9a3b3b", "#555555")


def run_times_plot(
    path: Path, runs: Mapping[str, Sequence[tuple[str, float, float]]], *, title: str = "Run times by phase"
) -> None:
    """Two bars for each run, to an image file (.png, .svg, .pdf).

    Args:
        runs: by name, (phase, seconds of its slowest member, seconds of all members together), in order.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(phase for phases in runs.values() for phase, _, _ in phases))
    colours = dict(zip(names, _MORE * (1 + len(names) // len(_MORE)), strict=False))
    figure = Figure(figsize=(8.0, 1.6 + 0.9 * len(runs)), dpi=150, layout="constrained")
    axes = figure.subplots()
    ticks: list[tuple[float, str]] = []
    for row, (name, phases) in enumerate(runs.items()):
        for place, (label, column) in enumerate((("one machine each", 1), ("sum of work", 2))):
            y, start = 2.4 * row + place, 0.0
            for phase in phases:
                axes.barh(y, phase[column], 0.8, left=start, color=colours[phase[0]])
                start += float(phase[column])
            axes.annotate(f"{start:.1f} s", (start, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
            ticks.append((y, f"{name}, {label}"))
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds")
    axes.set_title(title, loc="left", fontsize=11)
    handles = [axes.barh(0, 0, color=colour) for colour in colours.values()]
    axes.legend(handles, names, frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.16))
    with atomic_file(path) as temporary:
        figure.savefig(temporary)
