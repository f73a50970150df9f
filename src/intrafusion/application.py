"""A plan carried out and proved; what it does not bear out is rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from intrafusion.arguments import checked
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph, families_of
from intrafusion.inspection import inspect, make_workable, prepare_model
from intrafusion.measure.size import size_of
from intrafusion.names import name_some
from intrafusion.network.apart import uninterrupted
from intrafusion.network.identity import identify
from intrafusion.network.inputs import ExampleInputs
from intrafusion.network.provenance import keep_config_
from intrafusion.network.tensors import named_tensors
from intrafusion.network.wrappers import (
    check_inplace,
    holds_inference_tensors,
    note_unwrapped,
    outside_inference,
    unwrap,
    wrap_like,
)
from intrafusion.plan import Plan
from intrafusion.progress import ShowProgress, report, shows_progress
from intrafusion.recipe import Recipe
from intrafusion.restore import add_shifts_
from intrafusion.restore.restorer import ReducedNetwork
from intrafusion.surgery.configuration import fit_config_, take_config_, tie_by_config
from intrafusion.surgery.idle_sizes import fit_idle_sizes_
from intrafusion.surgery.lowrank import split_exactly
from intrafusion.surgery.operate import Surgery
from intrafusion.surgery.optimizers import carry_state_
from intrafusion.surgery.proof import Reference, carry_out
from intrafusion.surgery.untie import tell_of_untying
from intrafusion.surgery.write import Repair, make_repairs_, write_weights_


@checked
@outside_inference
@shows_progress("apply")
def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs,
    *,
    graph: ChannelGraph | None = None,
    inplace: bool = False,
    progress: ShowProgress = None,
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
    whole, inputs = make_workable(model, inplace=inplace), plan.recipe.call_of(example_inputs)
    if plan.recipe.untie and inplace:
        raise RecipeError("untie: expected a copy to be made, got inplace=True too; leave it out.")
    if plan.split and inplace:
        raise RecipeError("ranks: expected a copy to be made, got inplace=True too; leave it out.")
    untied = prepare_model(whole, plan.recipe, inputs)
    core = split_exactly(untied, plan.split) if plan.split else untied
    if graph is None:
        plan.check_fits({n: tuple(t.shape) for n, t in named_tensors(core).items() if t.is_floating_point()})
        graph = inspect(core, inputs)
    plan.check_fits(graph.shapes, graph)
    graph = tie_by_config(graph, core) if plan.recipe.uniform else graph
    report("checking the smaller network", 0)
    first = whole if plan.split else core
    before = size_of(first, inputs)
    surgery, plan, unsaid = _carry_out_said(plan, core, graph, Reference(core, graph, inputs))
    after = size_of(surgery.model, inputs)
    small = Compressed(
        *(surgery.model, plan, before, after, inputs, surgery.repairs),
        rolled_back=surgery.rolled_back,
        original=identify(first),
        notes=(
            *_tell_of_numbers(surgery.numbers),
            *_tell_of_outputs(plan.recipe),
            *([_tell_of_config(unsaid, plan.recipe)] if unsaid else []),
        ),
    )
    small = small if untied is whole else count_ties(small, whole, untied)
    report("checking the smaller network", 1)
    return move_into(model, small, graph) if inplace else wrap_result(model, small)


def wrap_result(model: nn.Module, small: Compressed) -> Compressed:
    """The smaller network in what the original one came in."""
    return replace(small, model=wrap_like(model, small.model), notes=(*small.notes, *note_unwrapped(model)))


def count_ties(small: Compressed, model: nn.Module, untied: nn.Module) -> Compressed:
    """With the size that the network had before it was untied, and what is to be said of that."""
    if not small.plan.recipe.untie:
        return small
    before = small.before if untied is model else size_of(model, small.inputs)
    return replace(small, before=before, notes=(*small.notes, tell_of_untying(model, untied)))


def move_into(model: nn.Module, small: Compressed, graph: ChannelGraph) -> Compressed:
    """The smaller weights in the original's own parameters; optimizers of these go on."""
    check_inplace(model)
    core = unwrap(model)
    with uninterrupted():
        notes = carry_state_(core, graph, small.plan.maps)
        with torch.inference_mode(inference := holds_inference_tensors(core)):  # tensors of that mode stay such
            new = {n: t.data.clone() if inference else t.data for n, t in named_tensors(small.model).items()}
            write_weights_(core, new)
        make_repairs_(core, small.repairs)
        keep_config_(core, core)
        take_config_(core, small.model)
    return replace(small, model=model, notes=(*small.notes, *notes))


