"""Sizes for limits of parameters, MACs, memory or measured latency: predicted, tried on such a network, corrected."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from intrafusion.asked import SHARES, check_target, least_size
from intrafusion.budget.allocate import allocate
from intrafusion.budget.cost import Cost, add_up, costs_of_results
from intrafusion.budget.limits import Limit, describe_held
from intrafusion.budget.missed import describe_amount, explain_miss
from intrafusion.budget.rounding import describe_rounding, list_steps
from intrafusion.budget.sensitivity import Sensitivity, halve
from intrafusion.budget.uniform import uniform_sizes
from intrafusion.errors import BudgetError, ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of, size_twins
from intrafusion.measure.latency import latencies_ms, latency_ms
from intrafusion.measure.memory import list_live_results, memory_mb, weigh
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
_WEIGHINGS = 6  # of several limits against each other
_SHARPNESS = 8  # how fast a limit loses weight that is met already: its weight is multiplied by (spent / limit)^8
_MB = 1e6  # bytes
_PERCENT = 100  # a count up to this that cannot be reached is taken for a slip

Sizes = dict[str, int]
_T = TypeVar("_T")


def sizes_for_target(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    sensitivity: Sensitivity,
    recipe: Recipe,
    example_inputs: ExampleInputs | None,
    original: nn.Module | None = None,
) -> tuple[Sizes, tuple[str, ...]]:
    """Sizes with the least predicted error that meet the target of a recipe, or come as close as they can.

    Where the same share of every group, at the same cost, is measured to change the output less, that is taken. A
    latency is met by the largest network that was measured to meet it. Of several limits all are met.

    Args:
        original: what limits are fractions of, where that is not the network: it may have layers as two of full rank.
    Returns:
        sizes, and notes: where they miss a limit by more than 2 %, where a cost could not be predicted, where the
        same share of every group was better, where sizes were rounded.

    Raises:
        BudgetError: no limit, an unknown one, one that is no positive number, a count meant to be a share, or a
            `round_to` that is none.
    """
    inputs, original = require_inputs(example_inputs, recipe), model if original is None else original
    asked = read_limits(recipe, original, inputs)
    limits = [limit for limit in asked if limit.goal < limit.whole]
    kept = tuple(
        f"target: up to {describe_amount(limit.kind, limit.goal)} were asked for; the network has "
        f"{describe_amount(limit.kind, limit.whole)} as it is"
        + (", and stays so." if not limits else ", so this limits nothing.")
        for limit in asked
        if limit.goal > limit.whole
    )
    if not limits:
        return {}, kept
    reference = Reference(model, graph, inputs)
    groups, literals = _find_shrinkable(reference, groups)
    sensitivity = replace(sensitivity, literals=literals) if literals.learned else sensitivity
    opinions = sensitivity.list_curves(groups)
    sizes, notes, refused = Sizes(), (), {}
    for _ in range(_ROUNDS + any(not g.is_channel for g in groups)):
        search = _Search.of(model, graph, groups, opinions[0], recipe, inputs, limits, literals, original)
        sizes, notes = search.find(sensitivity, opinions)
        refused = _try_sizes(reference, sizes).rolled_back
        if not refused:
            return sizes, (*kept, *notes)
        around = _find_cut_blocks(groups, sizes, refused)
        groups = [g for g in groups if g.name not in (around or refused)]
    stuck = f"{MISSED}groups do not shrink to the sizes that it takes: {', '.join(refused)}."
    return sizes, (*kept, *notes, stuck)


def read_limits(recipe: Recipe, model: nn.Module, inputs: Inputs) -> list[Limit]:
    """What a recipe asks of a network, without the costs of sizes.

    Raises:
        BudgetError: no limits, or the network has nothing of that kind.
    """
    return [_read_limit(kind, wanted, model, inputs) for kind, wanted in check_target(recipe.target).items()]


def _read_limit(kind: str, wanted: float, model: nn.Module, inputs: Inputs) -> Limit:
    """
    Raises:
        BudgetError: the network has nothing of that kind.
    """
    whole = _METERS[kind](model, inputs)
    if whole <= 0:
        raise BudgetError(f"target: this network has no {kind} to save on these example inputs.")
    return Limit(kind, wanted * whole if kind in SHARES and wanted <= 1 else wanted, whole)


def require_inputs(example_inputs: ExampleInputs | None, recipe: Recipe) -> Inputs:
    if example_inputs is None:
        raise BudgetError(
            f"target: {', '.join(check_target(recipe.target))} are measured on example inputs; give decide(...) some."
        )
    return Inputs.of(example_inputs)


@dataclass(frozen=True, eq=False)
class _Search:
    """One search for the sizes of these groups that meet limits.

    What is spent is told in shares of the limits: 1 meets them, and of several the one counts that is met least.

    Attributes:
        limits: with their costs as functions of sizes.
        steps: the multiples that sizes are of, by group.
        original: what a latency is a part of.
    """

    model: nn.Module
    graph: ChannelGraph
    groups: Sequence[ChannelGroup]
    curves: Mapping[str, Tensor]
    recipe: Recipe
    inputs: Inputs
    limits: Sequence[Limit]
    steps: Mapping[str, int]
    literals: Literals | None
    original: nn.Module

    @classmethod
    def of(
        cls,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[ChannelGroup],
        curves: Mapping[str, Tensor],
        recipe: Recipe,
        inputs: Inputs,
        limits: Sequence[Limit],
        literals: Literals | None,
        original: nn.Module,
    ) -> _Search:
        """With the costs of the limits."""
        priced = [_price_limit(limit, model, graph, groups, inputs, literals) for limit in limits]
        steps = list_steps(groups, recipe.round_to)
        return cls(model, graph, groups, curves, recipe, inputs, priced, steps, literals, original)

    def find(self, sensitivity: Sensitivity, opinions: Sequence[Mapping[str, Tensor]]) -> tuple[Sizes, tuple[str, ...]]:
        """Sizes, and what is to be said of them; not rounded by default where rounded ones miss the limits."""
        rounded = replace(self, steps=list_steps(self.groups, 1))
        found = [replace(self, curves=curves).reach() for curves in opinions]
        reached, sizes = found[0]
        if self.is_off_by_rounding(reached):
            return rounded.find(sensitivity, opinions)
        same = self.same_share(reached if math.isfinite(reached) else 1.0, sizes)
        if same is not None:
            found.append((reached if self.clock else self.measure(same), same))
        found = [one for one in found if math.isfinite(one[0])] or found
        (reached, sizes), said = self.choose(found, sensitivity, same)
        if self.is_off_by_rounding(reached):
            return rounded.find(sensitivity, opinions)
        notes = [limit.doubt for limit in self.limits if limit.doubt]
        notes += [*said, *describe_rounding(self.groups, sizes, self.steps, self.recipe.round_to)]
        return sizes, (*notes, *self.explain_misses(sizes, reached, even=bool(said)))

    def reach(self) -> tuple[float, Sizes]:
        """What is spent by the sizes that these curves lead to, as a share of the limits, and the sizes."""
        return self.largest_that_meets() if self.clock else self.closest()

    def choose(
        self, found: Sequence[tuple[float, Sizes]], sensitivity: Sensitivity, same: Sizes | None
    ) -> tuple[tuple[float, Sizes], list[str]]:
        """The one that changes the output least, of those as close to the limits as the first, and of even shares."""
        far = lambda reached: max(reached - 1, 0.0) if self.clock else abs(reached - 1)  # noqa: E731
        near = [one for one in found if one[1] == same or far(one[0]) <= max(far(found[0][0]), _CLOSE_ENOUGH)]
        distinct = [one for i, one in enumerate(near) if one[1] not in [sizes for _, sizes in near[:i]]]
        if len(distinct) == 1:
            return distinct[0], []
        errors = sensitivity.compare(*(sizes for _, sizes in distinct))
        best = errors.index(min(errors))
        if best == 0 or distinct[best][1] != same:
            return distinct[best], []
        error = f"by {errors[best]:.2%} of its variance instead of {min(errors[:best]):.2%}"
        return distinct[best], [
            f"target: every group keeps about the same share, as that changes the output less ({error})."
        ]

    def is_off_by_rounding(self, reached: float) -> bool:
        """Whether limits are missed, or more is cut than they ask for, with sizes that nobody asked to be rounded."""
        rounded = self.recipe.round_to is None and max(self.steps.values(), default=1) > 1
        return rounded and (self.is_missed(reached) or (not self.clock and reached < 1 - _MISSED))

    def is_missed(self, reached: float) -> bool:
        """By more than 2 %; a latency, or several limits, are not missed by what is below them."""
        at_most = self.clock or len(self.limits) > 1
        return (reached - 1 if at_most else abs(reached - 1)) > _MISSED

    def explain_misses(self, sizes: Sizes, reached: float, *, even: bool = False) -> list[str]:
        """The limits that are missed by more than 2 %.

        Args:
            even: whether the same share of every group was taken, although other sizes may come closer.
        """
        if not self.is_missed(reached):
            return self.describe_memory(sizes)
        self.check_sensible()
        found = [(limit, self.measure_of(limit, sizes, reached)) for limit in self.limits]
        missed = [(limit, amount) for limit, amount in found if self.is_missed(amount / limit.goal)]
        held = describe_held(self.recipe)
        told = [explain_miss(limit.kind, amount, limit.goal, limit.whole, held, even=even) for limit, amount in missed]
        return [*self.describe_memory(sizes), *told]

    def describe_memory(self, sizes: Sizes) -> list[str]:
        """What is printed nowhere else."""
        return [
            f"target: one call needs {describe_amount(limit.kind, limit.whole)} -> "
            f"{describe_amount(limit.kind, self.measure_of(limit, sizes, 0.0))}, weights and results together."
            for limit in self.limits
            if limit.kind == "memory_mb"
        ]

    # ---- cost -------------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> Limit | None:
        """The limit of the latency, if there is one: what it costs is predicted by the MACs."""
        return next((limit for limit in self.limits if limit.kind == "latency_ms"), None)

    @property
    def counted(self) -> list[Limit]:
        """The other limits."""
        return [limit for limit in self.limits if limit.kind != "latency_ms"]

    @property
    def doubtful(self) -> bool:
        """Whether a predicted cost is not exact."""
        return any(limit.doubt for limit in self.limits)

    def cost(self, sizes: Mapping[str, int]) -> float:
        """Predicted share of the limits; of a latency, of the original's MACs."""
        if self.clock:
            return self.clock.spend(sizes) / self.clock.spend({})
        return max(limit.spend(sizes) / limit.goal for limit in self.limits)

    def fit(self, budget: float) -> Sizes:
        """The sizes with the least predicted error whose cost is at most this; beside a latency, all limits hold."""
        if self.clock:
            most = {"latency_ms": budget * self.clock.spend({}), **{limit.kind: limit.goal for limit in self.counted}}
        else:
            most = {limit.kind: budget * limit.goal for limit in self.limits}
        priced = [(cost, most[limit.kind]) for limit in self.limits for cost in limit.costs_above(most[limit.kind])]
        costs, budgets = [cost for cost, _ in priced], [budget for _, budget in priced]
        weights = [1 / max(whole, 1e-300) for whole in add_up(costs, {})]
        found = list[tuple[float, float, int, Sizes]]()
        for index in range(_WEIGHINGS if len(costs) > 1 and min(budgets) > 0 else 1):
            sizes = allocate(
                *(self.groups, self.curves, costs, budgets),
                weights=weights,
                round_to=self.steps,
                min_channels=self.recipe.min_channels,
            )
            spent = [part / most if most else 1.0 for part, most in zip(add_up(costs, sizes), budgets, strict=True)]
            found.append((max([1.0, *spent]), self.predicted_error(sizes), index, sizes))
            weights = [weight * share**_SHARPNESS for weight, share in zip(weights, spent, strict=True)]
        return min(found)[-1]

    def predicted_error(self, sizes: Mapping[str, int]) -> float:
        return sum(float(self.curves[g.name][sizes[g.name]]) for g in self.groups)

    def build(self, sizes: Mapping[str, int]) -> nn.Module:
        return build_with_sizes(self.model, self.graph, sizes, self.literals)

    def measure(self, sizes: Mapping[str, int]) -> float:
        """Share of the limits; infinite for a network that does not run."""
        model = self.build(sizes)
        return max(_measure(limit.kind, model, self.inputs) / limit.goal for limit in self.limits)

    def measure_of(self, limit: Limit, sizes: Mapping[str, int], reached: float) -> float:
        """Of one limit, in its unit; of the latency, what was reached."""
        if limit is self.clock:
            return reached * limit.goal
        return _measure(limit.kind, self.build(sizes), self.inputs)

    def check_sensible(self) -> None:
        """A count of 50, where that is unreachable, most likely means 50 percent."""
        asked = check_target(self.recipe.target)
        for limit in self.counted:
            slip = limit.kind in SHARES and 1 < asked[limit.kind] <= _PERCENT
            least = _measure(limit.kind, self.build(self.fit(0.0)), self.inputs) if slip else 0.0
            if limit.goal < least:
                raise BudgetError(
                    f"target[{limit.kind!r}]: {limit.goal:g} was asked for, and the smallest network of these groups "
                    f"has {describe_amount(limit.kind, least)}; give a fraction, at most 1 (0.5 is half of "
                    f"{describe_amount(limit.kind, limit.whole)}), or a larger count."
                )

    # ---- what is counted --------------------------------------------------------------------------------------------

    def closest(self) -> tuple[float, Sizes]:
        """What is measured of the sizes that come closest to the limits, as a share of them, and the sizes."""
        total = self.cost({})
        low, high = self.cost(self.fit(0.0)), total  # of the cost model; the measured cost grows with it
        budget, best, tried = 1.0, None, []
        for _ in range(2 * _TRIALS if self.doubtful else _TRIALS):
            found = self.fit(min(max(budget, low), high))
            tried.append(found)
            reached = self.measure(found)
            if best is None or abs(reached - 1) < abs(best[0] - 1):
                best = reached, found
            if abs(reached - 1) <= _CLOSE_ENOUGH or high - low <= 1e-3 * total:
                break
            low, high = (low, self.cost(found)) if reached > 1 else (self.cost(found), high)
            budget = min(max(self.cost(found) / reached, low + 0.05 * (high - low)), high - 0.05 * (high - low))
        assert best is not None
        if abs(best[0] - 1) > _CLOSE_ENOUGH and not self.doubtful:
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
        """How far the predicted cost is from the limits."""
        return abs(self.cost(sizes) - 1)

    def _steps(self, sizes: Sizes) -> list[Sizes]:
        return [self._step(sizes, twins, up) for twins in families_of(self.groups) for up in (True, False)]

    def _step(self, sizes: Sizes, twins: Sequence[ChannelGroup], up: bool) -> Sizes:
        """One channel, or one of the multiples that sizes are of, more or less."""
        whole, m = (n // twins[0].multiple for n in (twins[0].size, sizes[twins[0].name]))
        step = self.steps[twins[0].name]
        least = min(whole, least_size(self.recipe.min_channels, step)) if twins[0].is_channel else 1
        m = min(whole, (m // step + 1) * step) if up else max(least, (m - 1) // step * step)
        return {**sizes, **size_twins(twins, m)}

    # ---- latency ----------------------------------------------------------------------------------------------------

    def timed(self, *candidates: Mapping[str, int], repeats: int = _REPEATS) -> list[float]:
        """Latency of networks of these sizes, as a share of its limit.

        They and the original take turns, so a busy machine counts less.
        """
        assert self.clock is not None
        models = self.original, *map(self.build, candidates)
        own, *found = latencies_ms(models, self.inputs, repeats=repeats)
        return [ms / own * self.clock.whole / self.clock.goal for ms in found]

    def largest_that_meets(self) -> tuple[float, Sizes]:
        """Latency (share of its limit) and sizes of the largest network measured to meet it, else of the smallest.

        Halving finds where networks begin to meet it; there, neighbours are measured again, more often and all in turn.
        """
        smallest = self.fit(0.0)
        low, high = self.cost(smallest), self.cost(self.fit(1.0))
        met = low
        tried = {low: smallest}
        for _ in range(_TRIALS):
            middle = (low + high) / 2
            found = self.fit(middle)
            tried[self.cost(found)] = found
            meets = self.timed(found)[0] <= 1
            low, high = (middle, high) if meets else (low, middle)
            met = max(met, self.cost(found)) if meets else met
        ordered = [tried[c] for c in sorted(tried, reverse=True)]
        first = max(0, sum(self.cost(sizes) > met for sizes in ordered) - 1)  # the smallest that was too slow
        times: list[float] = []
        for start in range(first, len(ordered), _AT_ONCE):
            near = ordered[start : start + _AT_ONCE]
            times = self.timed(*near, repeats=3 * _REPEATS)
            for share, sizes in zip(times, near, strict=True):
                if share <= 1:
                    return share, sizes
        return times[-1], smallest

    # ---- the same share of every group ------------------------------------------------------------------------------

    def same_share(self, reached: float, sizes: Mapping[str, int]) -> Sizes | None:
        """The largest sizes, the same share of every group, that cost no more than these; None if there are none.

        Where a share for all leaves room, one step more of some groups fills it.
        """
        exact = bool(self.clock) or not self.doubtful
        most = self.cost(sizes) if self.clock else max(reached, 1.0)
        low, high, best = 0.0, 1.0, None
        for _ in range(20 if exact else _TRIALS):
            keep = (low + high) / 2
            found = self._uniform(keep)
            met = (self.cost if exact else self.measure)(found) <= most and self._meets_counted(found)
            low, high, best = (keep, high, found) if met else (low, keep, best)
        if best is not None and exact and not self.clock:
            best = self._filled(best)
        met = best is None or not self.clock or self.timed(best)[0] <= max(1.0, reached)
        return best if met else None

    def _filled(self, sizes: Sizes) -> Sizes:
        """One step more of some groups, as long as what is predicted comes closer to the limits from below."""
        left = families_of(self.groups)
        while left and self.off(sizes) > _CLOSE_ENOUGH:
            steps = [(self._step(sizes, twins, up=True), twins) for twins in left]
            steps = [(more, twins) for more, twins in steps if self.cost(sizes) < self.cost(more) <= 1]
            if not steps:
                break
            sizes, taken = min(steps, key=lambda step: self.off(step[0]))
            left = [twins for twins in left if twins is not taken]
        return sizes

    def _meets_counted(self, sizes: Mapping[str, int]) -> bool:
        """Whether the limits beside a latency hold, as far as they are predicted."""
        return not self.clock or all(limit.spend(sizes) <= limit.goal for limit in self.counted)

    def _uniform(self, keep: float) -> Sizes:
        found = Sizes()
        for step in {self.steps[g.name] for g in self.groups}:
            own = [g for g in self.groups if self.steps[g.name] == step]
            found |= uniform_sizes(own, keep, self.graph, round_to=step, min_channels=self.recipe.min_channels)
        return found


def _find_shrinkable(reference: Reference, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], Literals]:
    """The groups that would not be rolled back if all were halved, and which numbers in attributes follow.

    Whole blocks are tried beside the channels, so that none of these stays for their sake.
    """
    surgery = _try_sizes(reference, halve(g for g in groups if g.is_channel))
    channels = [g for g in groups if g.is_channel and g.name not in surgery.rolled_back]
    blocks = [g for g in groups if not g.is_channel]
    while blocks:
        fewer = {g.name: g.size - max(1, g.size // 4) for g in blocks}  # another share: a number may count either
        halves = {**halve(channels), **fewer}
        together = _try_sizes(reference, halves)
        if not together.rolled_back:
            return [g for g in groups if g in channels or g in blocks], together.literals
        stuck = _find_cut_blocks([*channels, *blocks], halves, together.rolled_back) or halves.keys()
        blocks = [g for g in blocks if g.name not in stuck]
    return channels, surgery.literals


def _find_cut_blocks(groups: Sequence[ChannelGroup], sizes: Mapping[str, int], refused: Container[str]) -> set[str]:
    """Whole blocks that are cut and share tensors with groups that were refused, which stay in their place."""
    tensors = {m.tensor for g in groups if g.name in refused for m in g.members}
    cut = [g for g in groups if not g.is_channel and sizes.get(g.name, g.size) < g.size]
    return {g.name for g in cut if any(m.tensor in tensors for m in g.members)}


def _try_sizes(reference: Reference, sizes: Mapping[str, int]) -> Surgery:
    """A network of these sizes, with whichever weights."""
    graph, maps = reference.graph, _select_maps(reference.graph, sizes)
    return operate(reference.model, graph, maps, reference.inputs, FunctionCheck(reference))


_METERS: dict[str, Callable[[nn.Module, Inputs], float]] = {
    "params": lambda model, inputs: float(params_of(model)),
    "macs": lambda model, inputs: float(size_of(model, inputs).macs),
    "latency_ms": latency_ms,
    "memory_mb": memory_mb,
}


def _measure(kind: str, model: nn.Module, inputs: Inputs) -> float:
    """Infinite for a network that does not run."""
    try:
        return _METERS[kind](model, inputs)
    except ModelError:
        return math.inf


# ---- cost as a function of sizes ------------------------------------------------------------------------------------


def _price_limit(
    limit: Limit,
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    inputs: Inputs,
    literals: Literals | None,
) -> Limit:
    """With its cost as a function of sizes; of a latency, the MACs; of memory, the bytes at every moment."""
    if limit.kind == "memory_mb":
        costs, doubt = find_believed_memory(model, graph, groups, inputs, literals)
        limit = replace(limit, costs=costs, doubt=doubt)
        return replace(limit, costs=tuple(limit.costs_above(limit.goal)))
    kind = "macs" if limit.kind == "latency_ms" else limit.kind
    cost, doubt = find_believed_cost(model, graph, groups, inputs, kind, literals)
    return replace(limit, costs=(cost,), doubt=doubt)


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
    real = _measure_tests(model, graph, groups, inputs, kind, literals)
    cost = cost_of(model, graph, inputs, kind)
    if _find_doubt(cost, real, kind) and kind == "macs":
        cost = _predict_cost(model, graph, groups, inputs, literals) or cost
    return cost, _find_doubt(cost, real, kind)


_Measured = Sequence[tuple[Sizes, float]]


def _measure_tests(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    inputs: Inputs,
    kind: str,
    literals: Literals | None,
) -> _Measured:
    """What networks of several sizes really cost."""
    tests = sizes_to_test(groups)
    return [(sizes, _measure(kind, build_with_sizes(model, graph, sizes, literals), inputs)) for sizes in tests]


def _find_doubt(cost: Callable[[Mapping[str, int]], float], real: _Measured, kind: str) -> str | None:
    """Why not to believe a predicted cost; None where it is exact."""
    off = max((abs(cost(sizes) / m - 1) for sizes, m in real if 0 < m < math.inf), default=0.0)
    if off <= _EXACT:
        return None
    return f"target: predicted {kind} are off by up to {off:.1%}; the sizes go by what was measured."


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
    tried = _look_at_halves(model, graph, groups, literals, lambda small: factors_of_products(small, inputs))
    return None if tried is None else Cost.of_products(graph, factors_of_products(model, inputs), tried)


def _look_at_halves(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    literals: Literals | None,
    look: Callable[[nn.Module], _T],
) -> dict[str, tuple[int, _T]] | None:
    """What is seen of networks with one family of groups halved, by its first group, and the size of that there.

    None where one of them does not run.
    """
    found = dict[str, tuple[int, _T]]()
    for twins in families_of(groups):
        halves = halve(twins)
        if halves[twins[0].name] < twins[0].size:
            small = build_with_sizes(model, graph, halves, literals)
            try:
                found[twins[0].name] = halves[twins[0].name], look(small)
            except ModelError:
                return None
    return found


def find_believed_memory(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    inputs: Inputs,
    literals: Literals | None = None,
) -> tuple[tuple[Cost, ...], str | None]:
    """Megabytes at every moment of a call as functions of sizes, the largest counts; and why not to believe it.

    What is made in a call, and what is alive together, is seen in calls with each family of groups halved.
    """
    whole, weights = list_live_results(model, inputs), _predict_weights(model, graph)
    tried = _look_at_halves(model, graph, groups, literals, lambda small: list_live_results(small, inputs))
    costs = None if tried is None else costs_of_results(graph, weights, whole, tried, 1 / _MB)
    if costs is None:  # other operations where it is smaller, or none at all: as if it went with the MACs
        macs = cost_of(model, graph, inputs, "macs")
        costs = (macs.scaled(memory_mb(model, inputs) / max(macs({}), 1.0)),)
    real = _measure_tests(model, graph, groups, inputs, "memory_mb", literals)
    return costs, _find_doubt(lambda sizes: max(cost(sizes) for cost in costs), real, "memory_mb")


def _predict_weights(model: nn.Module, graph: ChannelGraph) -> Cost:
    """Bytes of parameters and buffers as a function of sizes."""
    shares = {name: (tuple(t.shape), float(t.numel() * t.element_size())) for name, t in named_tensors(model).items()}
    return Cost.of(graph, float(weigh(model)), shares)


def build_with_sizes(
    model: nn.Module, graph: ChannelGraph, sizes: Mapping[str, int], literals: Literals | None = None
) -> nn.Module:
    """A network of these sizes, with whichever weights: for measuring what it costs."""
    return copy_reduced(model, graph, _select_maps(graph, sizes), literals)


def _select_maps(graph: ChannelGraph, sizes: Mapping[str, int]) -> dict[str, ReductionMap]:
    """Selections of the first channels."""
    smaller = {g.name: g for g in graph.groups if sizes.get(g.name, g.size) < g.size}
    return {name: selection_map(torch.arange(sizes[name]), g.size) for name, g in smaller.items()}
