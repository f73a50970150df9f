"""Sizes for a budget of parameters, MACs or measured latency: predicted, tried on such a network, corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from intrafusion.asked import check_target
from intrafusion.budget.allocate import allocate
from intrafusion.budget.cost import Cost
from intrafusion.errors import BudgetError
from intrafusion.graph import ChannelGraph, ChannelGroup
from intrafusion.measure.latency import latency_ms
from intrafusion.measure.size import macs_by_weight, size_of
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.recipe import Recipe
from intrafusion.reduce.select import selection_map
from intrafusion.surgery.operate import copy_reduced, operate
from intrafusion.surgery.proof import FunctionCheck

_CLOSE_ENOUGH = 0.01  # trying stops this close to the target
_MISSED = 0.02  # further off than this is said
_TRIALS = 8


def sizes_for_target(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, Tensor],
    recipe: Recipe,
    example_inputs: ExampleInputs | None,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Sizes with the least predicted error that meet the target of a recipe, or come as close as they can.

    Returns:
        sizes, and a note where they miss the target by more than 2 %.

    Raises:
        BudgetError: not exactly one target, an unknown one, or one that is not positive.
    """
    kind, wanted = check_target(recipe.target)
    if example_inputs is None:
        raise BudgetError(f"target: {kind} is measured on example inputs; give decide(...) some.")
    inputs = Inputs.of(example_inputs)
    groups = _find_shrinkable(model, graph, groups, inputs)
    measure = _METERS[kind]
    whole = measure(model, inputs)
    goal = wanted * whole if kind != "latency_ms" and wanted <= 1 else wanted
    cost = cost_of(model, graph, inputs, "params" if kind == "params" else "macs")
    total = cost({})
    fit = lambda budget: allocate(  # noqa: E731
        groups, curves, cost, budget, round_to=recipe.round_to, min_channels=recipe.min_channels
    )
    low, high = cost(fit(0.0)), total  # of the cost model; the measured cost grows with it
    budget, best = goal / whole * total, None
    for _ in range(_TRIALS):
        found = fit(min(max(budget, low), high))
        reached = measure(build_with_sizes(model, graph, found), inputs)
        if best is None or abs(reached - goal) < abs(best[0] - goal):
            best = reached, found
        if abs(reached - goal) <= _CLOSE_ENOUGH * goal or high - low <= 1e-3 * total:
            break
        low, high = (low, cost(found)) if reached > goal else (cost(found), high)
        budget = min(max(cost(found) * goal / reached, low + 0.05 * (high - low)), high - 0.05 * (high - low))
    assert best is not None
    reached, sizes = best
    missed = abs(reached - goal) > _MISSED * goal
    note = f"target: {kind} {goal:,.4g} was asked for; the closest reachable here is {reached:,.4g}."
    return sizes, (note,) if missed else ()


def _find_shrinkable(
    model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], inputs: Inputs
) -> list[ChannelGroup]:
    """The groups that would not be rolled back if all were halved."""
    halved = {g.name: selection_map(torch.arange((g.size + 1) // 2), g.size) for g in groups if g.size > 1}
    refused = operate(model, graph, halved, inputs, FunctionCheck(model, graph, inputs)).rolled_back
    return [g for g in groups if g.name not in refused]


_METERS: dict[str, Callable[[nn.Module, Inputs], float]] = {
    "params": lambda model, inputs: float(sum(p.numel() for p in model.parameters())),
    "macs": lambda model, inputs: float(size_of(model, inputs).macs),
    "latency_ms": latency_ms,
}


def cost_of(model: nn.Module, graph: ChannelGraph, inputs: Inputs, kind: str) -> Cost:
    """Parameters or multiply-accumulates as a function of sizes."""
    tensors = named_tensors(model)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if kind == "params":
        shares = {name: (shapes[name], float(p.numel())) for name, p in model.named_parameters()}
        return Cost.of(graph, _METERS["params"](model, inputs), shares)
    spent = macs_by_weight(model, inputs)
    shares = {name: (shapes[name], macs) for name, macs in spent.items() if name in shapes}
    return Cost.of(graph, _METERS["macs"](model, inputs), shares)


def build_with_sizes(model: nn.Module, graph: ChannelGraph, sizes: Mapping[str, int]) -> nn.Module:
    """A network of these sizes, with whichever weights: for measuring what it costs."""
    maps = {
        g.name: selection_map(torch.arange(sizes[g.name]), g.size)
        for g in graph.groups
        if sizes.get(g.name, g.size) < g.size
    }
    return copy_reduced(model, graph, maps)
