"""The whole method on one screen: trace, verify, decide, reduce, prove."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.apply import hollow_, named_tensors, write_
from intrafusion.batches import Images
from intrafusion.budget import sizes
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError
from intrafusion.features import biases, features
from intrafusion.graph import ChannelGraph, ChannelGroup
from intrafusion.inputs import ExampleInputs, Inputs
from intrafusion.measure.size import size_of
from intrafusion.norms import fold
from intrafusion.plan import Decision, Plan, members_of
from intrafusion.recipe import Keep, Recipe
from intrafusion.reduce import Reducer, ReductionMap, ReductionProblem, Select
from intrafusion.restore import LeastSquares
from intrafusion.selection import left_alone
from intrafusion.trace import trace
from intrafusion.verify import operate, verified

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, steps done and steps in all."""


def silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Keep = 0.7,
    *,
    reducer: str | Reducer = "intrafusion",
    importance: Any = "l1",
    round_to: int | None = None,
    include: Any = None,
    exclude: Any = None,
    order: str = "joint",
    seed: int = 0,
    images: Images | None = None,
    restorer: LeastSquares | None = None,
    inplace: bool = False,
    progress: Progress = silent,
) -> Compressed:
    """Make a trained network smaller, without training, and without data unless `images` are given.

    Args:
        model: any eager PyTorch network; not modified unless `inplace`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward call.
        keep: fraction of the channels of every group to keep, in (0, 1], or {name pattern: fraction}.
        reducer: "intrafusion", "select" (plain pruning), or any Reducer.
        importance: "l1", "l2", "linf", "random", or any callable (group, weights, observations) -> (n,) scores.
        round_to: make every size a multiple of this (the nearest, never below it).
        include: reduce only the channels of these layers: names, patterns, types, functions (name, module) -> bool,
            or a list of such; "name:inputs" or `inputs_of(...)` means what the layers read, else what they produce.
        exclude: leave the channels of these layers alone; as `include`.
        order: "joint" (every group is described by the original weights) or "backward" (one after another from the
            output, each described by what the ones before left; the authors' released code).
        seed: for whatever draws random numbers.
        images: a few hundred unlabelled images as the network takes them (a tensor, or any iterable of tensors, tuples
            or dicts): every layer is solved by least squares for the original's outputs on them.
        restorer: how; `LeastSquares()` by default. Not used without images.
        inplace: write the smaller weights into `model` itself.
    Returns:
        the smaller network with the plan that was carried out; groups that were left alone say why.
    Raises:
        ModelError: the network does not run on the example inputs, holds NaN, or has no group to reduce.
        BudgetError: a keep outside (0, 1], or a name that nothing matches.
    """
    recipe = Recipe.of(
        keep=keep,
        reducer=reducer,
        importance=importance,
        round_to=round_to,
        include=include,
        exclude=exclude,
        order=order,
        seed=seed,
    )
    inputs = Inputs.of(example_inputs)
    graph = inspect(model, inputs, progress=progress)
    plan = decide(model, graph, recipe, progress=progress)
    small = carry_out(model, plan, graph, inputs, progress=progress)
    if images is not None:
        (restorer or LeastSquares())(small, model, graph, images)
    return moved_into(model, small) if inplace else small


def moved_into(model: nn.Module, small: Compressed) -> Compressed:
    """The smaller weights in the original's own parameters."""
    write_(model, {name: tensor.data for name, tensor in named_tensors(small.model).items()})
    return replace(small, model=model)


def inspect(model: nn.Module, example_inputs: ExampleInputs, *, progress: Progress = silent) -> ChannelGraph:
    """Trace a network into channel groups and prove each of them by a permutation."""
    check_finite(model)
    inputs = Inputs.of(example_inputs)
    progress("trace", 0, 2)
    graph = trace(model, inputs)
    progress("trace", 1, 2)
    graph = verified(model, graph, inputs)
    progress("trace", 2, 2)
    return graph


def check_finite(model: nn.Module) -> None:
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{name}: expected finite weights, got NaN or infinity; the network was saved broken, load another."
            )


