"""The choice of a reducer: candidates make the network smaller, are solved on a part of the inputs, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from intrafusion.application import make_reduced
from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.importance import get_importance
from intrafusion.in_turn import choose_in_turn
from intrafusion.measure.closeness import Closeness, Yardstick
from intrafusion.measure.comparison import percent
from intrafusion.names import name_some
from intrafusion.network.batches import ImagesLike
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.plan import Plan, at_sizes
from intrafusion.planning import decide
from intrafusion.progress import prefix_stages
from intrafusion.recipe import Recipe
from intrafusion.reduce import Auto, get_reducer
from intrafusion.restore.calibration import Calibration
from intrafusion.restore.restorer import ReducedNetwork
from intrafusion.surgery.proof import Reference

_SOLVED_ON, _MEASURED_ON = 64, 128  # images, at most; a third of them and the others
_FEWEST = 16  # images of each kind
_STEPS = 1  # of the solver towards what activation functions give; three tell the same of candidates


def decide_best(
    model: nn.Module,
    graph: ChannelGraph,
    recipe: Recipe,
    inputs: Inputs,
    *,
    calibration: Calibration | None = None,
    images: ImagesLike | None = None,
) -> Plan:
    """What `decide` gives; where the reducer is "auto", of the candidate that harms the outputs least.

    Sizes are chosen once. Each candidate is carried out at these, its layers are solved on a third of the images, at
    most 64, and its outputs compared on others, at most 128: those that were held out of made images, else the rest.
    What is printed names the winner and what the others were off by. In the order "forward" the winner's channels are
    chosen in turn then, see `choose_in_turn`.
    """
    joint = replace(recipe, order="joint") if recipe.order == "forward" else recipe
    if isinstance(recipe.reducer, Auto):
        plan, said = _decide_by_contest(recipe.reducer.candidates, model, graph, joint, inputs, calibration, images)
    else:
        plan, said = decide(model, graph, joint, inputs, calibration=calibration, images=images), ()
    if recipe.order == "forward":
        plan = choose_in_turn(plan, model, graph, inputs, calibration=calibration, images=images)
    return replace(plan, recipe=recipe, warnings=(*plan.warnings, *said))


def _decide_by_contest(
    names: Sequence[str],
    model: nn.Module,
    graph: ChannelGraph,
    recipe: Recipe,
    inputs: Inputs,
    calibration: Calibration | None,
    images: ImagesLike | None,
) -> tuple[Plan, tuple[str]]:
    """The plan of the winner, and what is said of that."""
    plan_of = lambda asked: decide(model, graph, asked, inputs, calibration=calibration, images=images)  # noqa: E731
    first = plan_of(_recipe_for(names[0], recipe))
    contest = _Contest.of(model, graph, inputs, recipe, calibration)
    if isinstance(contest, str) or len(names) == 1 or not first.sizes:
        why = contest if isinstance(contest, str) else "there is nothing to choose"
        return first, (f"reducer auto: {names[0]}, as {why}.",)
    sized = [d for d in first.decisions if d.reason is None]
    plans = [first, *(plan_of(at_sizes(_recipe_for(name, recipe), sized)) for name in names[1:])]
    errors = list[float]()
    for index, plan in enumerate(plans):
        with prefix_stages(f"candidate {index + 1} of {len(plans)}"):
            errors.append(contest.measure(plan))
    best = min(range(len(names)), key=lambda k: (math.isnan(errors[k]), errors[k]))
    said = _describe(names, errors, best, contest, plans[best])
    return replace(plans[best], warnings=first.warnings), (said,)


def _recipe_for(name: str, recipe: Recipe) -> Recipe:
    """The recipe with a candidate in the place of "auto"."""
    if name != "magnitude":
        return replace(recipe, reducer=get_reducer(name))
    alike = get_importance({"name": "l2", "member_normalizer": "mean", "folded": True})
    return replace(recipe, reducer=get_reducer("select"), importance=alike)


def _describe(names: Sequence[str], errors: Sequence[float], best: int, contest: _Contest, plan: Plan) -> str:
    say = lambda error: percent(error) if math.isfinite(error) else "does not run"  # noqa: E731
    others = ", ".join(f"{n} {say(e)}" for k, (n, e) in enumerate(zip(names, errors, strict=True)) if k != best)
    where = f"{contest.yardstick} {contest.how}"
    selected = [d.group for d in plan.decisions if d.reduced and d.mixing.startswith("selected: ")]
    fixed = f"; in groups that must not be mixed it selects: {name_some(selected)}" if selected else ""
    return (
        f"reducer auto: {names[best]}, with which outputs are off by {percent(errors[best])} of their variance on "
        f"{where}; {others}{fixed}."
    )


@dataclass(frozen=True, eq=False)
class _Contest:
    """What candidates are compared by.

    Attributes:
        solved_on: images that their layers are solved on; None: they are compared before anything is restored.
        how: where that is, in words.
    """

    reference: Reference
    calibration: Calibration
    solved_on: Batches | None
    yardstick: Yardstick
    how: str

    __repr__ = show_briefly

    @classmethod
    def of(
        cls, model: nn.Module, graph: ChannelGraph, inputs: Inputs, recipe: Recipe, calibration: Calibration | None
    ) -> _Contest | str:
        """Or why there is none."""
        if calibration is None:
            return "there are no inputs to compare candidates on"
        if not recipe.levels and calibration.is_standardised:
            return "noise tells nothing of a network that is not solved on it; give inputs="
        parts = _part(calibration)
        if parts is None:
            return f"{calibration} are too few to compare candidates on"
        solved_on, apart = parts if recipe.levels else (None, parts[1])
        kind = calibration.kind
        how = "before restoring" if solved_on is None else f"that it was not solved on ({solved_on.count} others)"
        yardstick = Yardstick(calibration.reference, apart, kind)
        return cls(Reference(model, graph, inputs), calibration, solved_on, yardstick, how)

    def measure(self, plan: Plan) -> float:
        """The output error of a candidate; infinite for one that does not run."""
        made = make_reduced(plan, self.reference)
        try:
            return min(closeness.error for closeness in self._restore(made))
        except ModelError:
            return math.inf

    def _restore(self, made: ReducedNetwork) -> Sequence[Closeness]:
        measure: Callable[[nn.Module], Closeness] = self.yardstick.measure
        if self.solved_on is None:
            return [measure(made.model)]
        known, graph = self.calibration, self.reference.graph
        quick = replace(known.restorer, steps=min(_STEPS, known.restorer.steps))
        return quick.restore(made, known.original, graph, self.solved_on, known.reference, measure)


def _part(calibration: Calibration) -> tuple[Batches, Batches] | None:
    """Images to solve on, and others to measure on; None where there are too few."""
    images, apart = calibration.images, calibration.held_out
    places = torch.arange(images.count)
    if apart is None:
        images, apart = images.part(places[::3]), images.part(places[places % 3 > 0])
    if min(images.count, apart.count) < _FEWEST:
        return None
    return images.take(_SOLVED_ON), apart.take(_MEASURED_ON)
