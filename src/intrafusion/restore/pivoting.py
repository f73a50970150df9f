"""Plans by pivoting: which channels of each group are kept, and how its consumers make up for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from intrafusion.batches import Images
from intrafusion.graph import ChannelGraph, Member
from intrafusion.inputs import ExampleInputs
from intrafusion.plan import Plan
from intrafusion.reduce.pivot import least_squares_map, pivots
from intrafusion.reduce.problem import ReductionMap
from intrafusion.reduce.select import selection_map
from intrafusion.restore.layers import Layer, output_map, solvable
from intrafusion.restore.least_squares import Reduced
from intrafusion.restore.moments import Moments, gaussian, measured, points


@dataclass(frozen=True, eq=False)
class Pivoted:
    """A plan in which pivoting chose the channels, and the constants that its consumers are owed.

    Attributes:
        shifts: s (n,) of each group, see `add_shifts_`.
        missing: share of the consumers' signal that k channels cannot tell, for k = 0..m, by group.
    """

    plan: Plan
    shifts: Mapping[str, Tensor]
    missing: Mapping[str, Tensor]


@dataclass(frozen=True)
class Pivot:
    """Replaces the maps of a plan, sizes unchanged, by pivoted selections and least-squares unmerges.

    With images the moments are measured; without, they come from the norms, and groups for which they cannot be known
    (residual streams, groups without a norm) keep the maps they have.

    Attributes:
        strength: of the ridge of the unmerge, as a fraction of the channels' mean variance.
        reach: of the spatial prior without images, in pixels.
        samples: Gaussian samples per group without images.
        rows: sampled places per layer with images.
        unmerge: mix the consumers' columns; False only selects.
    """

    strength: float = 1e-3
    reach: float = 1.0
    samples: int = 8_000
    rows: int = 20_000
    unmerge: bool = True
    seed: int = 0

    needs_data = False  # of the class, not a hyper-parameter

    def __call__(
        self,
        plan: Plan,
        model: nn.Module,
        graph: ChannelGraph,
        example_inputs: ExampleInputs,
        images: Images | None = None,
    ) -> Pivoted:
        """Choose the channels of every reduced group of a plan for `model`; neither is modified."""
        moments = self.moments(model, graph, example_inputs, images)
        maps, shifts, missing = dict(plan.maps), {}, {}
        for name in plan.maps.keys() & moments.keys():
            m = len(plan.maps[name].merge)
            maps[name], shifts[name], missing[name] = self.solve(moments[name], m)
        return Pivoted(replace(plan, maps=maps), shifts, missing)

    def moments(
        self, model: nn.Module, graph: ChannelGraph, example_inputs: ExampleInputs, images: Images | None
    ) -> dict[str, Moments]:
        if images is not None:
            return measured(model, graph, images, rows=self.rows, seed=self.seed)
        return gaussian(model, graph, example_inputs, reach=self.reach, samples=self.samples, seed=self.seed)

    def solve(self, moments: Moments, m: int) -> tuple[ReductionMap, Tensor, Tensor]:
        """The map of one group, its shift, and what is missing after each pick."""
        found = pivots(moments.covariances, [moments.reader] * len(moments.covariances), m)
        kept = found.order.sort().values
        mean, covariance = moments.overall
        if self.unmerge:
            return *least_squares_map(mean, covariance, kept, self.strength), found.missing
        reduction = selection_map(kept.to(mean.device), len(mean))
        return reduction, mean - reduction.unmerge @ mean[kept], found.missing


def add_shifts_(compressed: Reduced, reference: nn.Module, graph: ChannelGraph, shifts: Mapping[str, Tensor]) -> None:
    """Give every consumer the constant it is owed: the sum over its original kernel of W_c s (in place).

    It goes to the consumer's bias or to the norm behind it; a consumer with neither gets none. At the border of padded
    images the constant is that of the inside.
    """
    originals, layers = solvable(reference, graph), solvable(compressed.model, graph)
    for group in graph.groups:
        if group.name in compressed.plan.maps and group.name in shifts:
            for original, member in points(group, originals):
                if original.name in layers:
                    layer = layers[original.name]
                    owed = constant(original, member, shifts[group.name])
                    merge = output_map(original, graph, compressed.plan.maps)
                    owed = owed if merge is None else owed @ merge.T
                    layer.add_(torch.zeros_like(layer.module.weight), layer.before_norm(owed)[0])


def constant(layer: Layer, member: Member, shift: Tensor) -> Tensor:
    """What inputs that are `shift` everywhere change of a layer's output, after its norm, (1, c) float64."""
    weight = layer.module.weight.detach().double()
    columns = weight.reshape(*weight.shape[:2], -1).sum(2)[:, torch.from_numpy(member.positions).to(weight.device)]
    return layer.after_norm((columns.sum(2) @ shift.to(weight.device))[None])
