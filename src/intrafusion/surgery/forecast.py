"""The shapes that the smaller network must show, operation by operation, and the groups behind the first that differs.

The original is traced once, and what every operation reads and gives is kept as channels. A cut network of any sizes
then runs once, without surgery, trace or proof; where it stops, or shows another shape than its channels have left, are
the groups that most likely cannot be cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._C import DispatchKey  # pyright: ignore[reportAttributeAccessIssue]

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, Member
from intrafusion.network.decisions import call_ways
from intrafusion.network.grouped import is_grouped_product, multiply_groups
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import evaluate_alone
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.surgery.maps import shorten
from intrafusion.surgery.write import weights_written
from intrafusion.trace.call import Call, name_operation
from intrafusion.trace.decomposition import decompose
from intrafusion.trace.dispatch import Tracer, is_composite
from intrafusion.trace.info import LabelledTensor
from intrafusion.trace.labels import narrow
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.random import Draws
from intrafusion.trace.run import answered, follow_call, follow_run
from intrafusion.trace.shared import settle_shared

_Suspects = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Trial:
    """How far a cut network ran.

    Attributes:
        error: what stopped it, None if it ran to the end.
        place: the first operation with another shape than forecast, and the last that was done, counted.
        suspects: names of the groups that these two see, cut or not, the likeliest first.
    """

    error: Exception | None
    place: tuple[int, int]
    suspects: _Suspects

    __repr__ = show_briefly


@dataclass(eq=False)
class _Step:
    """One operation: the labels of what it reads and gives, of size 1 along dimensions without channels."""

    name: str
    read: list[np.ndarray]
    given: list[np.ndarray | None]


class _Recorder(Tracer):
    """Traces the original and keeps every step."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.steps: list[_Step] = []

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.steps.append(_Step(name_operation(func), [], []))
        return func(*args, **kwargs)

    def follow(self, call: Call) -> None:
        read = [self._labels_of(t) for t in call.tensors]  # first: an operation in place changes them
        super().follow(call)
        self.steps[-1].read = [labels for labels in read if labels is not None]
        self.steps[-1].given = [self._labels_of(t) for t in call.outputs]

    def _labels_of(self, value: Any) -> np.ndarray | None:
        info = self.ledger.look_up(value) if isinstance(value, Tensor) else None
        return narrow(info.labels) if isinstance(info, LabelledTensor) else None


