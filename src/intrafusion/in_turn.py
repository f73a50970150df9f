"""Channels chosen in turn, from the input on: each as it is read in the network that the choices before it left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from intrafusion.application import make_reduced
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.inspection import inspect
from intrafusion.network.batches import ImagesLike
from intrafusion.network.inputs import Inputs
from intrafusion.plan import Plan, at_sizes
from intrafusion.planning import decide
from intrafusion.progress import prefix_stages
from intrafusion.restore.calibration import Calibration
from intrafusion.surgery.proof import Reference

_TURNS = 6  # on `cifar10_resnet20`, of 12 groups, outputs are as close as with a turn for each
_UNSOLVED = (
    "order forward: channels were chosen as with joint, as no layers are solved between; give inputs=, and leave "
    "restore='auto'"
)


def choose_in_turn(
    plan: Plan,
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    *,
    calibration: Calibration | None = None,
    images: ImagesLike | None = None,
) -> Plan:
    """The plan of the order "forward": the sizes of this one, with other channels.

    Groups are parted in six, in the order in which the network runs. The first stay as they were chosen. Then the
    network is made in which all that were chosen are fewer, its layers are solved for the original's outputs, and the
    next are chosen by what is read of them there.
    OURS: as sequential pruning does (ThiNet, Luo et al. 2017), with layers solved in between.

    Args:
        plan: of `model`, all groups chosen by what is read of them in it.
    """
    recipe = plan.recipe
    if calibration is None or not recipe.levels:
        return replace(plan, warnings=(*plan.warnings, _UNSOLVED))
    turns = _part([group for group in graph.groups if group.name in plan.maps])
    reference, done = Reference(model, graph, inputs), list[str]()
    for index, names in enumerate(turns):
        if index:
            with prefix_stages(f"turn {index + 1} of {len(turns)}"):
                small = make_reduced(_only(plan, done), reference)
                calibration.restore(small, model, graph, lambda _: None)
                sized = at_sizes(recipe, [d for d in plan.decisions if d.group in names])
                asked = replace(sized, uniform=False, include=None, exclude=())  # sizes, and what shrinks, are settled
                seen = calibration.seen_by(small.model)
                found = decide(
                    small.model, inspect(small.model, inputs), asked, inputs, calibration=seen, images=images
                )
            plan = _taking(plan, found, names)
        done += names
    return plan


def _part(groups: Sequence[ChannelGroup]) -> list[Sequence[str]]:
    """Their names in at most six parts, about equal; those that keep one size stay together."""
    families = families_of(groups)
    edges = [k * len(families) // _TURNS for k in range(_TURNS + 1)]
    return [[group.name for family in families[a:b] for group in family] for a, b in pairwise(edges) if a < b]


def _only(plan: Plan, names: Sequence[str]) -> Plan:
    """Where only these become fewer."""
    return plan.rolled_back({name: "not chosen yet" for name in plan.maps if name not in names})


def _taking(plan: Plan, found: Plan, names: Sequence[str]) -> Plan:
    """With the choice of another plan for these, as far as it has one."""
    chosen = {d.group: d for d in found.decisions if d.group in names and d.group in found.maps}
    decisions = tuple(replace(d, mixing=chosen[d.group].mixing) if d.group in chosen else d for d in plan.decisions)
    return replace(plan, decisions=decisions, maps={**plan.maps, **{name: found.maps[name] for name in chosen}})
