"""Norms that see fewer channels than they did: gain and shift fitted channel by channel for what the original gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph, Role
from intrafusion.network.layers import sample_places, watch_calls
from intrafusion.network.row_weights import RowWeights, effective_rows, weigh_evenly
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.statistics import find_merge
from intrafusion.surgery.streams import find_turned

_OFFSETS = (0.0, 1.0)  # what is added to a gain that is stored: norms of Gemma multiply by 1 + w
_RIGHT = 1e-5  # a norm that is off by less than this fraction of what it gives is left alone
_ALIKE = 1e-3  # of the size of what a norm gives; the same kernel on the same rows


@dataclass(frozen=True, eq=False)
class ChannelNorm:
    """A module that has a gain, perhaps a shift, for each channel of groups that a reduction makes smaller.

    Attributes:
        merge: what the reduction did to what it gives, (m, n) float64.
        dim: of what it reads and gives, along which the channels run.
    """

    name: str
    module: nn.Module
    gain: Tensor
    shift: Tensor | None
    merge: Tensor
    dim: int

    __repr__ = show_briefly

    def take_rows(self, x: Tensor, places: Tensor) -> Tensor:
        """The channels (k, c) at these places, float64."""
        return x.movedim(self.dim, -1)[tuple(places.T)].double()

    def put_(self, gain: Tensor, shift: Tensor | None) -> None:
        self.gain.data.copy_(gain)
        if self.shift is not None and shift is not None:
            self.shift.data.copy_(shift)


def find_channel_norms(
    small: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]
) -> dict[str, ChannelNorm]:
    """Norms whose channels are fewer, and are seen together, by name; in rotated streams none has a gain of its own."""
    turned = {g.name for g in find_turned(graph.groups, maps)}
    groups = [g for g in graph.groups if g.name in maps and g.together is not None and g.name not in turned]
    gains = {m.tensor for g in groups for m in g.with_role(Role.SCALES) if m.dim == 0}
    shifts = {m.tensor for g in groups for m in g.with_role(Role.SHIFTS) if m.dim == 0}
    names = {id(t): name for name, t in named_tensors(small).items()}
    found = {}
    for name, module in small.named_modules():
        own = {names[id(t)]: t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
        scale = [n for n in own if n in gains]
        rest = [n for n in own if n not in gains]
        if len(scale) != 1 or len(rest) > 1 or not shifts.issuperset(rest) or any(t.dim() != 1 for t in own.values()):
            continue
        merge = find_merge(scale[0], graph.shapes[scale[0]][0], graph, maps)
        if merge is not None and not any(module.children()):
            shift = own[rest[0]] if rest else None
            dim = 1 if isinstance(module, nn.GroupNorm) else -1
            found[name] = ChannelNorm(name, module, own[scale[0]], shift, merge, dim)
    return found


@dataclass(eq=False)
class NormFits:
    r"""Fits norms in the two passes of the solver: what they give is stored in the first, then they are fitted.

    With h what a norm of the smaller network gives for a channel and y what the original's gave, over k rows,

        a = 1 + Cov(y - h, h) / ((1 + strength + scarcity / k) Var h),    c = mean y - a mean h,

    the norm becomes h <- a h + c, in its gain and shift; without a shift c = 0 and the moments are about zero. Each
    is tried on the rows, and stays as it was where what it gives is not closer to the original's then.

    Attributes:
        weights: how much the rows of the call count; None for all alike.
        rows: sampled places per norm.
        fitted: names of norms that were changed.
    """

    norms: Mapping[str, ChannelNorm]
    weights: RowWeights | None
    strength: float
    scarcity: float
    rows: int
    seed: int
    fitted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | None] = {}
        self.targets: dict[str, Tensor] = {}
        self.again: set[str] = set()
        self.paused = False  # while layers before are yet to be solved

    __repr__ = show_briefly

    @contextlib.contextmanager
    def recording(self, reference: nn.Module) -> Iterator[None]:
        """Inside, what the norms of the original give is stored."""
        modules = dict(reference.named_modules())
        with watch_calls({name: modules[name] for name in self.norms}, self._record):
            yield

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Inside, the norms of the smaller network are fitted as they are reached."""
        known = {n: norm.module for n, norm in self.norms.items() if n in self.targets and n not in self.again}
        with watch_calls(known, self._fit):
            yield

    def list_written(self, small: nn.Module) -> dict[str, Tensor]:
        """Gains and shifts that were fitted, by name."""
        own = {id(t) for n in self.fitted for t in (self.norms[n].gain, self.norms[n].shift) if t is not None}
        return {name: t.detach() for name, t in named_tensors(small).items() if id(t) in own}

    def _record(self, name: str, x: Tensor, output: Tensor) -> None:
        norm = self.norms[name]
        if name in self.places or not isinstance(output, Tensor) or output.dim() < 2:
            self.again.add(name)  # two calls cannot be fitted at once
            return
        if output.shape[norm.dim] != norm.merge.shape[1]:
            self.again.add(name)
            return
        rows = output.movedim(norm.dim, -1)
        counts = None if self.weights is None else self.weights.of_rows(rows, name)
        places = sample_places(name, tuple(rows.shape[:-1]), self.rows, self.seed, counts).to(output.device)
        self.places[name] = places
        self.counts[name] = None if counts is None else weigh_evenly(counts[tuple(places.T)])
        self.targets[name] = (norm.take_rows(output, places) @ norm.merge.T.to(output.device)).float()

    def _fit(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        if self.paused:
            return None
        norm, places, target = self.norms[name], self.places[name], self.targets[name].double()
        given = norm.take_rows(output, places)
        weights, before = self.counts[name], (norm.gain.detach().clone(), _copy(norm.shift))
        if given.shape != target.shape or float((given - target).norm()) <= _RIGHT * float(target.norm()):
            return None
        if not self._repeats(norm, x, given, places):
            return None
        slope, constant = fit_channels(given, target, weights, self.strength, self.scarcity, norm.shift is not None)
        least, best = _measure(given, target, weights), None
        for offset in _OFFSETS:
            gain = slope * (before[0].double() + offset) - offset
            shift = None if before[1] is None else slope * before[1].double() + constant
            norm.put_(gain, shift)
            found = norm.module.forward(x)
            error = _measure(norm.take_rows(found, places), target, weights)
            if error < least:
                least, best = error, (gain, shift, found)
        if best is None:
            norm.put_(*before)
            return None
        norm.put_(*best[:2])
        self.fitted.append(name)
        return best[2]

    def _repeats(self, norm: ChannelNorm, x: Tensor, given: Tensor, places: Tensor) -> bool:
        """Whether its forward gives the same again, of what it reads alone."""
        try:
            found = norm.take_rows(norm.module.forward(x), places)
        except Exception:  # it takes more than one argument, or gives something else
            return False
        return float((found - given).norm()) <= _ALIKE * float(given.norm())


def fit_channels(
    given: Tensor, target: Tensor, weights: Tensor | None, strength: float, scarcity: float, intercept: bool
) -> tuple[Tensor, Tensor]:
    """Slope and constant of every channel, (c,) float64, see `NormFits`.

    Args:
        given, target: rows (k, c), float64.
        weights: how much each row counts, (k, 1) of mean 1; None for all alike.
        intercept: whether there may be a constant.
    """
    mean = lambda rows: (rows if weights is None else rows * weights.to(rows)).mean(0)  # noqa: E731
    lacking = target - given
    about, owed = (mean(given), mean(lacking)) if intercept else (torch.zeros_like(given[0]),) * 2
    damping = 1 + strength + scarcity / effective_rows(weights, len(given))
    variance = damping * mean((given - about).square())
    change = mean((given - about) * (lacking - owed)) / torch.where(variance > 0, variance, 1.0)
    return 1 + change, owed - change * about


def _measure(given: Tensor, target: Tensor, weights: Tensor | None) -> float:
    error = (target - given).square()
    return float((error if weights is None else error * weights.to(error)).sum())


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
