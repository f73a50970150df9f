"""Compression in several steps, with training in between where there is any."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from intrafusion.application import count_ties, wrap_result
from intrafusion.arguments import checked
from intrafusion.compressed import Compressed
from intrafusion.errors import BudgetError, RecipeError, show, unknown_name
from intrafusion.graph import ChannelGraph
from intrafusion.inspection import inspect, make_workable, prepare_model
from intrafusion.network.batches import ImagesLike, make_reusable
from intrafusion.network.calibration_images import as_calls, choose_inputs
from intrafusion.network.free_memory import MemoryLike
from intrafusion.network.inputs import ExampleInputs
from intrafusion.network.tensors import named_tensors
from intrafusion.network.texts import Tokenizer
from intrafusion.network.wrappers import outside_inference
from intrafusion.pipeline import reduce_and_restore
from intrafusion.plan import Decision, Plan
from intrafusion.planning import list_sizes
from intrafusion.progress import ShowProgress, prefix_stages, shows_progress
from intrafusion.recipe import Keep, Recipe
from intrafusion.reduce import ReductionMap
from intrafusion.restore.steps import add_comparison, calibrate_for, split_images
from intrafusion.surgery.configuration import tie_by_config
from intrafusion.surgery.expect import shrink_graph
from intrafusion.surgery.memory import hand_on
from intrafusion.surgery.proof import FUNCTION
from intrafusion.surgery.write import Repair
from intrafusion.trace import trace

_MOST_STEPS = 10_000

Train = Callable[[nn.Module], Any]
"""Trains a network in place."""


@partial(checked, leaving=("steps", *Recipe.options()))
@outside_inference
@shows_progress("compress in steps")
def compress_in_steps(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Keep = 0.7,
    steps: int = 4,
    train: Train | None = None,
    *,
    inputs: ImagesLike | None = None,
    images: ImagesLike | None = None,
    tokenizer: Tokenizer | None = None,
    memory: MemoryLike = None,
    progress: ShowProgress = None,
    **options: Any,
) -> Compressed:
    """Make a trained network smaller in several steps, each of which sees the network that the last one left.

    Every group loses the same factor of its channels in each step; after the last it has the size that `compress` gives
    it at once. Each step chooses, reduces and restores anew, measured against the network before it. Without `inputs`,
    they are made once, from the original network.

    Args:
        model: any eager PyTorch network; not modified.
        example_inputs: as `compress`.
        keep: fraction of the channels of the original network to keep, or {name pattern: fraction}.
        steps: at least 1.
        train: called with the smaller network after each step but the last; it trains it in place and must not change
            its shapes. Training what comes back is up to the caller.
        inputs, images, tokenizer, memory: as `compress`.
        options: as `compress`, but for `target` and `inplace`.
    Returns:
        the smaller network, with one plan for the original network: merge M = M_k ... M_1, unmerge U = U_1 ... U_k. It
        is saved and loaded like any other.
    Raises:
        BudgetError: steps < 1, a keep outside (0, 1], a name that nothing matches, a target.
        RecipeError: an option that does not exist, or that means nothing.
        ModelError: as `compress`.
    Reference: Theus et al. 2024, Table 1 (iterative pruning).
    """
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        raise BudgetError(f"steps: expected a whole number from 1 to {_MOST_STEPS}, got {show(steps)}; 4 are usual.")
    _check_options(options)
    if options.get("target") is not None:
        raise BudgetError("target: steps are planned from the sizes in `keep`; give keep, or compress at once.")
    recipe = Recipe.of(keep=keep, **options)
    recipe.refuse_foreign()
    if recipe.ranks is not False:
        raise RecipeError("ranks: layers become two in one step; leave ranks out, or compress at once.")
    whole, example = make_workable(model), recipe.call_of(example_inputs)
    core = prepare_model(whole, recipe, example)
    calls = as_calls(make_reusable(choose_inputs(inputs, images)), core, example, tokenizer)
    split = split_images(calls, core, recipe, memory)
    graph = inspect(core, example)
    graph = tie_by_config(graph, core) if recipe.uniform else graph
    fractions = _schedule(graph, list_sizes(core, graph, recipe), steps)
    calibration = calibrate_for(core, graph, example, recipe, split.seen, tokenizer, memory)
    done: list[Compressed] = []
    present = core
    for index, fraction in enumerate(fractions):
        step = replace(recipe, keep=fraction, round_to=None)
        with prefix_stages(f"step {index + 1} of {steps}"):
            small = reduce_and_restore(
                step, present, graph, example, split, calibration=calibration, tokenizer=tokenizer
            )
        if train is not None and index + 1 < steps:
            _train_between_(small.model, train)
        graph, present = _shrunken_graph(small, graph), small.model
        calibration = None if calibration is None else calibration.seen_by(present)
        done.append(small)
    small = count_ties(_join_steps(done, recipe), whole, core)
    small = replace(small, notes=(*small.notes, *(calls.warn() if calls is not None else ())))
    return wrap_result(model, add_comparison(small, whole, split))


def _check_options(options: Iterable[str]) -> None:
    """Raise RecipeError for one that neither a recipe nor `compress_in_steps` has."""
    for name in options:
        if name not in Recipe.options():
            valid = ({*Recipe.options()} | {*signature(compress_in_steps).parameters}) - {"options", "target"}
            raise RecipeError(f"compress_in_steps: {unknown_name('option', name, valid)}")


def _schedule(graph: ChannelGraph, final: Mapping[str, int], steps: int) -> list[dict[str, float]]:
    """Fractions to keep of what is left, by group, for each step; their products give the final sizes exactly."""
    widths = [{name: width_at(graph[name].size, m, k / steps) for name, m in final.items()} for k in range(steps + 1)]
    return [{name: after[name] / before[name] for name in final} for before, after in itertools.pairwise(widths)]


def width_at(n: int, m: int, share: float) -> int:
    """Between n (share 0) and m (share 1), in equal factors."""
    return max(m, round(n * (m / n) ** share))


def _train_between_(model: nn.Module, train: Train) -> None:
    """Trained in place; modes are left as they were, and no gradients remain."""
    flags = [(module, module.training) for module in model.modules()]
    train(model)
    for module, flag in flags:
        module.training = flag
    for parameter in model.parameters():
        parameter.grad = None


def _shrunken_graph(small: Compressed, graph: ChannelGraph) -> ChannelGraph:
    """The graph of a network that was made from one with this graph; `apply` has proved that it shows it."""
    shapes = {n: tuple(t.shape) for n, t in named_tensors(small.model).items() if n in graph.shapes}
    factors = trace(small.model, small.inputs).factors if graph.factors else ()
    shrunken = replace(shrink_graph(graph, small.plan.sizes), shapes=shapes, factors=factors)
    hand_on(graph, shrunken)
    return shrunken


# ---- several steps as one -------------------------------------------------------------------------------------------


def _join_steps(steps: Sequence[Compressed], recipe: Recipe) -> Compressed:
    """The last step's network, and one plan that leads to it from the first one's."""
    first, last = steps[0], steps[-1]
    maps: dict[str, ReductionMap] = {}
    for step in steps:
        for name, reduction in step.plan.maps.items():
            maps[name] = compose_maps(maps[name], reduction) if name in maps else reduction
    decisions = tuple(_final_decision(d, maps, steps) for d in first.plan.decisions)
    warnings = tuple(dict.fromkeys(w for step in steps for w in step.plan.warnings))
    return replace(
        last,
        plan=Plan(recipe, decisions, first.plan.shapes, maps, warnings, first.plan.fixed),
        before=first.before,
        original=first.original,
        repairs=_join_repairs(steps),
        restored=tuple(r for step in steps for r in step.restored),
        notes=tuple(dict.fromkeys(note for step in steps for note in step.notes)),
    )


def compose_maps(first: ReductionMap, second: ReductionMap) -> ReductionMap:
    """One map for two in turn: x = U_1 x_1 + s_1 and x_1 = U_2 x_2 + s_2 give x = U_1 U_2 x_2 + s_1 + U_1 s_2."""
    shift, scales = first.shift, [m.scale for m in (first, second) if m.scale is not None]
    if second.shift is not None:
        moved = first.unmerge @ second.shift
        shift = moved if shift is None else shift + moved
    scale = torch.stack(scales).prod(0) if scales else None
    return ReductionMap(second.merge @ first.merge, first.unmerge @ second.unmerge, shift, scale)


def _final_decision(decision: Decision, maps: Mapping[str, ReductionMap], steps: Sequence[Compressed]) -> Decision:
    """What became of a group in all: its last size, or the reason why it never shrank."""
    if decision.group in maps:
        proofs = [d.proof for step in steps for d in step.plan.decisions if d.group == decision.group and d.proof]
        return replace(decision, m=len(maps[decision.group].merge), reason=None, proof=_find_weakest(proofs))
    reasons = [d.reason for step in steps for d in step.plan.decisions if d.group == decision.group and d.reason]
    return replace(decision, m=decision.n, reason=reasons[0] if reasons else None)


def _find_weakest(proofs: Sequence[str]) -> str | None:
    return next((p for p in proofs if p != FUNCTION), proofs[0] if proofs else None)


def _join_repairs(steps: Sequence[Compressed]) -> tuple[Repair, ...]:
    """Attributes of modules from the first network's values to the last one's."""
    found: dict[tuple[str, str], Repair] = {}
    for step in steps:
        for repair in step.repairs:
            key = repair.module, repair.attribute
            found[key] = replace(repair, old=found[key].old) if key in found else repair
    return tuple(repair for repair in found.values() if repair.old != repair.new)