class _Follower(Mode):
    """Notes the same operations of another network, and the shapes that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))
        if is_grouped_product(func):
            with self:
                return multiply_groups(*args, **(kwargs or {}))
        self.names.append(name_operation(func))
        out = func(*args, **(kwargs or {}))
        self.shapes.append([tuple(t.shape) if isinstance(t, Tensor) else () for t in _as_list(out)])
        return out


def _as_list(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


class Forecast:
    """What every operation of a network reads and gives, as channels of its groups."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> None:
        """
        Raises:
            ModelError: the network does not run on these inputs.
        """
        self.model, self.graph, self.inputs = model, graph, inputs
        recorder = self._record()
        relations = recorder.ledger.relations
        settle_shared(relations)  # it unites channels
        self.owner = np.full(relations.count, -1)  # group of each label, by number
        self.channel = np.zeros(relations.count, np.int64)
        for number, group in enumerate(graph.groups):
            for member in group.members if group.is_channel else ():
                if member.key() in relations.tables:
                    labels = relations.roots(relations.tables[member.key()][member.positions])
                    self.owner[labels] = number
                    self.channel[labels] = np.arange(group.size)[:, None]
        self.blocks = [
            (group.name, relations.roots(relations.tables[member.key()][member.positions]))
            for group in graph.groups if not group.is_channel
            for member in group.members if member.key() in relations.tables
        ]  # fmt: skip
        roots = lambda labels: None if labels is None else relations.roots(labels)  # noqa: E731
        self.steps = [_Step(s.name, [*map(relations.roots, s.read)], [*map(roots, s.given)]) for s in recorder.steps]

    @cached_property
    def _scratch(self) -> nn.Module:
        return copy_model(self.model)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in named_tensors(self.model).items()}

    def _record(self) -> _Recorder:
        """On inputs with no two values alike, or as they are where the network does not take other values."""
        varied = self.inputs.varied()
        try:
            recorder = self._record_on(varied)
            self.inputs = varied
        except ModelError:
            recorder = self._record_on(self.inputs)
        return recorder

    def _record_on(self, inputs: Inputs) -> _Recorder:
        recorder = _Recorder(Ledger(self.model))
        with follow_run(recorder, self.model, inputs), recorder, Draws(mean=True):
            self._call_all(inputs, lambda given: follow_call(recorder.ledger, self.model, given))
        return recorder

    def run(self, sizes: Mapping[str, int]) -> Trial:
        """A network in which these groups have only their first channels, run as far as it goes."""
        follower, error = _Follower(), None
        try:
            self._run_cut(sizes, follower)
        except Exception as caught:  # anything that goes wrong is a reason to leave groups alone
            error = caught
        last = len(follower.shapes) if error else len(self.steps)
        first = self._find_first_other(follower, sizes, last)
        suspects = [self._list_seen(step) for step in dict.fromkeys((first, last))]
        return Trial(error, (first, last), tuple(names for names in suspects if names))

    def _run_cut(self, sizes: Mapping[str, int], follower: _Follower) -> None:
        small = self._scratch if self.graph.calls == 1 else copy_model(self.model)  # else it keeps a state
        cut = weights_written(small, cut_weights(self.weights, self.graph, sizes))
        with cut, evaluate_alone(small), decompose(small), follower, Draws(mean=True):
            self._call_all(self.inputs, lambda given: given.call(small))

    def _call_all(self, inputs: Inputs, call: Callable[[Inputs], list[Tensor]]) -> None:
        """Along all ways, decided alike in every network."""
        with answered(self.graph.ways):
            call_ways(call, inputs, self.graph.calls, ())
        call_ways(call, inputs, 0, self.graph.ways)

    def _find_first_other(self, follower: _Follower, sizes: Mapping[str, int], last: int) -> int:
        """The first operation that is another one, or gives another shape than the channels that are left."""
        left = self._find_left(sizes)
        for index, (step, name, shapes) in enumerate(zip(self.steps, follower.names, follower.shapes, strict=False)):
            if index >= last or name != step.name or _differs(step.given, shapes, left):
                return index
        return last

    def _find_left(self, sizes: Mapping[str, int]) -> np.ndarray:
        """Whether the channel of each label is left."""
        size = np.array([sizes.get(g.name, g.size) for g in self.graph.groups] + [np.iinfo(np.int64).max])
        left = self.channel < size[self.owner]
        for name, labels in self.blocks:
            left[labels[sizes.get(name, len(labels)) :]] = False
        return left

    def _list_seen(self, index: int) -> tuple[str, ...]:
        """Groups that an operation sees: what only its outputs show first, as what it pads with."""
        if index >= len(self.steps):
            return ()
        step = self.steps[index]
        read, given = list(self._list_owners(step.read)), list(self._list_owners(step.given))
        return tuple(dict.fromkeys([*(name for name in given if name not in read), *read]))

    def _list_owners(self, labels: Sequence[np.ndarray | None]) -> Iterator[str]:
        for array in labels:
            if array is not None:
                yield from (self.graph.groups[k].name for k in np.unique(self.owner[array]).tolist() if k >= 0)


def _differs(given: Sequence[np.ndarray | None], shapes: Sequence[tuple[int, ...]], left: np.ndarray) -> bool:
    """Whether an output has another size along a dimension of channels than there are with one that is left."""
    for labels, shape in zip(given, shapes, strict=False):
        if labels is None or labels.size == 1:
            continue
        kept = left[labels]
        for dim in (d for d, n in enumerate(labels.shape) if n > 1):
            others = tuple(d for d in range(labels.ndim) if d != dim)
            if len(shape) != labels.ndim or shape[dim] != np.count_nonzero(kept.any(others)):
                return True
    return False


def cut_weights(weights: Mapping[str, Tensor], graph: ChannelGraph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors that change where groups lose their last channels: right in their shapes, whatever they hold."""
    touching: dict[str, list[tuple[Member, int]]] = defaultdict(list)
    for group in graph.groups:
        if sizes.get(group.name, group.size) < group.size:
            for member in group.members:
                touching[member.tensor].append((member, sizes[group.name]))
    return {name: shorten(weights[name], parts, name) for name, parts in touching.items()}
