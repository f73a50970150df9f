"""Norms that see fewer channels than they did: gain and shift fitted channel by channel for what the original gave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph, Role
from intrafusion.network.autocast import as_in_forward
from intrafusion.network.batches import count_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import watch_calls
from intrafusion.network.row_weights import effective_rows
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.lockstep import Turn
from intrafusion.restore.row_store import RowStore
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

    def run(self, x: Tensor) -> Tensor:
        """What it gives, once more."""
        with as_in_forward():
            return self.module.forward(x)

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
        store: what the norms of the original gave.
        fitted: names of norms that were changed.
    """

    norms: Mapping[str, ChannelNorm]
    store: RowStore
    strength: float
    scarcity: float
    fitted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.again: set[str] = set()
        self.trials: dict[str, _Trial] = {}

    __repr__ = show_briefly

    @contextlib.contextmanager
    def recording(self, reference: nn.Module, batch: int, call: Inputs, order: list[Hashable]) -> Iterator[None]:
        """Inside, what the norms of the original give on a batch is stored.

        Args:
            order: what is met, to which norms are added as they are reached.
        """
        modules, seen = dict(reference.named_modules()), set[str]()

        def record(name: str, x: Tensor, output: Tensor) -> None:
            if name in seen or not self._record(name, output, batch, call):
                self.again.add(name)  # two calls cannot be fitted at once
                self.store.forget(name)
            seen.add(name)
            order.extend((kind, name) for kind in ("norm", "tried norm"))

        with watch_calls({name: modules[name] for name in self.norms}, record):
            yield

    @contextlib.contextmanager
    def fitting(
        self,
        model: nn.Module,
        batch: int,
        turn: Turn,
        made: Callable[[Tensor], None],
        paused: Callable[[], bool] = lambda: False,
    ) -> Iterator[None]:
        """Inside, the norms of the smaller network are fitted as they are reached on a batch.

        Args:
            made: is told of outputs that are put in place of others.
            paused: whether layers before are yet to be solved, so that this is no time to fit.
        """
        modules = dict(model.named_modules())
        known = {name: modules[name] for name in self.norms if name in self.store.rows}

        def fit(name: str, x: Tensor, output: Tensor) -> Tensor | None:
            found = None if paused() else self._fit(batch, turn, name, x, output)
            if found is not None:
                made(found)
            return found

        with watch_calls(known, fit):
            yield

    def list_written(self, small: nn.Module) -> dict[str, Tensor]:
        """Gains and shifts that were fitted, by name."""
        own = {id(t) for n in self.fitted for t in (self.norms[n].gain, self.norms[n].shift) if t is not None}
        return {name: t.detach() for name, t in named_tensors(small).items() if id(t) in own}

    def _record(self, name: str, output: Tensor, batch: int, call: Inputs) -> bool:
        """False for what is no norm of these channels, or is reached in another way than on the first batch."""
        norm = self.norms[name]
        if name in self.again or not isinstance(output, Tensor) or output.dim() < 2:
            return False
        if output.shape[norm.dim] != norm.merge.shape[1]:
            return False
        rows = output.movedim(norm.dim, -1)
        counts = None if call.weights is None else call.weights.of_rows(rows, name)
        places = self.store.sample(name, batch, rows, counts, count_images(call))
        if places is None:
            return False
        self.store.put(name, batch, (norm.take_rows(output, places) @ norm.merge.T.to(output.device)).float())
        return True

    def _fit(self, batch: int, turn: Turn, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        """One batch's part: what the norm gives, then what it would give with each gain and shift that is tried."""
        norm, places = self.norms[name], self.store.places[name][batch]
        given = norm.take_rows(output, places) if output.shape[norm.dim] == len(norm.gain) else None
        repeats = given is not None and self._repeats(norm, x, given, places)
        trial = turn.wait(("norm", name), given if repeats else None)
        if trial is None:
            return None
        errors = [trial.measure(batch, norm.take_rows(found, places)) for found in trial.list_outputs(norm, x)]
        return norm.run(x) if turn.wait(("tried norm", name), errors) else None

    def meet(self, key: tuple[str, str], brought: Sequence[Any]) -> Sequence[Any]:
        """What all batches brought to a norm, answered."""
        kind, name = key
        answer = self._choose(name, brought) if kind == "norm" else self._settle(name, brought)
        return [answer] * len(brought)

    def _choose(self, name: str, given: Sequence[Tensor | None]) -> _Trial | None:
        """Gains and shifts to try; None where the norm is right, or cannot be tried."""
        norm, target, rows = self.norms[name], self.store.take(name).double(), [g for g in given if g is not None]
        if len(rows) < len(given):
            return None
        joined, weights = torch.cat(rows), self.store.weights[name]
        if joined.shape != target.shape or float((joined - target).norm()) <= _RIGHT * float(target.norm()):
            return None
        slope, constant = fit_channels(joined, target, weights, self.strength, self.scarcity, norm.shift is not None)
        choices = []
        for offset in _OFFSETS:
            shift = None if norm.shift is None else slope * norm.shift.double() + constant
            choices.append((slope * (norm.gain.double() + offset) - offset, shift))
        self.trials[name] = _Trial(choices, target, weights, [len(r) for r in rows], _measure(joined, target, weights))
        return self.trials[name]

    def _settle(self, name: str, errors: Sequence[Sequence[float]]) -> bool:
        """Write the choice that is best over all batches; False if none is better than what there is."""
        trial = self.trials.pop(name)
        totals = [sum(parts) for parts in zip(*errors, strict=True)]
        if not min(totals) < trial.least:
            return False
        self.norms[name].put_(*trial.choices[totals.index(min(totals))])
        self.fitted.append(name)
        return True

    def _repeats(self, norm: ChannelNorm, x: Tensor, given: Tensor, places: Tensor) -> bool:
        """Whether its forward gives the same again, of what it reads alone."""
        try:
            found = norm.take_rows(norm.run(x), places)
        except Exception:  # it takes more than one argument, or gives something else
            return False
        return float((found - given).norm()) <= _ALIKE * float(given.norm())


@dataclass(frozen=True, eq=False)
class _Trial:
    """Gains and shifts of a norm to be tried on all batches.

    Attributes:
        target: what its rows are to be, (k, c), of which each batch has as many as `parts` says.
        least: the error as it is.
    """

    choices: Sequence[tuple[Tensor, Tensor | None]]
    target: Tensor
    weights: Tensor | None
    parts: Sequence[int]
    least: float

    __repr__ = show_briefly

    def list_outputs(self, norm: ChannelNorm, x: Tensor) -> Iterator[Tensor]:
        """What the norm makes of x with each of them; it is left as it was."""
        before = norm.gain.detach().clone(), None if norm.shift is None else norm.shift.detach().clone()
        for choice in self.choices:
            norm.put_(*choice)
            yield norm.run(x)
        norm.put_(*before)

    def measure(self, batch: int, given: Tensor) -> float:
        """The error of what it gives on a batch."""
        own = slice(sum(self.parts[:batch]), sum(self.parts[: batch + 1]))
        return _measure(given, self.target[own], None if self.weights is None else self.weights[own])


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
