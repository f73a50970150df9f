"""What a smaller network is trained for without labels: what the original gives, and what its layers read there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, Role
from intrafusion.network.apart import forked_random_numbers
from intrafusion.network.batches import cast_like, cut_call, double_first, join_batches, pick_images
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs, output_tensors
from intrafusion.network.layers import find_layers, watch_calls
from intrafusion.network.row_weights import select_counted
from intrafusion.network.state import preserve_state
from intrafusion.reduce.problem import ReductionMap, find_picks
from intrafusion.surgery.maps import compose_merges
from intrafusion.surgery.streams import is_turned
from intrafusion.train.views import draw_view, find_plain_images

Reads = dict[tuple[str, int], Tensor]
"""Rows (..., c) that a layer reads, (k, c) of some that count, by its name and how often it ran before in a pass."""

_LOOKED_AT = 4  # calls on which it is found out what varies how much
_KNOWN = 1.0  # share of its variance by which what a layer reads may be off to be worth going on from


@dataclass(frozen=True, eq=False)
class Pool:
    """Inputs to draw from: images of one call, or calls that cannot be one.

    Attributes:
        count: of the images, or of the calls.
    """

    calls: Sequence[Inputs]
    count: int
    joined: bool

    __repr__ = show_briefly

    @classmethod
    def of(cls, inputs: Batches, size: int) -> Pool:
        """
        Args:
            size: images at most in a call, where the network answers them one by one.
        """
        calls = list(inputs)
        if inputs.size is None:
            return cls(calls, len(calls), False)
        try:
            return cls([join_batches(calls)], inputs.count, True)
        except ModelError:  # of several shapes
            parts = [part for call in calls for part in cut_call(call, size)]
            return cls(parts, len(parts), False)

    def pick(self, places: Tensor) -> Inputs:
        """The images, or the one call, at these places."""
        return pick_images(self.calls[0], places) if self.joined else self.calls[int(places[0])]

    def list_first(self) -> Sequence[Inputs]:
        """A few of them, to look at."""
        parts = cut_call(self.calls[0], max(1, -(-self.count // _LOOKED_AT))) if self.joined else self.calls
        return parts[:_LOOKED_AT]


@dataclass(eq=False)
class Imitation:
    r"""Squared differences from the original, each as a share of the variance of what the original gives:

        mean_i ||y'_i - y_i||^2 / var y_i  +  blocks * mean_l ||x'_l - M_l x_l||^2 / var M_l x_l

    over the outputs y_i, and over what the layers l read, M_l being the merges of the channels that lie there. What
    layers read is nothing to aim at where the smaller network begins farther from it than a constant is. As the images
    of a batch stand the numbers of images in `pool`. Reference: outputs Hinton et al. 2015, in the form of Kim et al.
    2021 (squared differences); layers Romero et al. 2015 (FitNets), the merges instead of a learned map are OURS.

    Attributes:
        teacher: the original, left as it was, in evaluation mode.
        merges: M_l (m, n) by the name of the layer, see `find_read_merges`.
        blocks: weight of what layers read.
        views: whether images are mirrored, shifted, cut into and mixed.
    """

    teacher: nn.Module
    graph: ChannelGraph
    merges: Mapping[str, Tensor]
    pool: Pool
    blocks: float = 1.0
    views: bool = False
    scales: dict[int, Tensor] = field(default_factory=dict)
    known: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        layers = find_layers(self.teacher, self.graph)
        self.watched = {name: layers[name] for name in self.merges}
        self.picks = {name: find_picks(merge) for name, merge in self.merges.items()}

    def look(self, model: nn.Module) -> None:
        """Find out how much outputs and reads vary, and which reads the smaller network is near to.

        Raises:
            ModelError: one of the networks does not run on these inputs.
        """
        lost, spreads, outputs = dict[tuple[str, int], Tensor](), dict[tuple[str, int], Tensor](), dict[int, Tensor]()
        calls = self.pool.list_first()
        for call in map(double_first, calls):
            expected, wanted = self.run_teacher(call)
            with preserve_state(model):
                _, found = self.run(model, call)
            for index, y in enumerate(expected):
                outputs[index] = outputs.get(index, 0.0) + _find_variance(y)
            for key, x in wanted.items():
                if key in found and found[key].shape == x.shape:
                    lost[key] = lost.get(key, 0.0) + _find_square(found[key], x)
                    spreads[key] = spreads.get(key, 0.0) + _find_variance(x)
        self.scales = {index: total / len(calls) for index, total in outputs.items()}
        self.known = {key: s / len(calls) for key, s in spreads.items() if bool(lost[key] < _KNOWN * s)}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        call = self.view(double_first(self.pool.pick(images.cpu())))
        expected, wanted = self.run_teacher(call)
        with forked_random_numbers():
            torch.manual_seed(0)  # as `preserve_state` has it for the original, of which random numbers are no part
            given, found = self.run(model, call)
        pairs = zip(given, expected, strict=True)
        outputs = [_find_square(a, b) / _as_scale(self.scales[i]) for i, (a, b) in enumerate(pairs)]
        reads = [
            _find_square(found[key], wanted[key]) / _as_scale(scale)
            for key, scale in self.known.items()
            if key in found and key in wanted and found[key].shape == wanted[key].shape
        ]
        loss = torch.stack(outputs).mean()
        return loss + self.blocks * torch.stack(reads).mean() if reads and self.blocks else loss

    @property
    def has_views(self) -> bool:
        return self.views and find_plain_images(self.pool.pick(torch.arange(1))) is not None

    def view(self, call: Inputs) -> Inputs:
        images = find_plain_images(call) if self.views else None
        return call if images is None else call.map(lambda t: draw_view(t) if t is images else t)

    def run_teacher(self, call: Inputs) -> tuple[list[Tensor], Reads]:
        with preserve_state(self.teacher):
            return self.run(self.teacher, call, self.merge)

    def merge(self, name: str, x: Tensor) -> Tensor:
        """M x of what a layer reads; where M picks, by picking, several times faster from a tensor as it lies."""
        dim = self.watched[name].channel_dim % x.dim() if x.dim() > 1 else 0
        if (picks := self.picks[name]) is not None:
            return x[*[slice(None)] * dim, picks.to(x.device)]
        return (x.movedim(dim, -1) @ self.merges[name].T.to(x)).movedim(-1, dim)

    def run(
        self, model: nn.Module, call: Inputs, merge: Callable[[str, Tensor], Tensor] | None = None
    ) -> tuple[list[Tensor], Reads]:
        """What counts of the outputs, and what the layers read, merged."""
        found: Reads = {}
        modules = {name: model.get_submodule(name) for name in self.watched}
        counts = dict.fromkeys(self.watched, 0)

        def reached(name: str, x: Tensor) -> None:
            layer = self.watched[name]
            weights = layer.weigh_rows(x, call.weights)
            merged = x if merge is None else merge(name, x)
            rows = merged if x.dim() < 2 else merged.movedim(layer.channel_dim, -1)
            found[name, counts[name]] = rows if weights is None else rows[weights > 0]
            counts[name] += 1

        with watch_calls(modules, reached=reached, history=True):
            tensors = call.turn_outputs(output_tensors(cast_like(call, model).run(model)))
        floating = [t for t in tensors if t.is_floating_point() or t.is_complex()]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in floating]
        return [t for t in select_counted(real, call.weights) if t.numel()], found


def find_read_merges(model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> dict[str, Tensor]:
    """What the maps do to what layers read, as (m, n) matrices by the name of the layer.

    Layers are left out that read nothing that was reduced, or what a rotation put other norms in front of.

    Args:
        model: the original network, of which the graph is.
    """
    found, layers = dict[str, Tensor](), find_layers(model, graph)
    turned = {g.name for g in graph.groups if g.name in maps and is_turned(g, maps[g.name])}
    for name, layer in layers.items():
        reading = [
            (member, group.name)
            for group in graph.groups if group.name in maps
            for member in group.with_role(Role.CONSUMES)
            if member.tensor == layer.weight_name and member.dim == layer.input_dim
        ]  # fmt: skip
        if not reading or any(g in turned or m.within is not None for m, g in reading):
            continue
        touching = [(member, maps[group].merge) for member, group in reading]
        found[name] = compose_merges(touching, layer.module.weight.shape[layer.input_dim])
    return found


def _find_square(found: Tensor, expected: Tensor) -> Tensor:
    """Mean squared difference, where a number is expected; what the original masks or leaves undefined is nothing."""
    if found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    lost = F.mse_loss(found, expected)
    if bool(lost.isfinite()):  # looked at first, as it is one number
        return lost
    finite = expected.isfinite()
    return lost if bool(finite.all()) else torch.where(finite, found - expected, 0.0).square().mean()


def _find_variance(x: Tensor) -> Tensor:
    """About the mean over the rows, of a single one about 0."""
    x = x.detach().float() if x.dtype.itemsize < 4 else x.detach()
    x = torch.view_as_real(x) if x.is_complex() else x
    centre = x.nan_to_num(0.0, 0.0, 0.0).mean(0) if x.dim() and len(x) > 1 else torch.zeros_like(x)
    return _find_square(centre.expand_as(x), x)


def _as_scale(variance: Tensor) -> Tensor:
    return variance.clamp(min=1e-12)
