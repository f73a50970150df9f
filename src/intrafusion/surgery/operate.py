"""Surgery on a copy of the network, run and traced again; what it does not bear out is left alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph, ChannelGroup, Role, families_of
from intrafusion.network.double import TOLERANCE, output_difference
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.blame import counted_calls, explain_crash
from intrafusion.surgery.expect import find_confusion, find_missing, find_siblings, shrink_graph
from intrafusion.surgery.forecast import Forecast
from intrafusion.surgery.literals import Breakdown, Literals
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.memory import recall
from intrafusion.surgery.numbers import explain_state
from intrafusion.surgery.regrouping import Regrouping, View, list_views
from intrafusion.surgery.scopes import find_scope
from intrafusion.surgery.search import Failure, find_largest_passing, leave_out_suspects, take_back, take_back_by_kind
from intrafusion.surgery.ties import explain_shared_width, offer_blocks
from intrafusion.surgery.write import Repair, make_repairs_, write_weights_
from intrafusion.trace.run import trace_private

_ROUNDING = 2.0**-52  # of float64


_ROUNDINGS = 100  # that add up


CEILING = 1e-3  # a larger difference is none of rounding


_END = 1 << 40  # more than any network has operations
_REGROUPED = 4  # reasons to which a number in the code is looked for that may be behind them
_RUNS, _DIFFERS, _UNPROVED = ((k * _END, k * _END) for k in (1, 2, 3))  # how far an attempt came that failed


Maps = dict[str, ReductionMap]


RepairsOf = Callable[[Maps], tuple[Repair, ...] | None]
"""Numbers in attributes that must follow in the network that these maps make; None: there are none that make it run."""


def tolerance_of(
    double: nn.Module,
    outputs: Callable[[nn.Module], list[Tensor]],
    expected: list[Tensor],
    least: float = TOLERANCE,
) -> float:
    """How far two float64 computations of one output may differ: `least`, or more.

    A network that amplifies rounding shows it in what a change of every weight by about one rounding does; sums are
    rounded many times.
    """
    weights = {n: p.detach() for n, p in double.named_parameters() if p.dtype == torch.float64}
    generator = torch.Generator().manual_seed(0)
    noise = lambda w: (2 * torch.rand(w.shape, generator=generator, dtype=torch.float64) - 1).to(w.device)  # noqa: E731
    write_weights_(double, {n: w * (1 + _ROUNDING * noise(w)) for n, w in weights.items()})
    changed = output_difference(outputs(double), expected)
    write_weights_(double, weights)
    return min(max(least, _ROUNDINGS * changed), CEILING)


def copy_reduced(
    model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap], literals: Literals | None = None
) -> nn.Module:
    """A copy after the maps, as it comes: not traced, and run only where numbers in attributes may have to follow.

    Args:
        literals: which had to follow in other smaller networks of this one, see `Surgery`.
    """
    small = copy_model(model)
    write_weights_(small, reduce_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps))
    if literals is not None:
        literals.fit_(small, {name: len(reduction.merge) for name, reduction in maps.items()})
    return small


@dataclass(frozen=True, eq=False)
class Surgery:
    """The smaller network, what had to follow, and the groups that had to be left alone with the reason.

    maps: as they were carried out, for every group that is reduced.
    literals: which numbers in attributes had to follow, for the next network.
    numbers: those of the repairs that are such numbers.
    unproved: which of the groups that were rolled back made a network that runs, and is wrong.
    """

    model: nn.Module
    repairs: tuple[Repair, ...]
    rolled_back: dict[str, str]
    maps: Maps
    literals: Literals
    numbers: tuple[Repair, ...] = ()
    unproved: frozenset[str] = frozenset()

    __repr__ = show_briefly


class Prove(Protocol):
    """A further check of the smaller network, on which groups may be left alone too; see `proof.FunctionCheck`.

    revision: how often it has found that the maps of a group must be scaled.
    """

    revision: int

    def settled(self, maps: Maps) -> Maps:
        """The same maps, scaled as was found so far."""
        ...

    def __call__(self, maps: Maps, found: ChannelGraph, repairs_of: RepairsOf = ...) -> str | None:
        """Why the network that these maps make, in which `found` was traced, is wrong; None if it is right.

        Args:
            repairs_of: numbers in attributes that must follow in the network that some of these maps make.
        """
        ...


def operate(model: nn.Module, graph: ChannelGraph, maps: Maps, inputs: Inputs, prove: Prove | None = None) -> Surgery:
    """Reduce a copy of the network; groups after which it does not run, or shows other groups, are rolled back.

    What did not run at the same sizes before is not tried again, see `memory`. Numbers in attributes that are sizes
    follow where the network does not bear it out without, see `literals`.

    Args:
        prove: what must hold of it besides.
    """
    attempts, findings = _Attempts(model, graph, maps, inputs, prove), recall(graph)
    groups = [g for g in graph.groups if g.name in maps]
    sizes = attempts.sizes_of(groups)
    known = findings.find_left_alone(sizes, inputs)
    passed, stopped, unproved = _search(attempts, [g for g in groups if g.name not in known])
    findings.guilty |= stopped.keys() | unproved.keys()
    known = findings.keep(sizes, inputs, {**known, **stopped})
    why = {**known, **unproved}
    regrouped = _find_regrouping(attempts, passed, why)
    small, repairs = attempts.find_made(passed)
    shared = {n: explain_shared_width(graph[n], graph, model) for n in known}
    offers = {} if any(not g.is_channel for g in groups) else {n: offer_blocks(graph[n], graph) for n in why}
    rolled_back = {
        g.name: shared.get(g.name, "") + why[g.name] + regrouped.get(g.name, "") + offers.get(g.name, "")
        for g in groups
        if g.name in why
    }
    numbers = attempts.numbers.get(_names_of(passed), ())
    return Surgery(
        *(small, repairs, rolled_back, attempts.settle(passed), attempts.literals, numbers), frozenset(unproved)
    )


def _find_regrouping(attempts: _Attempts, passed: Sequence[ChannelGroup], why: Mapping[str, str]) -> dict[str, str]:
    """What is to be added to the reasons of groups that went wrong as a number in the code regroups their channels."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, reason in why.items():
        alike[re.sub(r"^like \S+: ", "", reason)].append(name)
    found = dict[str, str]()
    for names in islice(alike.values(), _REGROUPED):
        told = attempts.explain_regrouping([*passed, *(attempts.graph[name] for name in names)])
        found |= dict.fromkeys(names, f"; {told}" if told else "")
    return found


