"""How much the output suffers when one group is cut: what the choice of sizes goes by."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of, size_twins
from intrafusion.measure.drift import OutputError
from intrafusion.network.batches import cast_like, double_first
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import select_counted
from intrafusion.network.state import preserve_state
from intrafusion.observe.whole_blocks import flatten_blocks
from intrafusion.plan import Plan
from intrafusion.recipe import Recipe
from intrafusion.reduce.eliminate import eliminate, unit_map
from intrafusion.reduce.pivot import Pivot
from intrafusion.reduce.problem import Moments, Reducer, ReductionMap, ReductionProblem
from intrafusion.reduce.telling import Telling
from intrafusion.restore.calibration import Calibration
from intrafusion.restore.restorer import Reduced, ReducedNetwork
from intrafusion.restore.shifts import add_shifts_
from intrafusion.surgery.literals import Literals
from intrafusion.surgery.operate import copy_reduced

_TRUST_IN_NOISE = 0.5  # half way to heights that are all the same
_EIGHTH = 8
_CLOSE = 1.5  # what is lost at two sizes that tell the same
_FLATTEST = 0.25  # how an error grows at least, where nothing is measured: nothing more to lose is not believed
_NOTHING = 1e-9  # an error, as a fraction, that is none
_FEW, _FEWEST = 64, 16  # images to measure on, and those that are not parted


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What cutting the groups of a network costs its output.

    Attributes:
        scores: importance of the channels, (n,) by group.
        moments: what is read of them, by group, where that is known.
        calibration: what errors are measured on; without one, the example inputs.
        blocks: groups of whole blocks that may be cut beside the channels; what is read of these is known too.
        literals: numbers in attributes that follow the sizes.
        teller: what reduces the groups, and tells beforehand what that loses.
        solves: whether layers will be solved on what the calibration holds.
    """

    model: nn.Module
    graph: ChannelGraph
    scores: Mapping[str, Tensor]
    moments: Mapping[str, Moments]
    calibration: Calibration | None
    example_inputs: Inputs
    blocks: Sequence[ChannelGroup] = ()
    literals: Literals | None = None
    teller: Telling = field(default_factory=lambda: Pivot(rotate=False))
    solves: bool = False

    __repr__ = show_briefly

    def list_curves(self, groups: Sequence[ChannelGroup]) -> list[dict[str, Tensor]]:
        r"""Predicted errors when a group alone keeps k of its n channels, (n + 1,) for k = 0..n, by group.

        The shape of a curve is the share of the consumers' signal that the first k pivots, or directions, cannot tell
        (or, where no layer that reads the group was seen, the share of the importance given up); of whole blocks, what
        eliminating them one after another loses. Its height is measured: the group is cut alone, its consumers make up
        for the rest as well as they can, and the output is compared on a few images, from which nothing was learnt of
        what is read of the channels. Twins are cut together.

        Two opinions: one has the height at half the channels, the other at seven eighths as well, since an output that
        is off by all it says cannot get worse: half a stream does not tell what a tenth of it does. The first is closer
        where the layers behind make up for more than the consumers do. `compare` tells which leads further. OURS.
        """
        drawn = [self._draw(twins) for twins in families_of(groups)]
        return [{name: curve for each in drawn for name, curve in each[k].items()} for k in range(2)]

    def _draw(self, twins: Sequence[ChannelGroup]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The curves of twins through the error of half of them, and through that of seven eighths as well."""
        shapes, heights = {g.name: self._find_shape(g) for g in twins}, dict[int, float]()
        for sizes in (halve(twins), _cut_little(twins)):
            m = sizes[twins[0].name] // twins[0].multiple
            if not _is_told(shapes[twins[0].name][:: twins[0].multiple], m, heights):
                heights[m] = self._find_height(twins, sizes) ** self.trust / len(twins)
        fit = lambda sizes: {  # noqa: E731
            g.name: fit_curve(shapes[g.name], {m * g.multiple: heights[m] for m in sizes}) for g in twins
        }
        return fit([*heights][:1]), fit([*heights])

    def _find_shape(self, group: ChannelGroup) -> Tensor:
        """Falls from 1 for no channel, or block, to 0 for all, (n + 1,)."""
        moments, scores = self.moments.get(group.name), self.scores[group.name]
        if not group.is_channel and moments is not None:
            return eliminate(moments, moments.means.shape[1] // group.size).losses
        losses = self.teller.list_losses(_pose(group, scores, group.size, moments))
        return _share_given_up(scores) if losses is None else losses

    def _find_height(self, twins: Sequence[ChannelGroup], sizes: Mapping[str, int]) -> float:
        """The error with these groups cut; measured once for all targets on one calibration."""
        scores = tuple(self.scores[g.name].cpu().numpy().tobytes() for g in twins)
        key = self.graph, self.teller, tuple(sizes.items()), scores, self.literals is not None
        return self.measure_once(key, lambda: self.error(sizes))

    def measure_once(self, key: Hashable, measure: Callable[[], float]) -> float:
        """What was measured of this on the calibration, or is now."""
        known = self._known.heights
        if key not in known:
            known[key] = measure()
        return known[key]

    @property
    def trust(self) -> float:
        """Exponent of the heights: noise with the norms' statistics exaggerates how unlike groups are."""
        is_noise = self.calibration is not None and self.calibration.is_standardised
        return _TRUST_IN_NOISE if is_noise else 1.0

    @cached_property
    def _known(self) -> _Known:
        return _Known() if self.calibration is None else _KNOWN.setdefault(self.calibration, _Known())

    def error(self, sizes: Mapping[str, int]) -> float:
        """Mean squared difference of the outputs, as a fraction of their variance, when groups have these sizes."""
        return self._measure(sizes, self._probe.heights)

    @property
    def change(self) -> float:
        """The same of the original, such as it is now: something may be done to what its layers give."""
        return _measure_error(self.reference, self._probe.heights)

    def compare(self, *candidates: Mapping[str, int]) -> list[float]:
        """The same of several choices of sizes, on images that no height was measured on, where there are any.

        Where layers will be solved, they are here, on images that nothing is measured on: how far the outputs are off
        before that tells little of how far they are behind it. Each costs as much as restoring once, on up to as many
        images.
        """
        return [self._measure_solved(sizes) if self.solves else self._measure_cut(sizes) for sizes in candidates]

    def _measure_cut(self, sizes: Mapping[str, int]) -> float:
        return self._measure(sizes, self._probe.others)

    def _measure_solved(self, sizes: Mapping[str, int]) -> float:
        if self.calibration is None or self._probe.solved_on is None:
            return self._measure_cut(sizes)
        maps, seen = self._find_maps(sizes), self._probe.others
        small = self._cut(self.model, maps)
        cut = ReducedNetwork(small, Plan(Recipe(), (), self.graph.shapes, maps), self.example_inputs)
        measure = lambda model: _measure_error(model, seen)  # noqa: E731
        try:
            return min(self.calibration.solve(cut, self.graph, self._probe.solved_on, measure))
        except ModelError:
            return self._measure_cut(sizes)

    def _measure(self, sizes: Mapping[str, int], seen: _Seen) -> float:
        """1 where such a network does not run."""
        small = self._cut(self.reference, self._find_maps(sizes))
        try:
            return _measure_error(small, seen)
        except ModelError:
            return 1.0

    def _cut(self, model: nn.Module, maps: Mapping[str, ReductionMap]) -> nn.Module:
        small = copy_reduced(model, self.graph, maps, self.literals)
        add_shifts_(small, model, self.graph, maps)
        return small

    def _find_maps(self, sizes: Mapping[str, int]) -> dict[str, ReductionMap]:
        smaller, moments = [g for g in self.graph.groups if sizes.get(g.name, g.size) < g.size], self._probe.moments
        return {g.name: self._find_map(g, sizes[g.name], moments.get(g.name)) for g in smaller}

    def _find_map(self, group: ChannelGroup, m: int, moments: Moments | None) -> ReductionMap:
        if not group.is_channel and moments is not None:
            return unit_map(moments, group.size, m)
        return self.teller(_pose(group, self.scores[group.name], m, moments))

    @property
    def learnt_on(self) -> Inputs | Batches:
        """What may be looked at beside what errors are measured on."""
        return self.example_inputs if self._probe.solved_on is None else self._probe.solved_on

    @property
    def reference(self) -> nn.Module:
        """The network as it is seen."""
        return self.model if self.calibration is None else self.calibration.reference

    @property
    def _probe(self) -> _Probe:
        probes = self._known.probes
        if self.graph not in probes:
            probes[self.graph] = self._make_probe()
        return probes[self.graph]

    def _make_probe(self) -> _Probe:
        """What errors are measured on, and what is known of the channels from other images."""
        if self.calibration is None:
            seen = self._run_example()
            return _Probe(self.moments, seen, seen, None)
        moments, (apart, rest) = self.moments, _find_apart(self.calibration)
        if self.calibration.held_out is None and moments and rest is not apart:
            others = replace(self.calibration, images=rest, _moments={})
            moments = {
                **others.moments_of(self.graph),
                **others.moments_of(flatten_blocks(self.graph, self.blocks)),
            }
        first, second = (self._run(half) for half in _halve_images(apart))
        return _Probe(moments, first, second, rest)

    def _run(self, images: Batches) -> _Seen:
        return [(call, _run_floats(self.reference, call)) for call in images]

    def _run_example(self) -> _Seen:
        varied = self.example_inputs.varied()
        try:
            return [(varied, _run_floats(self.model, varied))]
        except ModelError:  # it takes these values only
            return [(self.example_inputs, _run_floats(self.model, self.example_inputs))]


def judge_network(
    small: Reduced, model: nn.Module, graph: ChannelGraph, calibration: Calibration | None, *, solves: bool
) -> float:
    """How far the outputs of a smaller network are off, on all images that its layers are not solved on for that.

    Args:
        small: its weights may be written.
        model: the network that it was made of, with its graph and a calibration of it; without one, the example inputs
            are what is measured on.
        solves: whether its layers will be solved.
    """
    if calibration is None:
        return _measure_error(small.model, [(small.inputs, _run_floats(model, small.inputs))])
    apart, rest = _find_apart(calibration)
    seen = [(call, _run_floats(calibration.reference, call)) for call in apart]
    measure = lambda net: _measure_error(net, seen)  # noqa: E731
    try:
        if solves:
            return min(calibration.solve(small, graph, rest, measure))
    except ModelError:  # what layers read cannot be solved on these
        pass
    if not calibration.is_standardised:
        return measure(small.model)
    net = copy_reduced(calibration.reference, graph, small.plan.maps)  # with the statistics that the reference has
    add_shifts_(net, calibration.reference, graph, small.plan.maps)
    return measure(net)


def halve(groups: Iterable[ChannelGroup]) -> dict[str, int]:
    """Half the channels of every group, rounded up, twins in step."""
    halves = (size_twins(twins, (twins[0].size // twins[0].multiple + 1) // 2) for twins in families_of(groups))
    return {name: m for sizes in halves for name, m in sizes.items()}


def _cut_little(twins: Sequence[ChannelGroup]) -> dict[str, int]:
    """An eighth of the channels fewer, at least one, twins in step."""
    n = twins[0].size // twins[0].multiple
    return size_twins(twins, max(1, n - max(1, n // _EIGHTH)))


def _is_told(shape: Tensor, m: int, heights: Mapping[int, float]) -> bool:
    """Whether an error is measured where about as much is lost as with m channels, or m loses nothing."""
    close = lambda k: max(shape[k], shape[m]) <= _CLOSE * min(shape[k], shape[m])  # noqa: E731
    return bool(heights) and (bool(shape[m] <= _NOTHING) or m in heights or any(bool(close(k)) for k in heights))


def fit_curve(shape: Tensor, heights: Mapping[int, float]) -> Tensor:
    r"""The errors with k channels, as some were measured: in between as a power of what is lost, (n + 1,).

        e(k) = e(a) (s(k) / s(a))^p      for s(a) <= s(k) <= s(b),  where p makes it pass through e(b),

    with p = 1 where less is lost than at all of them, and the last p, but from 1/4 to 1, where more is.

    Args:
        shape: s, what is lost with k of n channels, in any unit, (n + 1,); not increasing.
        heights: e, by k.

    >>> [round(e, 3) for e in fit_curve(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]), {1: 0.4, 3: 0.2}).tolist()]
    [0.566, 0.4, 0.283, 0.2, 0.0]
    """
    shape = shape.double().cpu()
    if not heights:
        return shape
    points = list[tuple[float, float]]()
    for k in sorted(heights, reverse=True):  # from what loses least
        lost, error = max(float(shape[k]), _NOTHING), max([heights[k], _NOTHING, *(e for _, e in points)])
        if not points or lost > points[-1][0]:
            points.append((lost, error))
    curve, power = shape * (points[0][1] / points[0][0]), 1.0
    for (lost, error), (more, worse) in pairwise(points):
        power = math.log(worse / error) / math.log(more / lost)
        curve = torch.where(shape > lost, error * (shape / lost) ** power, curve)
    lost, error = points[-1]
    return torch.where(shape > lost, error * (shape / lost) ** min(max(power, _FLATTEST), 1.0), curve)


_Seen = Sequence[tuple[Inputs, list[Tensor]]]
"""Images in batches, and what the network as it is to be seen gives on them."""


@dataclass(frozen=True, eq=False)
class _Probe:
    """What errors are measured on.

    Attributes:
        moments: what is read of the channels on other images than those, by group.
        heights, others: images for the heights of curves, and for comparing what was chosen by them.
        solved_on: those that layers are solved on for that.
    """

    moments: Mapping[str, Moments]
    heights: _Seen
    others: _Seen
    solved_on: Batches | None

    __repr__ = show_briefly


@dataclass(frozen=True, eq=False)
class _Known:
    """What was measured on one calibration.

    Attributes:
        probes: what is measured on, by graph.
        heights: of families of groups.
    """

    probes: dict[ChannelGraph, _Probe] = field(default_factory=dict)
    heights: dict[Hashable, float] = field(default_factory=dict)

    __repr__ = show_briefly


_KNOWN: WeakKeyDictionary[Calibration, _Known] = WeakKeyDictionary()


def _find_apart(calibration: Calibration) -> tuple[Batches, Batches]:
    """Images to measure on, and the others."""
    if calibration.held_out is None:
        return _part_images(calibration.images)
    return calibration.held_out, calibration.images


def _part_images(images: Batches) -> tuple[Batches, Batches]:
    """Up to half of the images, at most 128, to measure on, and the others; where they are few, all of them twice."""
    count = min(2 * _FEW, images.count // 2)
    if count < _FEWEST:
        return images, images
    return images.take(count), images.part(torch.arange(count, images.count))


def _halve_images(images: Batches) -> tuple[Batches, Batches]:
    """Two halves, at most 64 images each; where they are few both are all of them."""
    total = min(2 * _FEW, images.count)
    if total < _FEWEST:
        return images, images
    return images.take(total // 2), images.part(torch.arange(total // 2, total))


def _pose(group: ChannelGroup, scores: Tensor, m: int, moments: Moments | None) -> ReductionProblem:
    return ReductionProblem(scores[:, None], scores, m, moments=moments, linear=group.linear, rotation=group.rotation)


def _share_given_up(scores: Tensor) -> Tensor:
    """Of the importance, with the k most important channels kept, for k = 0..n."""
    ranked = scores.clamp(min=0).sort(descending=True).values
    return 1 - torch.cat([ranked.new_zeros(1), ranked.cumsum(0)]) / ranked.sum().clamp(min=1e-300)


def choose_teller(reducer: Reducer) -> Telling:
    """What predicts the loss where it is known what is read: the reducer itself if it can, or pivots."""
    if not isinstance(reducer, Telling):
        return Pivot(rotate=False)
    return replace(reducer, unmerge=True, rotate=reducer.rotates)


def _measure_error(model: nn.Module, seen: _Seen) -> float:
    """Mean squared difference of the outputs as a fraction of their variance."""
    error = OutputError()
    for images, expected in seen:
        error.add(_run_floats(model, images), expected)
    return error.value


def _run_floats(model: nn.Module, images: Inputs) -> list[Tensor]:
    """What counts of the floating outputs; rows of padded tokens do not."""
    call = double_first(images)
    with preserve_state(model):
        found = [t for t in cast_like(call, model).call(model) if t.is_floating_point()]
    return select_counted(found, call.weights)
