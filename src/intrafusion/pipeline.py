"""The whole method on one screen: trace, verify, decide, reduce, prove, restore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.budget import uniform_sizes
from intrafusion.budget.sensitivity import error_curves
from intrafusion.budget.target import sizes_for_target
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup
from intrafusion.importance.features import channel_biases, channel_features
from intrafusion.measure.size import size_of
from intrafusion.network.batches import ImagesLike, make_reusable
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.observe.moments import measured
from intrafusion.observe.observe import observe_for
from intrafusion.plan import Decision, Plan, describe_members
from intrafusion.progress import Progress, silent
from intrafusion.recipe import Keep, Recipe
from intrafusion.reduce import Moments, Reducer, ReductionMap, ReductionProblem, Select
from intrafusion.restore import Calibration, add_shifts_
from intrafusion.restore.steps import calibration_for, restored
from intrafusion.selectors import find_left_alone
from intrafusion.surgery.maps import hollow_
from intrafusion.surgery.norms import fold_norms
from intrafusion.surgery.operate import operate
from intrafusion.surgery.permute import verify_groups
from intrafusion.surgery.write import write_weights_
from intrafusion.trace import trace

UNFIT = {
    "meta": "it holds no values there; load its weights first",
    "mps": "that has no float64, in which maps are solved and proved; use model.cpu(), and move the result back",
}
"""Devices that a network cannot be on, and why."""


def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Keep | None = None,
    *,
    target: Mapping[str, float] | None = None,
    reducer: str | Mapping[str, Any] | Reducer = "pivot",
    importance: Any = "l1",
    restore: Any = "auto",
    images: ImagesLike | None = None,
    round_to: int | None = None,
    min_channels: int = 1,
    include: Any = None,
    exclude: Any = None,
    order: str = "joint",
    seed: int = 0,
    inplace: bool = False,
    progress: Progress = silent,
) -> Compressed:
    """Make a trained network smaller, without training, and without data unless `images` are given.

    Args:
        model: any eager PyTorch network; not modified unless `inplace`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward call.
        keep: fraction of the channels of every group to keep, in (0, 1], or {name pattern: fraction}; 0.7 by default.
        target: instead of `keep`: {"params": 0.5} or {"macs": 0.5}, fractions of the original's, or {"latency_ms": 3.0}
            on the example inputs; where to cut is then chosen for the least predicted error.
        reducer: "pivot" (the channels that tell most of the others), "intrafusion", "select" (plain pruning), ..., a
            name with hyper-parameters, {"name": "intrafusion", "normalization": "function"}, or any Reducer.
        importance: "l1", "l2", "linf", "random", ..., a name with hyper-parameters, or any callable (group, weights,
            observations) -> (n,) scores; not used by "pivot".
        restore: what is done against the loss: "auto" (the strongest that the images given allow), "images" (least
            squares on those given), "synthetic" (on images made from the network), "noise" (without data, in seconds),
            None, a restorer or its name, or several in order; see `intrafusion.restore`.
        images: a few hundred unlabelled images as the network takes them: a tensor, or any iterable of tensors, tuples
            or dicts, such as a DataLoader.
        round_to: make every size a multiple of this (the nearest, never below it).
        min_channels: with a target, no group becomes smaller than this.
        include: reduce only the channels of these layers: names, patterns, types, functions (name, module) -> bool,
            or a list of such; "name:inputs" or `inputs_of(...)` means what the layers read, else what they produce.
        exclude: leave the channels of these layers alone; as `include`.
        order: "joint" (every group is described by the original weights) or "backward" (one after another from the
            output, each described by what the ones before left; the authors' released code).
        seed: for whatever draws random numbers.
        inplace: write the smaller weights into `model` itself.
    Returns:
        the smaller network with the plan that was carried out; groups that were left alone say why.
    Raises:
        ModelError: the network does not run on the example inputs, holds NaN, or has no group to reduce.
        BudgetError: a keep outside (0, 1], a name that nothing matches, a target that means nothing.
    """
    recipe = Recipe.of(
        keep=keep,
        target=target,
        reducer=reducer,
        importance=importance,
        restore=restore,
        round_to=round_to,
        min_channels=min_channels,
        include=include,
        exclude=exclude,
        order=order,
        seed=seed,
    )
    inputs = Inputs.of(example_inputs)
    graph = inspect(model, inputs, progress=progress)
    small = follow(recipe, model, graph, inputs, images, progress=progress)
    return moved_into(model, small) if inplace else small


def follow(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: ExampleInputs,
    images: ImagesLike | None = None,
    *,
    calibration: Calibration | None = None,
    progress: Progress = silent,
) -> Compressed:
    """Do what a recipe says to a network that was inspected before: decide, carry out, restore.

    Args:
        calibration: instead of the one that the recipe would make, for several recipes on one network.
    """
    inputs, images = Inputs.of(example_inputs), make_reusable(images)
    calibration = calibration or calibration_for(model, graph, inputs, recipe, images, progress=progress)
    plan = decide(model, graph, recipe, inputs, calibration=calibration, images=images, progress=progress)
    small = carry_out(model, plan, graph, inputs, progress=progress)
    return restored(small, model, graph, calibration, images, progress=progress)


def moved_into(model: nn.Module, small: Compressed) -> Compressed:
    """The smaller weights in the original's own parameters."""
    write_weights_(model, {name: tensor.data for name, tensor in named_tensors(small.model).items()})
    return replace(small, model=model)


def inspect(model: nn.Module, example_inputs: ExampleInputs, *, progress: Progress = silent) -> ChannelGraph:
    """Trace a network into channel groups and prove each of them by a permutation."""
    check_weights(model)
    inputs = Inputs.of(example_inputs)
    progress("trace", 0, 2)
    graph = trace(model, inputs)
    progress("trace", 1, 2)
    graph = verify_groups(model, graph, inputs)
    progress("trace", 2, 2)
    return graph


def check_weights(model: nn.Module) -> None:
    for name, tensor in named_tensors(model).items():
        if tensor.device.type in UNFIT:
            raise ModelError(
                f"{name}: expected weights on the CPU or a GPU, got {tensor.device}: {UNFIT[tensor.device.type]}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{name}: expected finite weights, got NaN or infinity; the network was saved broken, load another."
            )


def decide(
    model: nn.Module,
    graph: ChannelGraph,
    recipe: Recipe,
    example_inputs: ExampleInputs | None = None,
    *,
    calibration: Calibration | None = None,
    images: ImagesLike | None = None,
    progress: Progress = silent,
) -> Plan:
    """Score the channels of every group, set its size, and choose its map. Nothing is written.

    Args:
        example_inputs: only needed for a target in MACs or latency.
        calibration: what reducers that look at what is read of the channels, and targets, measure it on.
        images: for criteria that need data.
    Raises:
        ModelError: no group can be reduced; gives the most frequent reasons.
        BudgetError: sizes that are no sizes.
    """
    unwanted = find_left_alone(graph, model, recipe.include, recipe.exclude)
    units = [g for g in graph.groups if g.is_channel]
    groups = [g for g in units if g.reducible and g.name not in unwanted]
    if not groups:
        raise ModelError(nothing_to_reduce(units, unwanted))
    moments = moments_for(graph, recipe, calibration)
    weights = folded_weights(model, graph, groups)
    seen = observe_for(recipe.importance, model, graph, groups, images, seed=recipe.seed)
    scores = lambda g, w: checked_scores(recipe.importance(g, w, seen.get(g.name)), g)  # noqa: E731
    if recipe.target is None:
        wanted, missed = uniform_sizes(groups, recipe.keep, graph, round_to=recipe.round_to), ()
    else:
        curves = error_curves(graph, groups, {g.name: scores(g, weights) for g in groups}, moments, calibration)
        wanted, missed = sizes_for_target(model, graph, groups, curves, recipe, example_inputs)
    maps: dict[str, ReductionMap] = {}
    for index, group in enumerate(in_order(groups, recipe)):
        progress("reduce", index, len(groups))
        if wanted.get(group.name, group.size) < group.size:
            maps[group.name] = solve(group, weights, scores(group, weights), wanted[group.name], recipe, moments)
            if recipe.order == "backward":
                hollow_(weights, group, maps[group.name])
    progress("reduce", len(groups), len(groups))
    decisions = tuple(decision(g, wanted.get(g.name, g.size), recipe, unwanted.get(g.name)) for g in units)
    return Plan(recipe, decisions, graph.shapes, maps, (*graph.warnings, *missed))


def moments_for(graph: ChannelGraph, recipe: Recipe, calibration: Calibration | None) -> Mapping[str, Moments]:
    """What consumers read of the channels, for recipes that look at it."""
    if calibration is None or not (recipe.target or getattr(recipe.reducer, "needs_moments", False)):
        return {}
    if calibration.moments is not None:
        return calibration.moments
    return measured(calibration.reference, graph, calibration.images, seed=recipe.seed)


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
    return fold_norms({name: tensors[name] for name in names}, norms)


def solve(
    group: ChannelGroup,
    weights: dict[str, Tensor],
    scores: Tensor,
    m: int,
    recipe: Recipe,
    moments: Mapping[str, Moments],
) -> ReductionMap:
    """The map of one group; channels that must not be mixed are selected."""
    rows, added = channel_features(group, weights), channel_biases(group, weights)
    problem = ReductionProblem(rows, scores, m, recipe.seed, added, moments.get(group.name))
    reducer = recipe.reducer
    if group.unmixable and reducer.mixes:
        reducer = getattr(reducer, "selecting", Select)()
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
    return Decision(group.name, group.size, kept, describe_members(group), mixing, reason, group.family, group.depth)


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
    plan = plan.rolled_back(surgery.rolled_back)
    add_shifts_(surgery.model, model, graph, plan.maps)
    after = size_of(surgery.model, inputs)
    small = Compressed(surgery.model, plan, before, after, inputs, surgery.repairs, rolled_back=surgery.rolled_back)
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
