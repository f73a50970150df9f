"""What records say, as figures for plotly.js: plain data; colours are given in the browser, by method."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intrafusion.brief import show_briefly
from intrafusion.lab.bench.records import ORIGINAL
from intrafusion.lab.report.records import (
    FUSED,
    PRUNED,
    SCOPES,
    Measured,
    accuracy_records,
    criterion_label,
    group_by,
    latest_records,
    list_methods,
    marginal_label,
    method_label,
    original_records,
    reduction_records,
)
from intrafusion.plan import Decision

Trace = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A menu beside a figure."""

    name: str
    values: tuple[str, ...]

    __repr__ = show_briefly


@dataclass(frozen=True)
class Variant:
    """One state of a figure: traces and layout as plotly.js takes them.

    A trace's `meta` says whose it is: {"method": name} of a method, {"role": "before", "corner", ...} of others.
    """

    data: tuple[Trace, ...]
    layout: Mapping[str, Any]

    __repr__ = show_briefly


@dataclass(frozen=True)
class Figure:
    """A figure with menus; one variant for each combination of their values that there is, by their positions."""

    name: str
    title: str
    text: str
    choices: tuple[Choice, ...]
    variants: Mapping[tuple[int, ...], Variant]

    __repr__ = show_briefly


_AGAINST = ("channels kept", "parameters", "MACs")


def _menus(
    names: Sequence[str], keys: Iterable[tuple[str, ...]]
) -> tuple[tuple[Choice, ...], dict[tuple[str, ...], tuple[int, ...]]]:
    """The menus for these keys, and the position of each key in them."""
    keys = list(keys)
    choices = tuple(Choice(name, tuple(dict.fromkeys(key[i] for key in keys))) for i, name in enumerate(names))
    return choices, {key: tuple(c.values.index(v) for c, v in zip(choices, key, strict=True)) for key in keys}


def figure(
    name: str, title: str, text: str, names: Sequence[str], variants: Mapping[tuple[str, ...], Variant]
) -> Figure | None:
    if not variants:
        return None
    choices, positions = _menus(names, variants)
    return Figure(name, title, text, choices, {positions[key]: variant for key, variant in variants.items()})


def _format_share(keep: float) -> str:
    return f"{100 * keep:g} %"


def _curves(records: Iterable[Measured]) -> Figure | None:
    """Accuracy against size, one line per method; the mean over seeds, with the range."""
    records = latest_records(records)
    before = original_records(records)
    found = [r for r in reduction_records(records) if r.setting["method"] != ORIGINAL]
    variants = {}
    for (network, group, by), part in group_by(
        found, lambda r: (r.setting["network"], r.setting["group"], criterion_label(r))
    ).items():
        if len({r.setting["keep"] for r in part}) > 1:
            for against in _AGAINST:
                variants[network, group, by, against] = curve(part, before.get(network), against)
    text = "Test accuracy as channels go. The dashed line is the original network."
    ordered = dict(sorted(variants.items(), key=lambda item: item[0][1] not in SCOPES))
    return figure("curves", "Accuracy against size", text, ("Network", "Reduced", "Criterion", "Against"), ordered)


def curve(records: Sequence[Measured], before: Measured | None, against: str) -> Variant:
    traces: list[Trace] = []
    for method, part in group_by(records, lambda r: r.setting["method"]).items():
        lines = sorted(group_by(part, lambda r: r.setting["keep"]).items())
        x = [_size_shown(own[0], against) for _, own in lines]
        values = [[100 * r.result["accuracy"] for r in own] for _, own in lines]
        y = [statistics.fmean(v) for v in values]
        trace: Trace = {"type": "scatter", "mode": "lines+markers", "x": x, "y": y, "name": method_label(method)}
        if any(len(v) > 1 for v in values):
            above = [max(v) - m for v, m in zip(values, y, strict=True)]
            below = [m - min(v) for v, m in zip(values, y, strict=True)]
            trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
        trace["hovertemplate"] = "%{y:.1f} % at %{x:,}" + (" %" if against == _AGAINST[0] else "")
        traces.append({**trace, "meta": {"method": method}})
    if before is not None:
        ends = [min(min(t["x"]) for t in traces), max(max(t["x"]) for t in traces)]
        height = 100 * before.result["accuracy"]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": ends,
                "y": [height, height],
                "name": f"original {height:.1f} %",
                "hoverinfo": "skip",
                "meta": {"role": "reference"},
            }
        )
    unit = " (%)" if against == _AGAINST[0] else ""
    return Variant(
        tuple(traces),
        {
            "xaxis": {"title": {"text": against + unit}, "autorange": "reversed"},
            "yaxis": {"title": {"text": "test accuracy (%)"}, "range": [0, 102]},
        },
    )


