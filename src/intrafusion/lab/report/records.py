"""What records say, as tables: the same for the command line and for the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from intrafusion.brief import show_briefly
from intrafusion.lab.bench.records import INNER, ORIGINAL, WHOLE
from intrafusion.measure.significance import kruskal_wallis

PRUNED, FUSED = "select", "intrafusion"
SCOPES = (WHOLE, INNER)
_METHOD_NAMES = {"select": "pruned", "intrafusion": "fused", "fold": "folded"}
_OURS_NAMES = {"pivot+images": "ours (default)", "pivot+noise": "ours (default, on noise)"}
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Measured(Protocol):
    """A record; see `intrafusion.lab.bench.Record`."""

    @property
    def experiment(self) -> str: ...
    @property
    def setting(self) -> Mapping[str, Any]: ...
    @property
    def result(self) -> Mapping[str, Any]: ...
    @property
    def environment(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the number that it is sorted by."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header; `numeric` columns are set to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()

    __repr__ = show_briefly

    def texts(self) -> list[tuple[str, ...]]:
        return [tuple(cell.text for cell in row) for row in self.rows]


def method_label(method: str) -> str:
    """How a method is called in tables: "fused (bias=false) + closed_form", or "ours (default)"."""
    if method in _OURS_NAMES:
        return _OURS_NAMES[method]
    first, *steps = method.split("+")
    name, _, options = first.partition(":")
    shown = _METHOD_NAMES.get(name, name) + (f" ({options.replace(',', ', ')})" if options else "")
    return " + ".join([shown, *steps])


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """In the order in which the keys first come up."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def latest_records(records: Iterable[Measured]) -> list[Measured]:
    """The last record of every setting."""
    return list({repr((r.experiment, sorted(r.setting.items(), key=str))): r for r in records}.values())


def reduction_records(records: Iterable[Measured]) -> list[Measured]:
    """Records of one reduction and its accuracy."""
    return [
        r
        for r in records
        if isinstance(r.result.get("accuracy"), (int, float))
        and {"network", "group", "keep", "method"} <= r.setting.keys()
    ]


def accuracy_records(records: Iterable[Measured]) -> list[Measured]:
    """Records of experiments on accuracy alone; the others have tables of their own."""
    return [r for r in records if not {"counts", "stages", "corners"} & r.result.keys() and r.experiment != "marginals"]


def original_records(records: Iterable[Measured]) -> dict[str, Measured]:
    """The record of the original, by network."""
    return {r.setting["network"]: r for r in reduction_records(records) if r.setting["method"] == ORIGINAL}


def list_methods(records: Iterable[Measured]) -> list[str]:
    """In the order in which they first come up, the original left out."""
    found = [m for r in records for m in str(r.setting.get("method", ORIGINAL)).split(" | ")]
    return [m for m in dict.fromkeys(found) if m != ORIGINAL]


def criterion_label(record: Measured) -> str:
    """Criterion and order of the groups, the latter where it is not the usual one."""
    order = record.setting.get("order", "joint")
    name = str(record.setting.get("criterion", ""))
    return name if order == "joint" else f"{name} {order}".strip()


def format_percent(value: float) -> Cell:
    return Cell(f"{100 * value:.1f} %", 100 * value)