def make_reduced(plan: Plan, reference: Reference) -> ReducedNetwork:
    """What a plan makes, to be judged or chosen on: with no size, note or configuration."""
    surgery, plan = _carry_out_proved(plan, reference)
    add_shifts_(surgery.model, reference.model, reference.graph, plan.maps)
    return ReducedNetwork(surgery.model, plan, reference.inputs)


def _carry_out_proved(plan: Plan, reference: Reference) -> tuple[Surgery, Plan]:
    """And the plan as it was carried out."""
    done = carry_out(reference, dict(plan.maps))
    told = plan.rolled_back(done.surgery.rolled_back)
    return done.surgery, told.proved(done.surgery.maps, done.check.proved, done.unturned)


def _carry_out_said(
    plan: Plan, model: nn.Module, graph: ChannelGraph, reference: Reference
) -> tuple[Surgery, Plan, str | None]:
    """A plan carried out; of uniform sizes without those from which what the configuration builds derives something.

    Tied embeddings of T5, whose outputs are scaled by the width that the configuration says, are such.
    """
    surgery, done, unsaid = _carry_out(plan, model, graph, reference)
    if not plan.recipe.uniform or unsaid is None:
        return surgery, done, unsaid
    families = families_of(group for group in graph.groups if group.name in done.maps)
    for family in sorted(families, key=lambda groups: -sum(len(group.members) for group in groups)):
        reasons = {group.name: f"uniform: with fewer of these, {unsaid}" for group in family}
        tried, other, why = _carry_out(plan.rolled_back(reasons), model, graph, reference)
        if why is None and other.sizes:
            return replace(tried, rolled_back={**tried.rolled_back, **reasons}), other, None
    return surgery, done, unsaid


def _carry_out(
    plan: Plan, model: nn.Module, graph: ChannelGraph, reference: Reference
) -> tuple[Surgery, Plan, str | None]:
    """And why no configuration says the sizes of the smaller network."""
    surgery, plan = _carry_out_proved(plan, reference)
    idle = fit_idle_sizes_(model, surgery.model, reference.inputs)
    surgery = replace(surgery, repairs=(*surgery.repairs, *idle))
    add_shifts_(surgery.model, model, graph, plan.maps)
    _check_written(surgery.model, model)
    keep_config_(surgery.model, model)
    return surgery, plan, fit_config_(surgery.model, reference.inputs) if plan.sizes else None


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


def _tell_of_numbers(numbers: Sequence[Repair]) -> tuple[str, ...]:
    """What the example cannot tell: whether a number that follows the channels means something else elsewhere."""
    if not numbers:
        return ()
    shown = name_some([f"{r.module}.{r.attribute} {r.old} -> {r.new}".lstrip(".") for r in numbers])
    return (
        f"numbers in attributes follow the channels: {shown}. If one is also a length or a number of pixels, which the "
        "example did not show, exclude these layers.",
    )


def _tell_of_config(why: str, recipe: Recipe) -> str:
    if recipe.ranks is not False:
        advice = "no configuration says that a layer is two; leave ranks out for one that does"
    elif recipe.uniform:
        advice = (
            "the sizes are such as it says, but its code derives something from them: exclude= what has to stay, most "
            "often the stream (the layers that embed)"
        )
    else:
        advice = "uniform=True makes sizes that a configuration says"
    return f"intrafusion.load is needed, not from_pretrained: {why}; {advice}"


def _tell_of_outputs(recipe: Recipe) -> tuple[str, ...]:
    if recipe.outputs is None:
        return ()
    named = name_some([str(name) for name in recipe.outputs])
    return (f"of the network's outputs only {named} was kept; the others may have other values and shapes.",)