def _size_shown(record: Measured, against: str) -> float:
    if against == _AGAINST[0]:
        return round(100 * record.setting["keep"], 6)
    return record.result["params" if against == _AGAINST[1] else "macs"]


def _gain_figure(records: Iterable[Measured]) -> Figure | None:
    """Where fusing helps: the gain over pruning for each group and keep."""
    found = [r for r in reduction_records(latest_records(records)) if r.setting["group"] not in SCOPES]
    variants = {}
    for (network, by), part in group_by(found, lambda r: (r.setting["network"], criterion_label(r))).items():
        mean = {
            key: statistics.fmean(r.result["accuracy"] for r in own)
            for key, own in group_by(
                part, lambda r: (r.setting["group"], r.setting["keep"], r.setting["method"])
            ).items()
        }
        pairs = [(g, k) for g, k, m in mean if m == PRUNED and (g, k, FUSED) in mean]
        rows, columns = list(dict.fromkeys(g for g, _ in pairs)), sorted({k for _, k in pairs}, reverse=True)
        if len(rows) > 1:
            z = [
                [100 * (mean[g, k, FUSED] - mean[g, k, PRUNED]) if (g, k) in pairs else None for k in columns]
                for g in rows
            ]
            variants[network, by] = _heatmap(rows, [_format_share(k) for k in columns], z)
    text = (
        "Points of accuracy that fusing gains over pruning, each group reduced alone, the one nearest the output first."
    )
    return figure("gains", "Where fusing helps", text, ("Network", "Criterion"), variants)


def _heatmap(rows: list[str], columns: list[str], z: list[list[float | None]]) -> Variant:
    reach = max(1.0, *(abs(v) for line in z for v in line if v is not None))
    trace: Trace = {
        "type": "heatmap",
        "x": columns,
        "y": rows,
        "z": z,
        "zmin": -reach,
        "zmax": reach,
        "xgap": 2,
        "ygap": 2,
        "showscale": False,
        "texttemplate": "%{z:+.1f}",
        "hovertemplate": "%{y}, keep %{x}: %{z:+.1f} points<extra></extra>",
        "meta": {"role": "diverging"},
    }
    layout = {
        "xaxis": {"title": {"text": "channels kept"}, "type": "category", "side": "top", "showgrid": False},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False},
        "margin": {"b": 12},
        "height": 76 + 36 * len(rows),
    }
    return Variant((trace,), layout)


def _sizes_of_records(records: Iterable[Measured]) -> Figure | None:
    """Sizes of the groups before and after, of reductions of several groups."""
    variants = {}
    for r in latest_records(records):
        sizes = r.result.get("sizes")
        if isinstance(sizes, Mapping) and len(sizes) > 1:
            variants.setdefault(
                (r.setting["network"], r.setting["group"], _format_share(r.setting["keep"])), _bars(sizes)
            )
    return figure("sizes", "Size of the groups", _GROUP_SIZES, ("Network", "Reduced", "Keep"), variants)


_GROUP_SIZES = "Channels of each group, before and after; a group is named by the first layer that produces it."


def sizes_of_plan(decisions: Iterable[Decision]) -> Figure | None:
    sizes = {d.group: (d.n, d.m) for d in decisions}
    return figure("sizes", "Size of the groups", _GROUP_SIZES, (), {(): _bars(sizes)} if sizes else {})


