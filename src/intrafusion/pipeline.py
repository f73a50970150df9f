"""The whole method on one screen: trace, verify, decide, reduce, prove, restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.measure.size import size_of
from intrafusion.network.batches import ImagesLike, make_reusable
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.plan import Plan
from intrafusion.planning import decide
from intrafusion.progress import Progress, silent
from intrafusion.recipe import Keep, Recipe
from intrafusion.reduce import Reducer
from intrafusion.restore import Calibration, add_shifts_
from intrafusion.restore.steps import calibrate_for, run_restorers
from intrafusion.surgery.operate import operate
from intrafusion.surgery.permute import verify_groups
from intrafusion.surgery.write import write_weights_
from intrafusion.trace import trace

_UNFIT = {
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
        min_channels: no group becomes smaller than this.
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
        RecipeError: a method, a hyper-parameter or another option that means nothing.
    """
    said = locals()
    recipe = Recipe.of(**{name: said[name] for name in Recipe.options()})
    inputs = Inputs.of(example_inputs)
    graph = inspect(model, inputs, progress=progress)
    small = follow(recipe, model, graph, inputs, images, progress=progress)
    return _move_into(model, small) if inplace else small


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
    """Do what a recipe says to a network that was inspected before: decide, apply, restore.

    Args:
        calibration: instead of the one that the recipe would make, for several recipes on one network.
    """
    recipe.refuse_foreign()
    inputs, images = Inputs.of(example_inputs), make_reusable(images)
    calibration = calibration or calibrate_for(model, graph, inputs, recipe, images, progress=progress)
    plan = decide(model, graph, recipe, inputs, calibration=calibration, images=images, progress=progress)
    small = apply(model, plan, inputs, graph=graph, progress=progress)
    return run_restorers(small, model, graph, calibration, images, progress=progress)


def _move_into(model: nn.Module, small: Compressed) -> Compressed:
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
        if tensor.device.type in _UNFIT:
            raise ModelError(
                f"{name}: expected weights on the CPU or a GPU, got {tensor.device}: {_UNFIT[tensor.device.type]}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{name}: expected finite weights, got NaN or infinity; the network was saved broken, load another."
            )


def _check_written(small: nn.Module, model: nn.Module) -> None:
    """
    Raises:
        ModelError: a tensor has no finite entries any more, where it had.
    """
    originals = named_tensors(model)
    for name, tensor in named_tensors(small).items():
        broken = tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        if broken and bool(torch.isfinite(originals[name]).all()):
            raise ModelError(
                f"{name}: the reduced weights are too large for {tensor.dtype}: expected finite ones, got NaN or "
                "infinity; use model.double(), rescale the network, or reduce with another reducer."
            )


def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs,
    *,
    graph: ChannelGraph | None = None,
    inplace: bool = False,
    progress: Progress = silent,
) -> Compressed:
    """Carry out a plan that was decided, or loaded, before, and nothing else: no restorer of its recipe runs.

    The smaller network is written, run and traced again; what it does not bear out is rolled back.

    Args:
        graph: what `inspect` found in this network; None: it is inspected now.
        inplace: write the smaller weights into `model` itself.
    Raises:
        PlanError: the plan was made for another network.
        ModelError: the network does not run on the example inputs.
    """
    inputs = Inputs.of(example_inputs)
    if graph is None:
        plan.check_fits({n: tuple(t.shape) for n, t in named_tensors(model).items() if t.is_floating_point()})
        graph = inspect(model, inputs)
    plan.check_fits(graph.shapes, graph)
    progress("prove", 0, 1)
    before = size_of(model, inputs)
    surgery = operate(model, graph, dict(plan.maps), inputs)
    plan = plan.rolled_back(surgery.rolled_back)
    add_shifts_(surgery.model, model, graph, plan.maps)
    _check_written(surgery.model, model)
    after = size_of(surgery.model, inputs)
    small = Compressed(surgery.model, plan, before, after, inputs, surgery.repairs, rolled_back=surgery.rolled_back)
    progress("prove", 1, 1)
    return _move_into(model, small) if inplace else small