def _search(
    attempts: _Attempts, groups: list[ChannelGroup]
) -> tuple[list[ChannelGroup], dict[str, str], dict[str, str]]:
    """Groups that pass together, why others do not run or show other groups, and why others are wrong."""
    stopped, unproved, failure = {}, {}, attempts.check(groups)
    if failure is not None and failure.place < _UNPROVED:
        groups, stopped = _leave_out(attempts, groups, failure, attempts.show)
        failure = attempts.check(groups)
    if failure is not None:
        groups, unproved = _leave_out(attempts, groups, failure, attempts.check)
    return groups, stopped, unproved


def _leave_out(
    attempts: _Attempts,
    groups: list[ChannelGroup],
    found: Failure,
    failure: Callable[[Sequence[ChannelGroup]], Failure | None],
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Groups of these that pass together, and why each of the others does not.

    Suspects are left out first, and tried again where they may have been innocent; what is wrong beyond that is halved.
    """
    found = found if found.together else failure(groups) or found
    passed, out, last = leave_out_suspects(groups, found, failure, recall(attempts.graph).guilty)
    failed = [(g, o.failure) for o in out if o.sure for g in o.family]
    if last is not None:
        passed, more = find_largest_passing(families_of(passed), failure, _liken, coupled=True)
        failed += more
    if doubtful := [o.family for o in out if not o.sure]:
        take = take_back_by_kind if found.together else take_back
        passed, more = take(doubtful, passed, failure, _liken)
        failed += more
    return passed, {g.name: f.why for g, f in failed}


def _liken(group: ChannelGroup, failure: Failure) -> Failure:
    return replace(failure, why=f"like {group.name}: {failure.why}")


@dataclass(eq=False)
class _Attempts:
    """Smaller networks in which some of the groups are reduced, and how they fail.

    Attributes:
        numbers: in attributes that had to follow, by the names of the groups that were reduced.
        parts: the same where only some of these are, to be compared; None where there are none that make it run.
        made: the last network, and what followed in it.
        traced: what that network showed.
    """

    model: nn.Module
    graph: ChannelGraph
    maps: Maps
    inputs: Inputs
    prove: Prove | None
    numbers: dict[frozenset[str], tuple[Repair, ...]] = field(default_factory=dict)
    parts: dict[frozenset[str], tuple[Repair, ...] | None] = field(default_factory=dict)
    made: dict[frozenset[str], tuple[nn.Module, tuple[Repair, ...]]] = field(default_factory=dict)
    traced: dict[object, ChannelGraph | Breakdown] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.literals = Literals(self.model, self.graph, self.inputs)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in named_tensors(self.model).items()}

    @cached_property
    def forecast(self) -> Forecast | None:
        try:
            return Forecast(self.model, self.graph, self.inputs)
        except Exception:  # it only saves time
            return None

    @cached_property
    def views(self) -> Sequence[View]:
        return list_views(self.model, self.inputs)

    def sizes_of(self, groups: Sequence[ChannelGroup]) -> dict[str, int]:
        return {g.name: len(self.maps[g.name].merge) for g in groups}

    def settle(self, groups: Sequence[ChannelGroup]) -> Maps:
        """The maps of these groups, with the scales that were found so far."""
        chosen = {g.name: self.maps[g.name] for g in groups}
        return chosen if self.prove is None else self.prove.settled(chosen)

    def find_made(self, groups: Sequence[ChannelGroup]) -> tuple[nn.Module, tuple[Repair, ...]]:
        """The network in which these groups are reduced, and what followed; made anew if it was not the last one."""
        names = _names_of(groups)
        if names not in self.made:
            self.made.clear()  # first: one network at a time
            small, weights = copy_model(self.model), reduce_weights(self.weights, self.graph, self.settle(groups))
            repairs, numbers = write_weights_(small, weights), self.numbers.get(names, ())
            make_repairs_(small, numbers)
            self.made[names] = small, (*repairs, *numbers)
        return self.made[names]

    def show(self, groups: Sequence[ChannelGroup]) -> Failure | None:
        """How a network fails to run, which is seen at little cost, or to show its groups, when these are reduced."""
        if not groups:
            return None
        sizes = self.sizes_of(groups)
        trial = self.forecast.run(sizes) if self.forecast else None
        if trial is not None and trial.error is not None and not self.literals.holds_any_of(sizes):
            return Failure(self._explain(trial.error, {g.size for g in groups}), trial.place, trial.suspects)
        found = self._trace(groups)
        if not isinstance(found, Breakdown) or self._mend(groups, found, prove=None):
            return None
        suspects = trial.suspects if trial else ()
        if trial is not None and trial.error is not None:
            return Failure(found.why, trial.place, suspects)
        return Failure(found.why, _place_of(found), suspects)

    def explain_regrouping(self, groups: Sequence[ChannelGroup]) -> str:
        """Which number in the code keeps the network of these groups from showing them, in words; "" if none does."""
        if not self.views:
            return ""
        small = self.find_made(groups)[0]
        for mode, told in Regrouping(self.views, list_views(small, self.inputs)).ways_to_mend():
            with mode:
                if not isinstance(self._look(groups, small), Breakdown):
                    return told
        return ""

    def check(self, groups: Sequence[ChannelGroup]) -> Failure | None:
        """How a network fails to run, to show its groups, or to be right, when these are reduced."""
        found = self._trace(groups) if groups else None
        if isinstance(found, Breakdown):
            if not self._mend(groups, found, self.prove):
                return Failure(found.why, _place_of(found))
            found = self._trace(groups)
        if not isinstance(found, ChannelGraph) or self.prove is None:
            return None
        why = self._prove(self.prove, groups, found, self.numbers.get(_names_of(groups), ()))
        return None if why is None else self._suspect(groups, why)

    def _suspect(self, groups: Sequence[ChannelGroup], why: str) -> Failure:
        """A failure of the proof, and which groups are likely behind it."""
        guilty = recall(self.graph).guilty
        suspects = [g.name for g in groups if g.name in guilty or _is_read_derived(g, self.graph)]
        return Failure(why, _UNPROVED, (tuple(suspects),) if suspects else (), together=True)

    def _trace(self, groups: Sequence[ChannelGroup]) -> ChannelGraph | Breakdown:
        """The groups that the smaller network shows; of the last one that was tried they are remembered."""
        names = _names_of(groups)
        key = names, self.prove.revision if self.prove else 0, names in self.numbers
        if key not in self.traced:
            self.traced.clear()
            self.traced[key] = self._look(groups, self.find_made(groups)[0])
        return self.traced[key]

    def _look(self, groups: Sequence[ChannelGroup], small: nn.Module) -> ChannelGraph | Breakdown:
        """The groups that a network shows in which these are reduced, or what is wrong with it."""
        sizes = self.sizes_of(groups)
        with counted_calls() as called:
            try:
                found = trace_private(small, self.inputs, calls=self.graph.calls, ways=self.graph.ways)
            except Exception as error:  # anything that goes wrong is a reason to leave these groups alone
                why = self._explain(error, self.literals.find_old_sizes(small, sizes))
                return Breakdown.of(why, error, small, len(called))
        expected = shrink_graph(self.graph, sizes)
        missing = find_missing(expected, found)
        if missing is not None:
            why = f"the smaller network no longer shows {missing.name!r} as a group of {missing.size} channels"
            return Breakdown(why, runs=True, around=find_scope(m.module for m in missing.members))
        why = find_confusion(expected, found, find_siblings(self.graph, sizes))
        return found if why is None else Breakdown(why, runs=True)

    def _explain(self, error: Exception, old: set[int]) -> str:
        why = explain_crash(error, old) + explain_state(self.model, old)
        return f"the smaller network does not run ({why})"

    def _mend(self, groups: Sequence[ChannelGroup], found: Breakdown, prove: Prove | None) -> bool:
        """Whether numbers in attributes make the network of these groups right; they are kept."""
        names = _names_of(groups)
        if names in self.numbers:  # it is wrong with them
            return False

        def check(small: nn.Module, numbers: tuple[Repair, ...]) -> Breakdown | None:
            shown = self._look(groups, small)
            if isinstance(shown, Breakdown) or prove is None:
                return shown if isinstance(shown, Breakdown) else None
            why = self._prove(prove, groups, shown, numbers)
            return None if why is None else Breakdown(why, final=True, runs=True)

        mended = self.literals.search(self.find_made(groups)[0], self.sizes_of(groups), found, check)
        if mended is None:
            return False
        self.numbers[names] = self.literals.repairs(mended)
        self.made.clear()  # it was written without them
        return True

    def _prove(
        self, prove: Prove, groups: Sequence[ChannelGroup], found: ChannelGraph, numbers: tuple[Repair, ...]
    ) -> str | None:
        revision, chosen = prove.revision, self.settle(groups)
        why = prove(chosen, found, lambda maps: self._repairs_of(maps, frozenset(chosen), numbers))
        if prove.revision > revision:
            self.made.clear()  # it was written without the scale that was found
        return why

    def _repairs_of(self, maps: Maps, names: frozenset[str], numbers: tuple[Repair, ...]) -> tuple[Repair, ...] | None:
        """The numbers that must follow where only these maps are carried out, of those that do where all are."""
        part = frozenset(maps)
        if part == names or not numbers:
            return numbers
        if part not in self.parts:
            small = copy_reduced(self.model, self.graph, maps)
            whole = {(r.module, r.attribute): int(r.new) for r in numbers if not isinstance(r.new, tuple)}
            found = self.literals.search_part(small, {n: len(m.merge) for n, m in maps.items()}, whole)
            self.parts[part] = None if found is None else self.literals.repairs(found)
        return self.parts[part]


def _names_of(groups: Sequence[ChannelGroup]) -> frozenset[str]:
    return frozenset(g.name for g in groups)


def _place_of(found: Breakdown) -> tuple[int, int]:
    """How far a network came that does not run, or runs and shows other groups."""
    return _DIFFERS if found.runs else _RUNS


def _is_read_derived(group: ChannelGroup, graph: ChannelGraph) -> bool:
    """Whether a layer that reads the group uses its weight only after an operation on it."""
    return any(m.tensor in graph.derived for m in group.with_role(Role.CONSUMES))