def _bars(sizes: Mapping[str, Sequence[int]]) -> Variant:
    names = list(sizes)
    before, after = [sizes[n][0] for n in names], [sizes[n][1] for n in names]
    common = {"type": "bar", "orientation": "h", "y": names, "hovertemplate": "%{y}: %{x}"}
    data = (
        {**common, "x": before, "name": "before", "width": 0.75, "meta": {"role": "before"}},
        {**common, "x": after, "name": "after", "width": 0.75, "meta": {"role": "after"}},
    )
    layout = {
        "barmode": "overlay",
        "xaxis": {"title": {"text": "channels"}, "rangemode": "tozero"},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
        "height": 120 + 26 * len(names),
    }
    return Variant(data, layout)


def _drift_figure(records: Iterable[Measured]) -> Figure | None:
    """Histograms of the distance of the outputs to the original's."""
    found = [r for r in latest_records(records) if "counts" in r.result]
    variants = {
        (network, group, _format_share(keep)): _drift_histogram(part)
        for (network, group, keep), part in group_by(
            found, lambda r: (r.setting["network"], r.setting["group"], r.setting["keep"])
        ).items()
    }
    text = "Euclidean distance between the outputs of the smaller network and of the original, over the test images."
    return figure("drift", "How far the outputs move", text, ("Network", "Reduced", "Keep"), variants)


def _drift_histogram(records: Sequence[Measured]) -> Variant:
    traces: list[Trace] = []
    furthest = 0.0
    for r in records:
        edges, counts = r.result["edges"], r.result["counts"]
        total, beyond = sum(counts), counts[-1]
        last = max((i for i, c in enumerate(counts[:-1]) if c), default=0)
        furthest = max(furthest, edges[last + 1])
        far = f", {100 * beyond / total:.0f} % beyond {edges[-1]:.3g}" if beyond else ""
        name = f"{method_label(r.setting['method'])}: mean {r.result['mean']:.3g}{far}"
        centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        shares = [100 * c / total for c in counts[:-1]]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "line": {"shape": "hvh", "width": 1.5},
                "fill": "tozeroy",
                "x": centres,
                "y": shares,
                "name": name,
                "hovertemplate": "%{y:.1f} % near %{x:.3g}",
                "meta": {"method": r.setting["method"]},
            }
        )
    layout = {
        "xaxis": {"title": {"text": "distance to the original's output"}, "range": [0, 1.05 * furthest]},
        "yaxis": {"title": {"text": "images (%)"}, "rangemode": "tozero"},
    }
    return Variant(tuple(traces), layout)


def _landscape(records: Iterable[Measured]) -> Figure | None:
    """Accuracy, and cross-entropy, over the plane through three networks; planes with all their rows only."""
    found = [r for r in latest_records(records) if "corners" in r.result]
    key: Callable[[Measured], Hashable] = lambda r: (  # noqa: E731
        r.setting["network"],
        r.setting["group"],
        r.setting["keep"],
        r.setting["method"],
        criterion_label(r),
        r.setting["points"],
    )
    variants = {}
    for part in group_by(found, key).values():
        rows = sorted(part, key=lambda r: r.setting["row"])
        first = rows[0].setting
        if len(rows) == first["points"]:
            where = first["network"], f"{first['group']}, {criterion_label(rows[0])}", _format_share(first["keep"])
            variants[(*where, "accuracy")] = _contour(rows, "accuracy", 100.0)
            variants[(*where, "loss")] = _contour(rows, "loss", 1.0)
    text = (
        "The plane through the weights of the original network and of the two smaller ones, which are put back at full "
        "width with zeros; distances are Euclidean, batch norms folded."
    )
    return figure("landscape", "The way between the networks", text, ("Network", "Reduced", "Keep", "Shown"), variants)


