"""How much the output suffers when one group is cut: what the choice of sizes goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.measure.drift import output_error
from intrafusion.network.batches import cast_like, take_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.reduce.pivot import least_squares_map, pick_channels
from intrafusion.reduce.problem import Moments, ReductionMap
from intrafusion.reduce.select import most_important, selection_map
from intrafusion.restore.calibration import Calibration
from intrafusion.restore.shifts import add_shifts_
from intrafusion.surgery.operate import copy_reduced

_FEW = 64  # images


def measure_error_curves(
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    calibration: Calibration | None,
) -> dict[str, Tensor]:
    r"""Predicted error of the output when a group alone keeps k of its n channels, (n + 1,) for k = 0..n, by group.

    The shape of the curve is the share of the consumers' signal that the first k pivots cannot tell (or, where no layer
    that reads the group was seen, the share of the importance given up). Its height is measured: every group is halved
    alone, its consumers make up for the rest as well as they can, and the output is compared on a few images. Twins
    are halved together. Without a calibration the heights are 1. OURS.
    """
    shapes = {g.name: _find_shape(scores[g.name], moments.get(g.name)) for g in groups}
    if calibration is None:
        return shapes
    images = take_images(calibration.images, 0, _FEW)
    expected = _run_floats(calibration.reference, images)
    curves = {}
    for twins in families_of(groups):
        maps = {g.name: _halve(scores[g.name], moments.get(g.name)) for g in twins if g.size > 1}
        height = _measure_cut_error(calibration.reference, graph, maps, images, expected) / len(twins)
        for g in twins:
            at_half = float(shapes[g.name][(g.size + 1) // 2])
            curves[g.name] = shapes[g.name] * (height / max(at_half, 1e-3))
    return curves


def _find_shape(scores: Tensor, moments: Moments | None) -> Tensor:
    """Falls from 1 for no channel to 0 for all, (n + 1,)."""
    if moments is not None:
        return pick_channels(moments).missing
    ranked = scores.clamp(min=0).sort(descending=True).values
    return 1 - torch.cat([ranked.new_zeros(1), ranked.cumsum(0)]) / ranked.sum().clamp(min=1e-300)


def _halve(scores: Tensor, moments: Moments | None) -> ReductionMap:
    m = (len(scores) + 1) // 2
    if moments is None:
        return selection_map(most_important(scores, m), len(scores))
    return least_squares_map(*moments.overall, pick_channels(moments).order[:m].sort().values)


def _measure_cut_error(
    model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap], images: Inputs, expected: list[Tensor]
) -> float:
    """Mean squared difference of the outputs as a fraction of their variance; 1 where such a network does not run."""
    small = copy_reduced(model, graph, maps)
    add_shifts_(small, model, graph, maps)
    try:
        found = _run_floats(small, images)
    except ModelError:
        return 1.0
    return output_error(found, expected)


def _run_floats(model: nn.Module, images: Inputs) -> list[Tensor]:
    with preserve_state(model):
        return [t for t in cast_like(images, model).call(model) if t.is_floating_point()]
