"""The largest set of groups that pass a check together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from intrafusion.graph import ChannelGroup

_ENOUGH = 2  # failures of one kind after which the others are not tried one by one


FamilyKind = tuple[tuple[str, int], ...]


F = TypeVar("F")


def find_largest_passing(
    families: list[list[ChannelGroup]],
    failure: Callable[[list[ChannelGroup]], F | None],
    likewise: Callable[[ChannelGroup, F], F] | None = None,
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, F]]]:
    """A maximal set of families that pass together, and each of the others with its failure; found by halving.

    Args:
        failure: of some groups together; None if they pass.
        likewise: the failure of a group that is like another (`kind_of`) with that failure. With it, families of a kind
            that failed `_ENOUGH` times and never passed are not tried one by one any more, but once all together.
    """
    passed: list[ChannelGroup] = []
    failed: list[tuple[ChannelGroup, F]] = []
    good: set[FamilyKind] = set()
    bad: dict[FamilyKind, list[tuple[ChannelGroup, F]]] = defaultdict(
        list
    )  # one group of each family that failed alone
    put_off: dict[FamilyKind, list[ChannelGroup]] = defaultdict(list)

    def hopeless(family: list[ChannelGroup]) -> bool:
        kind = family_kind(family)
        return likewise is not None and kind not in good and len(bad[kind]) >= _ENOUGH

    def add(part: list[list[ChannelGroup]]) -> None:
        for family in filter(hopeless, part):
            put_off[family_kind(family)] += family
        part = [family for family in part if not hopeless(family)]
        groups = [g for family in part for g in family]
        why = failure(passed + groups) if groups else None
        if why is None:
            passed.extend(groups)
            good.update(family_kind(family) for family in part)
        elif len(part) == 1:
            failed.extend((g, why) for g in groups)
            bad[family_kind(part[0])].append((groups[0], why))
        else:
            add(part[: len(part) // 2])
            add(part[len(part) // 2 :])

    if families:
        add(families)
    for kind, groups in put_off.items():
        if failure(passed + groups) is None:
            passed.extend(groups)
        else:
            assert likewise is not None
            failed.extend((g, likewise(*bad[kind][0])) for g in groups)
    return passed, failed


def family_kind(family: list[ChannelGroup]) -> FamilyKind:
    """Names but for their numbers, and sizes: the same for what repeats from block to block."""
    return tuple((re.sub(r"\d+", "#", g.name), g.size) for g in family)