def _contour(rows: Sequence[Measured], what: str, scale: float) -> Variant:
    first = rows[0].result
    z = [[scale * v for v in r.result[what]] for r in rows]
    unit = " %" if what == "accuracy" else " nats"
    surface: Trace = {
        "type": "contour",
        "x": first["x"],
        "y": [r.result["y"] for r in rows],
        "z": z,
        "contours": {"coloring": "fill", "showlines": False},
        "ncontours": 24,
        "colorbar": {"thickness": 12, "ticksuffix": unit, "outlinewidth": 0},
        "hovertemplate": "%{z:.1f}" + unit + "<extra></extra>",
        "meta": {"role": "surface", "better": "high" if what == "accuracy" else "low"},
    }
    if what == "accuracy":
        surface |= {"zmin": 0, "zmax": 100}
    names = [name if name == ORIGINAL else method_label(name) for name in first["corner_names"]]
    x, y = zip(*first["corners"], strict=True)
    corners: Trace = {
        "type": "scatter",
        "mode": "markers+text",
        "x": list(x),
        "y": list(y),
        "text": names,
        "textposition": ["top center", "bottom center", "top center"],
        "hoverinfo": "skip",
        "showlegend": False,
        "meta": {"role": "corner"},
    }
    layout = {
        "xaxis": {
            "title": {"text": "distance in weight space"},
            "showgrid": False,
            "zeroline": False,
            "constrain": "domain",
        },
        "yaxis": {"scaleanchor": "x", "showgrid": False, "zeroline": False, "constrain": "domain"},
        "height": 480,
    }
    return Variant((surface, corners), layout)


def _fine_tuning(records: Iterable[Measured]) -> Figure | None:
    """Accuracy over the epochs of iterative compression and fine-tuning."""
    found = [r for r in latest_records(records) if "stages" in r.result]
    variants = {}
    for (network, group, keep), part in group_by(
        found, lambda r: (r.setting["network"], r.setting["group"], r.setting["keep"])
    ).items():
        traces = [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [s["epoch"] for s in r.result["stages"]],
                "y": [100 * s["accuracy"] for s in r.result["stages"]],
                "text": [s["stage"] for s in r.result["stages"]],
                "name": method_label(r.setting["method"])
                + (f" (seed {r.setting['seed']})" if r.setting["seed"] else ""),
                "hovertemplate": "%{text}, epoch %{x}: %{y:.1f} %",
                "meta": {"method": r.setting["method"]},
            }
            for r in part
        ]
        layout = {
            "xaxis": {"title": {"text": "epochs of training"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "test accuracy (%)"}, "range": [0, 102]},
        }
        variants[network, group, _format_share(keep)] = Variant(tuple(traces), layout)
    text = "Accuracy falls where channels are taken away, and comes back with training."
    return figure("training", "Reduced in steps, then fine-tuned", text, ("Network", "Reduced", "Keep"), variants)


def _marginals(records: Iterable[Measured]) -> Figure | None:
    """Accuracy of every network for each choice of marginals."""
    found = [
        r
        for r in reduction_records(latest_records(records))
        if r.experiment == "marginals" and r.setting["method"] != ORIGINAL
    ]
    variants = {}
    for (group, keep), part in group_by(found, lambda r: (r.setting["group"], r.setting["keep"])).items():
        traces = [
            {
                "type": "box",
                "y": [100 * r.result["accuracy"] for r in own],
                "name": marginal_label(method),
                "boxpoints": "all",
                "jitter": 0.4,
                "pointpos": 0,
                "showlegend": False,
                "text": [r.setting["network"] for r in own],
                "hovertemplate": "%{text}: %{y:.1f} %<extra></extra>",
                "meta": {"method": method},
            }
            for method, own in group_by(part, lambda r: r.setting["method"]).items()
        ]
        variants[group, _format_share(keep)] = Variant(
            tuple(traces), {"yaxis": {"title": {"text": "test accuracy (%)"}}}
        )
    text = "Each point is one trained network; does it matter how much mass a channel has?"
    return figure("marginals", "Masses of the channels", text, ("Reduced", "Keep"), variants)


def figures(records: Sequence[Measured]) -> dict[str, Figure]:
    """Every figure that these records allow, by name."""
    once = accuracy_records(records)
    found = (
        _curves(once),
        _gain_figure(once),
        _sizes_of_records(once),
        _marginals(records),
        _fine_tuning(records),
        _drift_figure(records),
        _landscape(records),
    )
    return {f.name: f for f in found if f is not None}


def methods_of(records: Sequence[Measured]) -> list[str]:
    """Methods that some figure draws a line for; the usual two first, so that they always have the same colours."""
    found = list_methods([r for r in latest_records(records) if "corners" not in r.result])
    return sorted(found, key=lambda m: [PRUNED, FUSED, m].index(m))
