"""Layers that become two thinner ones where that is worth it, or fewer channels alone: the better is taken."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from intrafusion.application import apply
from intrafusion.budget.rank_curves import list_unsaving
from intrafusion.budget.sensitivity import judge_network
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.inspection import inspect
from intrafusion.network.held_out import Split
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import copy_model
from intrafusion.plan import is_miss
from intrafusion.planning import choose_split, make_plan, warn_of_misses
from intrafusion.recipe import Recipe
from intrafusion.restore import Calibration
from intrafusion.surgery.lowrank import ranks_of, split_provably

_Candidate = tuple[Compressed, nn.Module, ChannelGraph, Calibration | None]
"""A network before its layers are solved, and what it was made of, which may have layers as two of full rank."""


def carry_out_best(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    images: Split,
    calibration: Calibration | None,
) -> _Candidate:
    """Layers become two, in one budget with the channels; or, where a target may choose, fewer channels alone.

    Both are tried on inputs that nothing was measured on, the layers solved, and the better one is taken.
    """
    plain = None
    if recipe.ranks is True:
        plan = make_plan(model, graph, recipe, inputs, calibration=calibration, images=images.seen)
        plain = apply(model, plan, inputs, graph=graph), model, graph, calibration
    split = _factorise(recipe, model, graph, inputs, images, calibration)
    best, note = _choose_candidate(plain, split, solves=bool(recipe.levels))
    warn_of_misses(best[0].plan)
    return replace(best[0], notes=(*best[0].notes, note)) if note else best[0], *best[1:]


def _factorise(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    images: Split,
    calibration: Calibration | None,
) -> _Candidate | None:
    """With those layers as two for which that is worth it; None if there are none.

    Those whose rank turns out to save no weights, or cannot become lower, are left as they are.
    """
    names = choose_split(model, graph, recipe, inputs, calibration, images.seen)
    while names:
        core, proved = split_provably(model, names, inputs, graph)
        if not proved:
            return None
        own, known = inspect(core, inputs), None if calibration is None else calibration.seen_by(core)
        split = {name: rank for name, rank in ranks_of(core).items() if name in proved}
        plan = make_plan(core, own, recipe, inputs, calibration=known, images=images.seen, split=split, original=model)
        small = apply(core, plan, inputs, graph=own)
        idle = list_unsaving(small.model, split)
        if not idle:
            return small, core, own, known
        names = [name for name in proved if name not in idle]
    return None


def _choose_candidate(
    plain: _Candidate | None, split: _Candidate | None, *, solves: bool
) -> tuple[_Candidate, str | None]:
    """The better one of one or two, and what is to be said of it.

    Raises:
        ModelError: there is none.
    """
    if split is None and plain is None:
        raise ModelError("ranks: no layer saves anything as two, or nothing has to be saved; give less, or use keep=.")
    if split is None or plain is None:
        found = plain or split
        assert found is not None
        return found, "ranks: no layer is worth two, so only channels are fewer." if split is None else None
    missed = [any(map(is_miss, one[0].plan.warnings)) for one in (plain, split)]
    if missed[0] != missed[1]:
        return (split, _LOWERED) if missed[0] else (plain, _NARROWED)
    errors = [_judge_candidate(one, solves=solves) for one in (plain, split)]
    if errors[1] < _WORTH * errors[0]:
        return split, f"ranks: layers become two, as that changes the output less ({_compare(*errors)})."
    return plain, f"ranks: no layer becomes two, as that gains too little: the output changes {_compare(*errors)}."


_WORTH = 0.95  # of the error of fewer channels alone: two layers are slower than one of as many MACs, and images few
_LOWERED = "ranks: layers become two, as fewer channels alone miss the target."
_NARROWED = "ranks: no layer becomes two, as only fewer channels meet the target."


def _judge_candidate(one: _Candidate, *, solves: bool) -> float:
    small, model, graph, calibration = one
    trial = replace(small, model=copy_model(small.model))
    return judge_network(trial, model, graph, calibration, solves=solves)


def _compare(error: float, other: float) -> str:
    return f"by {other:.2g} of its variance instead of {error:.2g}"
