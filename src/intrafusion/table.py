"""Plain-text tables of a plan: group, n -> m, members, and the reason where a group was left alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from intrafusion.measure.size import Size
from intrafusion.plan import Decision, Plan

HEADER = ("group", "channels", "how", "members or reason")
_WIDTH = 64


def table_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """One row per group; twins, such as the groups of one convolution, share a row."""
    families: dict[tuple[int, bool, str | None], list[Decision]] = {}
    for decision in plan.decisions:
        families.setdefault((decision.family, decision.reduced, decision.reason), []).append(decision)
    return [_table_row(twins) for twins in families.values()]


def _table_row(twins: Sequence[Decision]) -> tuple[str, str, str, str]:
    first = twins[0]
    count = f"{len(twins)} x " if len(twins) > 1 else ""
    name = first.group if len(twins) == 1 else f"{first.group} .. {twins[-1].group}"
    size = f"{count}{first.n} -> {first.m}" if first.reduced else f"{count}{first.n}"
    last = shown_layers(first) if first.reduced else first.reason or "all kept"
    return name, size, first.mixing if first.reduced else "kept", last


def shown_layers(decision: Decision, shown: int = 3) -> str:
    """The first layers that a group runs through, and how many there are."""
    names = [m.partition("[")[0] for m in decision.members]
    modules = list(dict.fromkeys(n.rpartition(".")[0] or n for n in names))
    more = f" and {len(modules) - shown} more" if len(modules) > shown else ""
    return ", ".join(modules[:shown]) + more


def size_change(label: str, before: int, after: int) -> str:
    return f"{label} {before:,} -> {after:,} ({after / before:.1%})" if before else f"{label} {before:,}"


def plan_text(plan: Plan, before: Size | None = None, after: Size | None = None) -> str:
    """The whole table, with parameters and MACs if they are given."""
    lines = _align_columns([HEADER, *table_rows(plan)])
    if before and after:
        lines += [
            "",
            f"{size_change('parameters', before.params, after.params)}; {size_change('MACs', before.macs, after.macs)}",
        ]
    lines += [f"in no group, {line}" for line in plan.fixed]
    lines += [f"note: {w}" for w in (*plan.warnings, *_list_proofs(plan))]
    return "\n".join(lines)


def _list_proofs(plan: Plan) -> list[str]:
    """What is not proved of the function of reduced groups."""
    names = [d.group for d in plan.decisions if d.reduced and d.proof == "symmetry"]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(names)} groups are proved by symmetry only, as something looks at all their channels: {shown}"]


def _align_columns(table: Iterable[Sequence[str]]) -> list[str]:
    """Left-aligned columns, the last one cut to a readable width."""
    table = [[*r[:-1], r[-1] if len(r[-1]) <= _WIDTH else r[-1][: _WIDTH - 3] + "..."] for r in table]
    widths = [max(len(r[c]) for r in table) for c in range(len(table[0]) - 1)]
    lines = ["  ".join([*(v.ljust(w) for v, w in zip(r, widths, strict=False)), r[-1]]).rstrip() for r in table]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
