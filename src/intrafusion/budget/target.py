"""Sizes for a budget of parameters, MACs or measured latency: predicted, tried on such a network, corrected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from intrafusion.asked import check_target, least_size
from intrafusion.budget.allocate import allocate
from intrafusion.budget.cost import Cost
from intrafusion.budget.missed import describe_amount, explain_miss
from intrafusion.budget.sensitivity import Sensitivity
from intrafusion.budget.uniform import uniform_sizes
from intrafusion.errors import BudgetError, ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of, size_twins
from intrafusion.measure.latency import latencies_ms, latency_ms
from intrafusion.measure.size import factors_of_products, macs_by_weight, params_of, size_of
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.plan import MISSED
from intrafusion.recipe import Recipe
from intrafusion.reduce.problem import ReductionMap
from intrafusion.reduce.select import selection_map
from intrafusion.surgery.literals import Literals
from intrafusion.surgery.operate import Surgery, copy_reduced, operate
from intrafusion.surgery.proof import FunctionCheck, Reference

_CLOSE_ENOUGH = 0.01  # trying stops this close to the target
_MISSED = 0.02  # further off than this is said
_EXACT = 1e-6  # a predicted cost that is off by less, as a fraction, is believed
_TRIALS = 8
_FEW = 12  # families of groups of which pairs are tried
_NUDGES = 16  # single channels that the last sizes are moved by
_ROUNDS = 3  # of leaving out groups that turn out not to shrink to their sizes
_REPEATS = 15  # of a forward pass that is timed; three times as many in the end
_AT_ONCE = 4  # networks that are timed in turn
_PERCENT = 100  # a count up to this that cannot be reached is taken for a slip

Sizes = dict[str, int]


def sizes_for_target(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    sensitivity: Sensitivity,
    recipe: Recipe,
    example_inputs: ExampleInputs | None,
) -> tuple[Sizes, tuple[str, ...]]:
    """Sizes with the least predicted error that meet the target of a recipe, or come as close as they can.

    Where the same share of every group, at the same cost, is measured to change the output less, that is taken. A
    latency is met by the largest network that was measured to meet it.

    Returns:
        sizes, and notes: where they miss the target by more than 2 %, where the cost could not be predicted, where the
        same share of every group was better.

    Raises:
        BudgetError: not exactly one target, an unknown one, one that is no positive number, a count meant to be
            a share, or a `round_to` that is none.
    """
    kind, wanted = check_target(recipe.target)
    inputs = require_inputs(example_inputs, recipe)
    whole = _METERS[kind](model, inputs)
    if whole <= 0:
        raise BudgetError(f"target: this network has no {kind} to save on these example inputs.")
    goal = wanted * whole if kind != "latency_ms" and wanted <= 1 else wanted
    if goal >= whole:
        asked, there = describe_amount(kind, goal), describe_amount(kind, whole)
        kept = f"target: up to {asked} were asked for; the network has {there} as it is, and stays so."
        return {}, (kept,) if goal > whole else ()
    reference = Reference(model, graph, inputs)
    groups, literals = _find_shrinkable(reference, groups)
    sensitivity = replace(sensitivity, literals=literals) if literals.learned else sensitivity
    curves = sensitivity.curves(groups)
    sizes, notes, refused = Sizes(), (), {}
    for _ in range(_ROUNDS):
        search = _Search(model, graph, groups, curves, recipe, inputs, kind, goal, whole, literals)
        sizes, notes = search.find(sensitivity)
        refused = _try_sizes(reference, sizes).rolled_back
        if not refused:
            return sizes, notes
        groups = [g for g in groups if g.name not in refused]
    stuck = f"{MISSED}groups do not shrink to the sizes that it takes: {', '.join(refused)}."
    return sizes, (*notes, stuck)


def require_inputs(example_inputs: ExampleInputs | None, recipe: Recipe) -> Inputs:
    if example_inputs is None:
        raise BudgetError(
            f"target: {check_target(recipe.target)[0]} is measured on example inputs; give decide(...) some."
        )
    return Inputs.of(example_inputs)


@dataclass(frozen=True, eq=False)
class _Search:
    """One search for the sizes of these groups that meet a goal.

    Attributes:
        kind: what is measured; goal and whole: what is wanted of it, and what the original has.
    """

    model: nn.Module
    graph: ChannelGraph
    groups: Sequence[ChannelGroup]
    curves: Mapping[str, Tensor]
    recipe: Recipe
    inputs: Inputs
    kind: str
    goal: float
    whole: float
    literals: Literals | None = None

    def find(self, sensitivity: Sensitivity) -> tuple[Sizes, tuple[str, ...]]:
        """Sizes, and what is to be said of them."""
        timed = self.kind == "latency_ms"
        reached, sizes = self.largest_that_meets() if timed else self.closest()
        notes = [self.doubt] if self.doubt else []
        same = self.same_share(reached, sizes)
        if same is not None and same != sizes:
            ours, theirs = sensitivity.error(sizes), sensitivity.error(same)
            if theirs < ours:
                sizes, reached = same, reached if timed else self.measure(same)
                error = f"by {theirs:.2%} of its variance instead of {ours:.2%}"
                notes.append(f"target: every group keeps the same share, as that changes the output less ({error}).")
        if (reached - self.goal if timed else abs(reached - self.goal)) > _MISSED * self.goal:
            self.check_sensible()
            notes.append(explain_miss(self.kind, reached, self.goal, self.whole))
        return sizes, tuple(notes)

    # ---- cost -------------------------------------------------------------------------------------------------------

    @cached_property
    def cost(self) -> Cost:
        return self._modelled[0]

    @property
    def doubt(self) -> str | None:
        """Why the cost model is not believed; None if it is exact."""
        return self._modelled[1]

    @cached_property
    def _modelled(self) -> tuple[Cost, str | None]:
        kind = "params" if self.kind == "params" else "macs"
        return find_believed_cost(self.model, self.graph, self.groups, self.inputs, kind, self.literals)

    def fit(self, budget: float) -> Sizes:
        return allocate(
            *(self.groups, self.curves, self.cost, budget),
            round_to=self.recipe.round_to,
            min_channels=self.recipe.min_channels,
        )

    def measure(self, sizes: Mapping[str, int]) -> float:
        """Infinite for a network that does not run."""
        return _measure(self.kind, build_with_sizes(self.model, self.graph, sizes, self.literals), self.inputs)

    def check_sensible(self) -> None:
        """A count of 50, where that is unreachable, most likely means 50 percent."""
        _, wanted = check_target(self.recipe.target)
        slip = self.kind != "latency_ms" and 1 < wanted <= _PERCENT
        if slip and self.goal < (least := self.measure(self.fit(0.0))):
            raise BudgetError(
                f"target[{self.kind!r}]: {self.goal:g} was asked for, and the smallest network of these groups has "
                f"{describe_amount(self.kind, least)}; give a fraction, at most 1 (0.5 is half of "
                f"{describe_amount(self.kind, self.whole)}), or a larger count."
            )

    # ---- parameters and MACs ----------------------------------------------------------------------------------------

    def closest(self) -> tuple[float, Sizes]:
        """What is measured of the sizes that come closest to the goal, and the sizes."""
        cost, goal = self.cost, self.goal
        total = cost({})
        low, high = cost(self.fit(0.0)), total  # of the cost model; the measured cost grows with it
        budget, best, tried = goal / self.whole * total, None, []
        for _ in range(_TRIALS if self.doubt is None else 2 * _TRIALS):
            found = self.fit(min(max(budget, low), high))
            tried.append(found)
            reached = self.measure(found)
            if best is None or abs(reached - goal) < abs(best[0] - goal):
                best = reached, found
            if abs(reached - goal) <= _CLOSE_ENOUGH * goal or high - low <= 1e-3 * total:
                break
            low, high = (low, cost(found)) if reached > goal else (cost(found), high)
            budget = min(max(cost(found) * goal / reached, low + 0.05 * (high - low)), high - 0.05 * (high - low))
        assert best is not None
        if abs(best[0] - goal) > _CLOSE_ENOUGH * goal and self.doubt is None:
            sizes = min(map(self.nudged, tried), key=self.off)
            best = self.measure(sizes), sizes
        return best

    def nudged(self, sizes: Sizes) -> Sizes:
        """Single steps, of two groups at once where there are few, as long as they come closer to the goal."""
        for _ in range(_NUDGES):
            steps = self._steps(sizes)
            if len(steps) <= 2 * _FEW:
                steps += [further for once in steps for further in self._steps(once)]
            best = min(steps, key=self.off, default=sizes)
            if self.off(best) >= self.off(sizes):
                break
            sizes = best
        return sizes

    def off(self, sizes: Sizes) -> float:
        """How far the predicted cost is from the goal."""
        return abs(self.cost(sizes) - self.goal)

    def _steps(self, sizes: Sizes) -> list[Sizes]:
        return [self._step(sizes, twins, up) for twins in families_of(self.groups) for up in (True, False)]

    def _step(self, sizes: Sizes, twins: Sequence[ChannelGroup], up: bool) -> Sizes:
        """One channel, or one multiple of `round_to`, more or less."""
        whole, m = (n // twins[0].multiple for n in (twins[0].size, sizes[twins[0].name]))
        step, least = self.recipe.round_to or 1, min(whole, self.least(twins[0]))
        m = min(whole, (m // step + 1) * step) if up else max(least, (m - 1) // step * step)
        return {**sizes, **size_twins(twins, m)}

    # ---- latency ----------------------------------------------------------------------------------------------------

    def timed(self, *candidates: Mapping[str, int], repeats: int = _REPEATS) -> list[float]:
        """Milliseconds of networks of these sizes; they and the original take turns, so a busy machine counts less."""
        models = [self.model, *(build_with_sizes(self.model, self.graph, sizes, self.literals) for sizes in candidates)]
        own, *found = latencies_ms(models, self.inputs, repeats=repeats)
        return [ms / own * self.whole for ms in found]

    def largest_that_meets(self) -> tuple[float, Sizes]:
        """Milliseconds and sizes of the largest network that is measured to meet the goal, else of the smallest.

        Halving finds where networks begin to meet it; there, neighbours are measured again, more often and all in turn.
        """
        low, high = self.cost(self.fit(0.0)), self.cost({})
        smallest, met = self.fit(0.0), low
        tried = {low: smallest}
        for _ in range(_TRIALS):
            middle = (low + high) / 2
            found = self.fit(middle)
            tried[self.cost(found)] = found
            meets = self.timed(found)[0] <= self.goal
            low, high = (middle, high) if meets else (low, middle)
            met = max(met, self.cost(found)) if meets else met
        ordered = [tried[c] for c in sorted(tried, reverse=True)]
        first = max(0, sum(self.cost(sizes) > met for sizes in ordered) - 1)  # the smallest that was too slow
        times: list[float] = []
        for start in range(first, len(ordered), _AT_ONCE):
            near = ordered[start : start + _AT_ONCE]
            times = self.timed(*near, repeats=3 * _REPEATS)
            for ms, sizes in zip(times, near, strict=True):
                if ms <= self.goal:
                    return ms, sizes
        return times[-1], smallest

    # ---- the same share of every group ------------------------------------------------------------------------------

    def same_share(self, reached: float, sizes: Mapping[str, int]) -> Sizes | None:
        """The largest sizes, the same share of every group, that cost no more than these; None if there are none."""
        priced = self.cost if self.doubt is None or self.kind == "latency_ms" else self.measure
        most = self.cost(sizes) if self.kind == "latency_ms" else max(reached, self.goal)
        low, high, best = 0.0, 1.0, None
        for _ in range(20 if priced is self.cost else _TRIALS):
            keep = (low + high) / 2
            found = self._uniform(keep)
            low, high, best = (keep, high, found) if priced(found) <= most else (low, keep, best)
        met = best is None or self.kind != "latency_ms" or self.timed(best)[0] <= max(self.goal, reached)
        return best if met else None

    def _uniform(self, keep: float) -> Sizes:
        recipe = self.recipe
        return uniform_sizes(self.groups, keep, self.graph, round_to=recipe.round_to, min_channels=recipe.min_channels)

    def least(self, group: ChannelGroup) -> int:
        """The smallest size that is allowed."""
        return min(group.size, least_size(self.recipe.min_channels, self.recipe.round_to))


def _find_shrinkable(reference: Reference, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], Literals]:
    """The groups that would not be rolled back if all were halved, and which numbers in attributes follow."""
    surgery = _try_sizes(reference, _halve(groups))
    return [g for g in groups if g.name not in surgery.rolled_back], surgery.literals


def _halve(groups: Sequence[ChannelGroup]) -> Sizes:
    """Half the channels of every group, rounded up, twins in step."""
    halves = (size_twins(twins, (twins[0].size // twins[0].multiple + 1) // 2) for twins in families_of(groups))
    return {name: m for sizes in halves for name, m in sizes.items()}


def _try_sizes(reference: Reference, sizes: Mapping[str, int]) -> Surgery:
    """A network of these sizes, with whichever weights."""
    graph, maps = reference.graph, _select_maps(reference.graph, sizes)
    return operate(reference.model, graph, maps, reference.inputs, FunctionCheck(reference))


_METERS: dict[str, Callable[[nn.Module, Inputs], float]] = {
    "params": lambda model, inputs: float(params_of(model)),
    "macs": lambda model, inputs: float(size_of(model, inputs).macs),
    "latency_ms": latency_ms,
}


def _measure(kind: str, model: nn.Module, inputs: Inputs) -> float:
    """Infinite for a network that does not run."""
    try:
        return _METERS[kind](model, inputs)
    except ModelError:
        return math.inf


# ---- cost as a function of sizes ------------------------------------------------------------------------------------


def find_believed_cost(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    inputs: Inputs,
    kind: str,
    literals: Literals | None = None,
) -> tuple[Cost, str | None]:
    """Parameters or multiply-accumulates as a function of sizes, and why not to believe it; None where it is exact.

    It is compared with networks of several sizes. MACs that do not follow the weights (products of two activations,
    channels that are not what a layer mixes) are taken from the products of networks in which one group is smaller.
    """
    tests = sizes_to_test(groups)
    real = [(sizes, _measure(kind, build_with_sizes(model, graph, sizes, literals), inputs)) for sizes in tests]
    off = lambda cost: max((abs(cost(s) / m - 1) for s, m in real if 0 < m < math.inf), default=0.0)  # noqa: E731
    cost = cost_of(model, graph, inputs, kind)
    if off(cost) > _EXACT and kind == "macs":
        cost = _predict_cost(model, graph, groups, inputs, literals) or cost
    doubt = f"target: predicted {kind} are off by up to {off(cost):.1%}; the sizes go by what was measured."
    return cost, doubt if off(cost) > _EXACT else None


def sizes_to_test(groups: Sequence[ChannelGroup]) -> list[Sizes]:
    """All groups smaller, by different shares from family to family."""
    shares = ((0.5, 0.5, 0.5), (0.3, 0.7, 0.9), (0.8, 0.4, 0.2))
    families = list(enumerate(families_of(groups)))
    base = lambda f, share: max(1, int(f[0].size // f[0].multiple * share))  # noqa: E731
    sized = lambda three: {n: m for i, f in families for n, m in size_twins(f, base(f, three[i % 3])).items()}  # noqa: E731
    return [sized(three) for three in shares] if groups else []


def cost_of(model: nn.Module, graph: ChannelGraph, inputs: Inputs, kind: str) -> Cost:
    """Parameters or multiply-accumulates as a function of sizes, in proportion to what is left of each weight."""
    tensors = named_tensors(model)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if kind == "params":
        shares = {name: (shapes[name], float(p.numel())) for name, p in model.named_parameters()}
        return Cost.of(graph, _METERS["params"](model, inputs), shares)
    spent = macs_by_weight(model, inputs)
    shares = {name: (shapes[name], macs) for name, macs in spent.items() if name in shapes}
    return Cost.of(graph, _METERS["macs"](model, inputs), shares)


def _predict_cost(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    inputs: Inputs,
    literals: Literals | None,
) -> Cost | None:
    """Multiply-accumulates as a function of sizes, from a forward pass with each family of groups halved."""
    tried = {}
    for twins in families_of(groups):
        halves = _halve(twins)
        if halves[twins[0].name] < twins[0].size:
            small = build_with_sizes(model, graph, halves, literals)
            tried[twins[0].name] = halves[twins[0].name], factors_of_products(small, inputs)
    return Cost.of_products(graph, factors_of_products(model, inputs), tried)


def build_with_sizes(
    model: nn.Module, graph: ChannelGraph, sizes: Mapping[str, int], literals: Literals | None = None
) -> nn.Module:
    """A network of these sizes, with whichever weights: for measuring what it costs."""
    return copy_reduced(model, graph, _select_maps(graph, sizes), literals)


def _select_maps(graph: ChannelGraph, sizes: Mapping[str, int]) -> dict[str, ReductionMap]:
    """Selections of the first channels."""
    smaller = {g.name: g for g in graph.groups if sizes.get(g.name, g.size) < g.size}
    return {name: selection_map(torch.arange(sizes[name]), g.size) for name, g in smaller.items()}
