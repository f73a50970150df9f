"""The same fraction for every group, or a fraction by name pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from intrafusion.errors import BudgetError, unknown_name
from intrafusion.graph import ChannelGraph, ChannelGroup


def uniform_sizes(
    groups: Iterable[ChannelGroup],
    keep: float | Mapping[str, float],
    graph: ChannelGraph,
    *,
    round_to: int | None = None,
) -> dict[str, int]:
    """Number of channels m that each of these groups keeps.

    m = floor(n * keep), at least 1; with `round_to`, the nearest multiple of it, never below one multiple and never
    above n. Groups that no pattern matches keep all channels. Twins keep the same number: the largest of theirs.

    Args:
        groups: the groups to reduce.
        keep: one fraction, or {pattern: fraction}; a pattern is matched against a group's name and against the names
            of all layers that produce it, and the first that matches counts.
        graph: for the names that a pattern may mean.
    Raises:
        BudgetError: a fraction outside (0, 1], a pattern that matches no group, round_to < 1.
    """
    if round_to is not None and (type(round_to) is not int or round_to < 1):
        raise BudgetError(f"round_to: expected a whole number >= 1, got {round_to!r}.")
    patterns = dict(keep) if isinstance(keep, Mapping) else {"*": keep}
    for pattern, fraction in patterns.items():
        check_fraction(fraction, "keep" if not isinstance(keep, Mapping) else f"keep[{pattern!r}]")
    if isinstance(keep, Mapping):
        check_patterns(patterns, graph)
    groups = list(groups)
    wanted = {g.name: round_size(g.size, fraction_for(g, patterns), round_to) for g in groups}
    largest: dict[int, int] = {}
    for group in groups:
        largest[group.family] = max(largest.get(group.family, 1), wanted[group.name])
    return {g.name: largest[g.family] for g in groups}


def check_fraction(fraction: float, where: str) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise BudgetError(f"{where}: expected a fraction in (0, 1], got {fraction!r}; 0.7 keeps 70 % of the channels.")


def check_patterns(patterns: Mapping[str, float], graph: ChannelGraph) -> None:
    names = sorted({name for g in graph.groups for name in layer_names(g)})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BudgetError(f"keep: {unknown_name('group', pattern, names)}")


def layer_names(group: ChannelGroup) -> tuple[str, ...]:
    return (group.name, *group.producers)


def fraction_for(group: ChannelGroup, patterns: Mapping[str, float]) -> float:
    for pattern, fraction in patterns.items():
        if any(fnmatchcase(name, pattern) for name in layer_names(group)):
            return float(fraction)
    return 1.0


def round_size(n: int, keep: float, round_to: int | None) -> int:
    if keep == 1:
        return n
    if round_to is None:
        return max(1, math.floor(n * keep + 1e-9))
    return min(n, max(round_to, round_to * math.floor(n * keep / round_to + 0.5)))
