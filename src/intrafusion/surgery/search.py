"""The largest set of groups that pass a check together."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGroup, families_of

_FEW = 4  # families left out up to which each is tried as the only one
_TRIES = 8  # of families together that failed alone
_SINGLES = 6  # suspects of one failure that are left out one by one
_ENOUGH = 2  # failures of one kind after which the others are not tried one by one


FamilyKind = tuple[tuple[str, int], ...]
_Families = list[list[ChannelGroup]]


F = TypeVar("F")


def find_largest_passing(
    families: list[list[ChannelGroup]],
    failure: Callable[[list[ChannelGroup]], F | None],
    likewise: Callable[[ChannelGroup, F], F] | None = None,
    *,
    coupled: bool = False,
    base: Sequence[ChannelGroup] = (),
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, F]]]:
    """A maximal set of families that pass together, and each of the others with its failure; found by halving.

    Args:
        failure: of some groups together; None if they pass.
        likewise: the failure of a group that is like another (`kind_of`) with that failure. With it, families of a kind
            that failed `_ENOUGH` times and never passed are not tried one by one any more, but once all together.
        coupled: families may pass only together, as the halves of a chunk do: those that failed are tried again with
            others that share a tensor with them, and all but one.
        base: groups that pass together, and with which these are to.
    """
    passed = list(base)
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
    if coupled:
        joined = _join_coupled(passed, families_of(g for g, _ in failed), lambda groups: failure(groups) is None)
        passed += joined
        failed = [(g, why) for g, why in failed if g not in joined]
    return passed, failed


def _join_coupled(
    passed: list[ChannelGroup], left: list[list[ChannelGroup]], passes: Callable[[list[ChannelGroup]], bool]
) -> list[ChannelGroup]:
    """Groups of those left out that pass together although none of them passes alone."""
    joined: list[ChannelGroup] = []
    tried: set[frozenset[str]] = set()
    while True:
        fresh = [c for c in _list_candidates(left) if frozenset(g.name for g in c) not in tried]
        if not fresh or len(tried) >= _TRIES:
            return joined
        tried.add(frozenset(g.name for g in fresh[0]))
        if passes([*passed, *joined, *fresh[0]]):
            joined += fresh[0]
            left = [family for family in left if family[0] not in joined]


def _list_candidates(left: _Families) -> list[list[ChannelGroup]]:
    """What may pass together, the likeliest first: all in a chain, all but one, if few, and two that share a tensor."""
    pairs = _find_pairs(left)
    chosen = _chain(_find_pairs(left, along=True))
    chosen += [set(range(len(left))) - {one} for one in range(len(left))] if 2 < len(left) <= _FEW else []
    chosen += [{a, b} for a, b in pairs]
    chosen += _chain(pairs)
    return [[g for k in sorted(some) for g in left[k]] for some in chosen]


def _find_pairs(families: _Families, *, along: bool = False) -> list[tuple[int, int]]:
    """Families, by number, that share a tensor (`along`: and run along the same dimension of it)."""
    seen = [{m.key()[:2] if along else m.tensor for g in family for m in g.members} for family in families]
    return [(a, b) for b in range(len(families)) for a in range(b) if seen[a] & seen[b]]


def _chain(pairs: list[tuple[int, int]]) -> list[set[int]]:
    """Everything that hangs together by pairs."""
    chains: list[set[int]] = []
    for pair in pairs:
        touching = [c for c in chains if c & set(pair)]
        chains = [c for c in chains if c not in touching] + [set(pair).union(*touching)]
    return chains


def family_kind(family: list[ChannelGroup]) -> FamilyKind:
    """Names but for their numbers, and sizes: the same for what repeats from block to block."""
    return tuple((re.sub(r"\d+", "#", g.name), g.size) for g in family)


# ---- from the side of what must be left out --------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Why some groups fail together.

    Attributes:
        place: how far they came: numbers that all become larger where they come further.
        suspects: names of groups that are likely at fault, the likeliest first, from several places; also such as are
            not among those that fail, but are seen at the same place.
        together: all suspects of a place are rather at fault than one.
    """

    why: str
    place: tuple[int, ...] = ()
    suspects: tuple[tuple[str, ...], ...] = ()
    together: bool = False

    __repr__ = show_briefly


@dataclass(frozen=True)
class LeftOut:
    """A family that was left out, and after which failure.

    sure: nothing else was left out that this may have depended on.
    """

    family: list[ChannelGroup]
    failure: Failure
    sure: bool

    __repr__ = show_briefly


