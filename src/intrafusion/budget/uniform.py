"""The same fraction for every group, or a fraction by name pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

from intrafusion.arguments import checked
from intrafusion.asked import MEASURES, check_count, check_keep, least_size
from intrafusion.errors import BudgetError, unknown_name
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of, size_twins


@partial(checked, leaving=("keep", "round_to", "min_channels"))
def uniform_sizes(
    groups: Iterable[ChannelGroup],
    keep: float | Mapping[str, float],
    graph: ChannelGraph,
    *,
    round_to: int | None = None,
    min_channels: int = 1,
) -> dict[str, int]:
    """Number of channels m that each of these groups keeps.

    m = floor(n * keep), at least 1; with `round_to`, the nearest multiple of it, never below one multiple and never
    above n. Groups that no pattern matches keep all channels. Twins keep the same number: the largest of theirs (a
    stream that is as wide as all heads together the same share as they: the largest that is a whole number in each).

    Args:
        groups: the groups to reduce.
        keep: one fraction, or {pattern: fraction}; a pattern is matched against a group's name and against the names
            of all layers that produce it, and the first that matches counts. Groups of whole blocks only go by patterns
            that end as their names do, as in ":blocks", and neither `round_to` nor `min_channels` is about them.
        graph: for the names that a pattern may mean.
        min_channels: smallest size of a group (of the whole group where it has fewer).
    Raises:
        BudgetError: a fraction outside (0, 1], a pattern that matches no group, round_to or min_channels < 1.
    """
    if round_to is not None:
        check_count(round_to, "round_to")
    check_count(min_channels, "min_channels")
    check_keep(keep)
    patterns = dict(keep) if isinstance(keep, Mapping) else {"*": keep}
    if isinstance(keep, Mapping):
        _check_patterns(patterns, graph)
    groups = list(groups)
    least = least_size(min_channels, round_to)
    wanted = {
        g.name: max(_round_size(g.size, _fraction_for(g, patterns), round_to), min(g.size, least))
        if g.is_channel
        else _round_size(g.size, _fraction_for(g, patterns), None)
        for g in groups
    }
    return {n: m for twins in families_of(groups) for n, m in _agree(twins, wanted, round_to or 1).items()}


def _agree(twins: Sequence[ChannelGroup], wanted: Mapping[str, int], step: int) -> dict[str, int]:
    """The largest of the sizes that twins want, all in step."""
    most = max(max(1, wanted[g.name] // g.multiple) for g in twins)
    whole = twins[0].size // twins[0].multiple
    uneven = most % step and most < whole and any(g.multiple > 1 for g in twins)  # else each was rounded by itself
    return size_twins(twins, min(whole, max(step, most - most % step)) if uneven else most)


def _check_patterns(patterns: Mapping[str, float], graph: ChannelGraph) -> None:
    names = sorted({name for g in graph.groups for name in _list_names(g)})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            meant = f" A target is said by name: target={dict(patterns)}." if {*patterns} <= {*MEASURES} else ""
            raise BudgetError(f"keep: {unknown_name('group', pattern, names)}{meant}")


def fit_patterns(
    keep: float | Mapping[str, float], graph: ChannelGraph, split: Iterable[str]
) -> float | Mapping[str, float]:
    """The same fractions by name for a network in which these layers are two, of which the second gives the channels.

    Args:
        graph: of that network.
    """
    if not isinstance(keep, Mapping):
        return keep
    names, found = {name for g in graph.groups for name in _list_names(g)}, dict[str, float]()
    for pattern, fraction in keep.items():
        halves = [f"{name}.expand" for name in split if fnmatchcase(name, pattern)]
        own = [pattern] if not halves or any(fnmatchcase(name, pattern) for name in names) else []
        for one in (*halves, *own):
            found.setdefault(one, fraction)
    return found


def _list_names(group: ChannelGroup) -> tuple[str, ...]:
    """What a group may be called by."""
    return (group.name, *group.producers) if group.is_channel else (group.name, group.name.partition("#")[0])


def find_pattern(group: ChannelGroup, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches a group's name, or a layer that produces it."""
    meant = (p for p in patterns if group.is_channel or _find_suffix(p) == _find_suffix(group.name))
    return next((p for p in meant if any(fnmatchcase(name, p) for name in _list_names(group))), None)


def _find_suffix(name: str) -> str:
    """What comes after the colon of a name such as "q:blocks#1"."""
    return name.partition("#")[0].rpartition(":")[2]


def _fraction_for(group: ChannelGroup, patterns: Mapping[str, float]) -> float:
    pattern = find_pattern(group, patterns)
    return 1.0 if pattern is None else float(patterns[pattern])


def _round_size(n: int, keep: float, round_to: int | None) -> int:
    if keep == 1:
        return n
    if round_to is None:
        return max(1, math.floor(n * keep + 1e-9))
    return min(n, max(round_to, round_to * math.floor(n * keep / round_to + 0.5)))
