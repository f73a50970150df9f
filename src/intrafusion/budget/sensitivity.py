"""How much the output suffers when one group is cut: what the choice of sizes goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of, size_twins
from intrafusion.measure.drift import OutputError
from intrafusion.network.batches import cast_like, double_first
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import select_counted
from intrafusion.network.state import preserve_state
from intrafusion.reduce.pivot import Pivot
from intrafusion.reduce.problem import Moments, Reducer, ReductionMap, ReductionProblem
from intrafusion.reduce.telling import Telling
from intrafusion.restore.calibration import Calibration
from intrafusion.restore.shifts import add_shifts_
from intrafusion.surgery.literals import Literals
from intrafusion.surgery.operate import copy_reduced

_FEW = 64  # images


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What cutting the groups of a network costs its output.

    Attributes:
        scores: importance of the channels, (n,) by group.
        moments: what is read of them, by group, where that is known.
        calibration: what errors are measured on; without one, the example inputs.
        literals: numbers in attributes that follow the sizes.
        teller: what reduces the groups, and tells beforehand what that loses.
    """

    model: nn.Module
    graph: ChannelGraph
    scores: Mapping[str, Tensor]
    moments: Mapping[str, Moments]
    calibration: Calibration | None
    example_inputs: Inputs
    literals: Literals | None = None
    teller: Telling = field(default_factory=lambda: Pivot(rotate=False))

    __repr__ = show_briefly

    def curves(self, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
        r"""Predicted error when a group alone keeps k of its n channels, (n + 1,) for k = 0..n, by group.

        The shape of the curve is the share of the consumers' signal that the first k pivots, or directions, cannot tell
        (or, where no layer that reads the group was seen, the share of the importance given up). Its
        height is measured: every group is halved alone, its consumers make up for the rest as well as they can, and the
        output is compared on a few images. Twins are halved together. OURS.
        """
        curves = {}
        for twins in families_of(groups):
            halves = size_twins(twins, (twins[0].size // twins[0].multiple + 1) // 2)
            height = self.error(halves) / len(twins)
            for g in twins:
                problem = _pose(g, self.scores[g.name], g.size, self.moments.get(g.name))
                shape = _find_shape(problem, self.teller)
                curves[g.name] = shape * (height / max(float(shape[halves[g.name]]), 1e-3))
        return curves

    def error(self, sizes: Mapping[str, int]) -> float:
        """Mean squared difference of the outputs, as a fraction of their variance, when groups have these sizes."""
        smaller = {g: sizes[g.name] for g in self.graph.groups if sizes.get(g.name, g.size) < g.size}
        maps = {
            g.name: self.teller(_pose(g, self.scores[g.name], m, self.moments.get(g.name))) for g, m in smaller.items()
        }
        return _measure_cut_error(self._reference, self.graph, maps, self.literals, self._seen)

    @property
    def _reference(self) -> nn.Module:
        return self.model if self.calibration is None else self.calibration.reference

    @cached_property
    def _seen(self) -> list[tuple[Inputs, list[Tensor]]]:
        """A few images in batches, and what the network as it is to be seen gives on them."""
        if self.calibration is not None:
            return [(call, _run_floats(self._reference, call)) for call in self.calibration.images.take(_FEW)]
        varied = self.example_inputs.varied()
        try:
            return [(varied, _run_floats(self.model, varied))]
        except ModelError:  # it takes these values only
            return [(self.example_inputs, _run_floats(self.model, self.example_inputs))]


def _pose(group: ChannelGroup, scores: Tensor, m: int, moments: Moments | None) -> ReductionProblem:
    return ReductionProblem(scores[:, None], scores, m, moments=moments, linear=group.linear, rotation=group.rotation)


def _find_shape(problem: ReductionProblem, teller: Telling) -> Tensor:
    """Falls from 1 for no channel to 0 for all, (n + 1,)."""
    losses = teller.list_losses(problem)
    if losses is not None:
        return losses
    ranked = problem.importance.clamp(min=0).sort(descending=True).values
    return 1 - torch.cat([ranked.new_zeros(1), ranked.cumsum(0)]) / ranked.sum().clamp(min=1e-300)


def choose_teller(reducer: Reducer) -> Telling:
    """What predicts the loss where it is known what is read: the reducer itself if it can, or pivots."""
    if not isinstance(reducer, Telling):
        return Pivot(rotate=False)
    return replace(reducer, unmerge=True, rotate=reducer.rotates)


def _measure_cut_error(
    model: nn.Module,
    graph: ChannelGraph,
    maps: Mapping[str, ReductionMap],
    literals: Literals | None,
    seen: Sequence[tuple[Inputs, list[Tensor]]],
) -> float:
    """Mean squared difference of the outputs as a fraction of their variance; 1 where such a network does not run."""
    small = copy_reduced(model, graph, maps, literals)
    add_shifts_(small, model, graph, maps)
    error = OutputError()
    try:
        for images, expected in seen:
            error.add(_run_floats(small, images), expected)
    except ModelError:
        return 1.0
    return error.value


def _run_floats(model: nn.Module, images: Inputs) -> list[Tensor]:
    """What counts of the floating outputs; rows of padded tokens do not."""
    call = double_first(images)
    with preserve_state(model):
        found = [t for t in cast_like(call, model).call(model) if t.is_floating_point()]
    return select_counted(found, call.weights)