def _format_spread(values: Sequence[float]) -> Cell:
    """A mean in percent, with the standard deviation of several."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return format_percent(mean)
    return Cell(f"{100 * mean:.1f} ± {100 * statistics.stdev(values):.1f} %", 100 * mean)


def _format_points(value: float) -> Cell:
    return Cell(f"{100 * value:+.1f}", 100 * value)


def comparison(records: Iterable[Measured]) -> Table | None:
    """One row per network, group, keep and criterion; accuracy of each method, and what fusing gains over pruning."""
    found = [r for r in reduction_records(latest_records(records)) if r.setting["method"] != ORIGINAL]
    if not found:
        return None
    columns = list_methods(found)
    gain = PRUNED in columns and FUSED in columns
    names = dict.fromkeys(r.setting["network"] for r in found)
    lines = group_by(found, lambda r: (r.setting["network"], r.setting["group"], r.setting["keep"], criterion_label(r)))
    rows = []
    for (network, group, keep, by), part in lines.items():
        values = {
            m: [r.result["accuracy"] for r in own] for m, own in group_by(part, lambda r: r.setting["method"]).items()
        }
        sizes = part[0].result.get("sizes") or {}
        width = Cell(" ".join(f"{n} → {m}" for n, m in sizes.values()), float(sum(n for n, _ in sizes.values())))
        row = [Cell(network)] if len(names) > 1 else []
        row += [Cell(group), width if len(sizes) == 1 else Cell(f"{len(sizes)} groups" if sizes else "", width.value)]
        row += [Cell(f"{100 * keep:g} %", 100 * keep), Cell(by)]
        row += [_format_spread(values[m]) if m in values else Cell("") for m in columns]
        if gain:
            both = values.get(FUSED), values.get(PRUNED)
            row.append(_format_points(statistics.fmean(both[0]) - statistics.fmean(both[1])) if all(both) else Cell(""))  # type: ignore[arg-type]
        rows.append(tuple(row))
    start = (["network"] if len(names) > 1 else []) + ["group", "channels", "keep", "criterion"]
    header = (*start, *map(method_label, columns), *(["gain"] if gain else []))
    text = {header.index("group"), header.index("criterion")} | ({0} if len(names) > 1 else set())
    return Table("Accuracy", header, tuple(rows), frozenset(range(len(header))) - text)


def drifts(records: Iterable[Measured]) -> Table | None:
    """Mean distance of the outputs to the original's."""
    found = [r for r in latest_records(records) if "counts" in r.result]
    if not found:
        return None
    columns = list_methods(found)
    lines = group_by(found, lambda r: (r.setting["network"], r.setting["group"], r.setting["keep"], criterion_label(r)))
    several = len({network for network, *_ in lines}) > 1
    rows = []
    for (network, group, keep, by), part in lines.items():
        means = {r.setting["method"]: r.result["mean"] for r in part}
        row = [Cell(network)] if several else []
        row += [Cell(group), Cell(f"{100 * keep:g} %", 100 * keep), Cell(by)]
        rows.append((*row, *(Cell(f"{means[m]:.3g}", means[m]) if m in means else Cell("") for m in columns)))
    start = (*(["network"] if several else []), "group", "keep", "criterion")
    header = (*start, *map(method_label, columns))
    numeric = {len(start) - 2, *range(len(start), len(header))}
    return Table("Mean distance of the outputs", header, tuple(rows), frozenset(numeric))


def stages(records: Iterable[Measured]) -> Table | None:
    """Accuracy after reducing and after fine-tuning."""
    found = [r for r in latest_records(records) if "stages" in r.result]
    if not found:
        return None
    rows = [
        (
            Cell(r.setting["network"]),
            Cell(method_label(r.setting["method"])),
            Cell(f"{100 * r.setting['keep']:g} %", 100 * r.setting["keep"]),
            format_percent(r.result["stages"][0]["accuracy"]),
            format_percent(r.result["accuracy_reduced"]),
            format_percent(r.result["accuracy"]),
            Cell(f"{r.setting['seed']}", r.setting["seed"]),
        )
        for r in found
    ]
    header = ("network", "method", "keep", "original", "reduced", "fine-tuned", "seed")
    return Table("Before and after fine-tuning", header, tuple(rows), frozenset({2, 3, 4, 5, 6}))


def significance(records: Iterable[Measured]) -> Table | None:
    """Kruskal-Wallis test per group and keep: do the choices of marginals differ over the networks?"""
    found = [
        r
        for r in reduction_records(latest_records(records))
        if r.experiment == "marginals" and r.setting["method"] != ORIGINAL
    ]
    if not found:
        return None
    columns = list_methods(found)
    rows = []
    for (group, keep), part in group_by(found, lambda r: (r.setting["group"], r.setting["keep"])).items():
        samples = group_by(part, lambda r: r.setting["method"])
        values = {m: [r.result["accuracy"] for r in own] for m, own in samples.items()}
        row = [Cell(group), Cell(f"{100 * keep:g} %", 100 * keep)]
        row += [_format_spread(values[m]) if m in values else Cell("") for m in columns]
        h, p = kruskal_wallis(list(values.values())) if len(values) > 1 else (float("nan"), float("nan"))
        rows.append((*row, Cell(f"{h:.2f}", h), Cell(f"{p:.3f}", p)))
    header = ("group", "keep", *map(marginal_label, columns), "H", "p")
    return Table("Kruskal-Wallis over networks", header, tuple(rows), frozenset(range(1, len(header))))


def marginal_label(method: str) -> str:
    """ "source uniform" out of "intrafusion:source_marginal=uniform"."""
    options = method.partition(":")[2]
    return options.replace("_marginal=", " ").replace(",", ", ") or method_label(method)


def tables(records: Sequence[Measured]) -> list[Table]:
    """Everything that can be said of these records."""
    found = (comparison(accuracy_records(records)), significance(records), stages(records), drifts(records))
    return [table for table in found if table is not None]