def decide(model: nn.Module, graph: ChannelGraph, recipe: Recipe, *, progress: Progress = silent) -> Plan:
    """Score the channels of every group, set its size, and choose its map. Nothing is written.

    Raises:
        ModelError: no group can be reduced; gives the most frequent reasons.
    """
    unwanted = left_alone(graph, model, recipe.include, recipe.exclude)
    units = [g for g in graph.groups if g.kind == "channel"]
    groups = [g for g in units if g.reason is None and g.name not in unwanted]
    if not groups:
        raise ModelError(nothing_to_reduce(units, unwanted))
    wanted = sizes(groups, recipe.keep, graph, round_to=recipe.round_to)
    weights = folded_weights(model, graph, groups)
    maps: dict[str, ReductionMap] = {}
    for index, group in enumerate(in_order(groups, recipe)):
        progress("reduce", index, len(groups))
        if wanted[group.name] < group.size:
            maps[group.name] = solve(group, weights, wanted[group.name], recipe)
            if recipe.order == "backward":
                hollow_(weights, group, maps[group.name])
    progress("reduce", len(groups), len(groups))
    decisions = tuple(decision(g, wanted.get(g.name, g.size), recipe, unwanted.get(g.name)) for g in units)
    return Plan(recipe, decisions, graph.shapes, maps, graph.warnings)


def in_order(groups: list[ChannelGroup], recipe: Recipe) -> list[ChannelGroup]:
    return groups if recipe.order == "joint" else sorted(groups, key=lambda g: g.depth if g.depth is not None else -1)


def nothing_to_reduce(units: Iterable[ChannelGroup], unwanted: dict[str, str]) -> str:
    reasons = [f"{g.name!r}: {g.reason or unwanted.get(g.name)}" for g in units]
    shown = "; ".join(reasons[:5]) if reasons else "the network has no weights that follow one another"
    return f"there is no channel group to reduce in this network. {shown}."


def folded_weights(model: nn.Module, graph: ChannelGraph, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """The tensors of these groups in float64, batch norms folded."""
    names = {m.tensor for g in groups for m in g.members}
    norms = [n for n in graph.norms if n.mean in names or n.producer_weight in names]
    names |= {t for n in norms for t in (n.producer_weight, n.producer_bias, n.weight, n.bias, n.mean, n.variance) if t}
    tensors = named_tensors(model)
    return fold({name: tensors[name] for name in names}, norms)


def solve(group: ChannelGroup, weights: dict[str, Tensor], m: int, recipe: Recipe) -> ReductionMap:
    """The map of one group; channels that must not be mixed are selected."""
    scores = checked_scores(recipe.importance(group, weights, None), group)
    problem = ReductionProblem(features(group, weights), scores, m, recipe.seed, biases(group, weights))
    reducer = Select() if group.unmixable and recipe.reducer.mixes else recipe.reducer
    return reducer(problem)


def checked_scores(scores: object, group: ChannelGroup) -> Tensor:
    where = f"importance: group {group.name!r}: expected a tensor of {group.size} finite scores"
    if not isinstance(scores, Tensor) or scores.shape != (group.size,):
        raise ValueError(f"{where}, got {list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__}.")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{where}, got NaN or infinity.")
    return scores.detach().double()


def decision(group: ChannelGroup, m: int, recipe: Recipe, unwanted: str | None) -> Decision:
    mixing = "mixed" if recipe.reducer.mixes else "selected"
    if recipe.reducer.mixes and group.unmixable:
        mixing = f"selected: {group.unmixable}"
    reason = group.reason or unwanted
    kept = group.size if reason else m
    return Decision(group.name, group.size, kept, members_of(group), mixing, reason, group.family, group.depth)


def carry_out(
    model: nn.Module,
    plan: Plan,
    graph: ChannelGraph,
    example_inputs: ExampleInputs,
    *,
    inplace: bool = False,
    progress: Progress = silent,
) -> Compressed:
    """Apply a plan: write the smaller network, run and trace it again, roll back what it does not bear out.

    Raises:
        PlanError: the plan was made for another network.
    """
    inputs = Inputs.of(example_inputs)
    plan.check_fits(graph.shapes, graph)
    progress("prove", 0, 1)
    before = size_of(model, inputs)
    surgery = operate(model, graph, dict(plan.maps), inputs)
    after = size_of(surgery.model, inputs)
    small = Compressed(surgery.model, plan.rolled_back(surgery.rolled_back), before, after, surgery.repairs)
    progress("prove", 1, 1)
    return moved_into(model, small) if inplace else small


def apply(model: nn.Module, plan: Plan, example_inputs: ExampleInputs, *, inplace: bool = False) -> Compressed:
    """Carry out a plan that was made, or loaded, before.

    Raises:
        PlanError: the plan was made for another network.
        ModelError: the network does not run on the example inputs.
    """
    plan.check_fits({n: tuple(t.shape) for n, t in named_tensors(model).items() if t.is_floating_point()})
    return carry_out(model, plan, inspect(model, example_inputs), example_inputs, inplace=inplace)