def leave_out_suspects(
    groups: Sequence[ChannelGroup],
    found: Failure,
    failure: Callable[[list[ChannelGroup]], Failure | None],
    guilty: set[str],
) -> tuple[list[ChannelGroup], list[LeftOut], Failure | None]:
    """Leave out families that a failure suspects, as long as that leads further.

    Of a kind that was at fault `_ENOUGH` times, all are left out once another is suspected.

    Args:
        found: how all of the groups fail.
        guilty: names of groups that were at fault before; suspected first. Those found now are added.
    Returns:
        the groups that are left, what was left out, and how those that are left still fail (None: they pass).
    """
    rest, out, last = families_of(groups), list[LeftOut](), found
    counts: Counter[FamilyKind] = Counter()
    while last is not None:
        step = _take_step(rest, last, failure, _list_suspected(rest, last, guilty, counts))
        if step is None:
            break
        taken, then, sure = step
        out += [LeftOut(family, last, sure=sure and len(taken) == 1) for family in taken]
        guilty |= {g.name for family in taken for g in family}
        counts.update(family_kind(family) for family in taken)
        rest, last = [family for family in rest if family not in taken], then
    return [g for family in rest for g in family], _doubt(out), last


def _take_step(
    rest: _Families,
    last: Failure,
    failure: Callable[[list[ChannelGroup]], Failure | None],
    candidates: Iterator[_Families],
) -> tuple[_Families, Failure | None, bool] | None:
    """The first candidate without which the others come further in every respect (sure), or at least in the last."""
    weak = None
    for taken in candidates:
        then = failure([g for family in rest if family not in taken for g in family])
        if then is None or all(a > b for a, b in zip(then.place, last.place, strict=True)):
            return taken, then, True
        if weak is None and then.place[-1] > last.place[-1]:
            weak = taken, then, False
    return weak


def _list_suspected(
    rest: _Families, found: Failure, guilty: set[str], counts: Counter[FamilyKind]
) -> Iterator[_Families]:
    """What to leave out, the likeliest first: all of a kind that failed often, one suspect, all that one place sees."""
    seen = [[f for f in rest if any(g.name in names for g in f)] for names in found.suspects]
    often = [f for f in rest if counts[family_kind(f)] >= _ENOUGH]
    if any(family in often for families in seen for family in families):
        yield often
    known = [[f for f in families if any(g.name in guilty for g in f)] for families in seen]
    yield from (families for families in known if len(families) > 1)
    singles = itertools.chain(*known, *itertools.zip_longest(*seen))
    if not found.together:
        yield from ([f] for f in itertools.islice(_distinct(singles), _SINGLES))
    for families in seen:
        if len(families) > 1 or found.together:
            yield families
    if len(seen) > 1:
        yield [f for f in rest if any(f in families for families in seen)]


def _distinct(families: Iterable[list[ChannelGroup] | None]) -> Iterator[list[ChannelGroup]]:
    done: set[str] = set()
    for family in families:
        if family is not None and family[0].name not in done:
            done.add(family[0].name)
            yield family


def _doubt(out: list[LeftOut]) -> list[LeftOut]:
    """A family that failed where others are seen that were left out too may do with them, or without them."""
    names = [{g.name for g in o.family} for o in out]
    others = [set().union(*names[:k], *names[k + 1 :]) for k in range(len(out))]
    seen = [{n for suspects in o.failure.suspects for n in suspects} for o in out]
    return [replace(o, sure=o.sure and not (s & n)) for o, s, n in zip(out, seen, others, strict=True)]


def take_back(
    left: _Families,
    passed: list[ChannelGroup],
    failure: Callable[[list[ChannelGroup]], F | None],
    likewise: Callable[[ChannelGroup, F], F],
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, F]]]:
    """Families that were left out and pass with the others all the same: first what hangs together, then by halving."""
    chains = [[left[k] for k in sorted(chain)] for chain in _chain(_find_pairs(left, along=True))]
    for chain in chains if len(chains) > 1 else ():
        if failure([*passed, *(g for family in chain for g in family)]) is None:
            passed = [*passed, *(g for family in chain for g in family)]
            left = [family for family in left if family not in chain]
    return find_largest_passing(left, failure, likewise, coupled=True, base=passed)


def take_back_by_kind(
    left: _Families,
    passed: list[ChannelGroup],
    failure: Callable[[list[ChannelGroup]], F | None],
    likewise: Callable[[ChannelGroup, F], F],
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, F]]]:
    """As `take_back`, where a try costs much: `_ENOUGH` of a kind one by one; if none passes, the others at once."""
    kinds: dict[FamilyKind, _Families] = defaultdict(list)
    failed: list[tuple[ChannelGroup, F]] = []
    for family in left:
        kinds[family_kind(family)].append(family)
    for families in kinds.values():
        bad: list[tuple[ChannelGroup, F]] = []
        for family in families[:_ENOUGH]:
            passed, more = find_largest_passing([family], failure, base=passed)
            bad += more
        rest = families[_ENOUGH:]
        groups = [g for family in rest for g in family]
        if len({g.family for g, _ in bad}) < _ENOUGH:
            passed, more = find_largest_passing(rest, failure, likewise, base=passed)
            bad += more
        elif groups and failure([*passed, *groups]) is None:
            passed = [*passed, *groups]
        else:
            bad += [(g, likewise(*bad[0])) for g in groups]
        failed += bad
    return passed, failed
