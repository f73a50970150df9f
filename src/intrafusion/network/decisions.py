"""What a forward decides by the values of its tensors: noted, and answered as it was once, or otherwise.

A forward decides where it reads a value back (`if x.mean() > 0`, `.item()`, `.tolist()`), and where values say which
rows go on (`nonzero`, masks as indices). A trace sees one way through it; the others are found by other answers.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from intrafusion.brief import show_briefly
from intrafusion.graph import Way
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode

_WITHIN = " within"
_OFTEN = 64  # times that a place gets the same answer at most, as a loop may wait for another

_aten = torch.ops.aten
_READS = frozenset([_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal])
_INDICES = frozenset([_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index])
_SELECTS = frozenset([_aten.nonzero, _aten.masked_select])
_ORDERS = frozenset([_aten.topk, _aten.sort, _aten.argmax, _aten.argmin])
_LISTS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_TORCH, _OURS = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_LAB = str(Path(_OURS) / "lab")


def decides(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation reads a value back, or gives as many rows as values say.

    >>> mask = torch.tensor([True, False])
    >>> decides(_aten.index.Tensor, (torch.zeros(2), [mask])), decides(_aten.add.Tensor, (mask, mask))
    (True, False)
    """
    packet = _find_packet(func)
    return packet is not None and (
        packet in _READS or packet in _SELECTS or (packet in _INDICES and any(map(_is_mask, args[1])))
    )


@functools.cache
def _find_packet(func: Any) -> Any:
    """Which of the operations that may decide one is; None for all others, which most are."""
    packet = func.overloadpacket if isinstance(func, torch._ops.OpOverload) else None
    return packet if packet in _READS | _SELECTS | _INDICES | _ORDERS else None


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def find_place() -> str:
    """The line of the user's code that is running, `path:line`; empty where the network has none of its own.

    It ends with `_WITHIN` where a module of PyTorch runs there, as what that asks of values is whether they are valid.
    """
    frame, inside = sys._getframe(1), False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_TORCH):
            inside = inside or frame.f_code.co_name == "_call_impl"
        elif not name.startswith(_OURS) or name.startswith(_LAB):
            return f"{name}:{frame.f_lineno}{_WITHIN * inside}"
        elif inside:
            break
        frame = frame.f_back
    return _WITHIN * inside


@dataclass(frozen=True, eq=False)
class _Order:
    """Places in the order of their values, and the shape of what was sorted."""

    indices: Tensor
    among: torch.Size

    __repr__ = show_briefly


@dataclass(eq=False)
class Decisions:
    """What is decided while it is entered.

    Attributes:
        answers: what is answered, place by place, in the order in which it is asked; None, and what is asked beyond
            them or does not fit: what the values say.
        forced: what is answered at other places, again and again.
        whole: whether masks that are not answered select everything.
        ordered: whether the order of what is sorted is answered too.
        made: all answers, in the form of `answers`.
        values: those of them that were read back, by place.
        opaque: places at which values are read that cannot be answered.
    """

    answers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    forced: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        self.made: dict[str, list[Any]] = {}
        self.values: dict[str, list[Any]] = {}
        self.opaque: dict[str, None] = {}
        self.asked: Counter[str] = Counter()

    __repr__ = show_briefly

    @contextmanager
    def played(self) -> Iterator[Decisions]:
        with _Lists(self), _Operations(self):
            yield self

    @property
    def record(self) -> dict[str, tuple[Any, ...]]:
        return {place: tuple(made) for place, made in self.made.items()}

    @property
    def selects(self) -> bool:
        """Whether masks were asked for."""
        return any(isinstance(made[0], Tensor) for place, made in self.made.items() if place not in self.values)

    def read(self, place: str, real: Callable[[], Any]) -> Any:
        """A number or a truth value. Of numbers with a point, those are kept that were forced: others follow values."""
        answer, known = self._recall(place), place in self.forced and self.asked[place] < _OFTEN
        if answer is None:
            answer = self.forced[place] if known else real()
        self._keep(place, None if isinstance(answer, float) and not known else answer)
        self.values.setdefault(place, []).append(answer)
        return answer

    def select(self, place: str, mask: Tensor) -> Tensor:
        """Which of these places are selected."""
        answer = self._recall(place)
        if not isinstance(answer, Tensor) or answer.shape != mask.shape:
            answer = torch.ones_like(mask) if self.whole else mask
        self._keep(place, answer.detach().clone())
        return answer.to(mask)

    def order(self, place: str, real: Callable[[], Any], source: Tensor, dim: int) -> Any:
        """What is sorted, in the order that is answered."""
        found = real()
        indices = found if isinstance(found, Tensor) else found[1]
        answer = self._recall(place)
        if not isinstance(answer, _Order) or answer.among != source.shape or answer.indices.shape != indices.shape:
            self._keep(place, _Order(indices.detach().clone(), source.shape))
            return found
        self._keep(place, answer)
        order = answer.indices.clone()
        return order if isinstance(found, Tensor) else (source.gather(dim, order), order)

    def list(self, place: str, real: Callable[[], Any], source: Tensor) -> Any:
        """A tensor as a list of whole numbers or truth values; of numbers with a point, what they are."""
        if source.is_floating_point() or source.is_complex() or not source.numel():
            self.opaque |= {place: None} if source.numel() else {}
            return real()
        answer = self._recall(place)
        if not isinstance(answer, Tensor) or answer.shape != source.shape:
            known = place in self.forced and self.asked[place] < _OFTEN
            answer = torch.full_like(source, self.forced[place]) if known else source
        self._keep(place, answer.detach().clone())
        self.values.setdefault(place, []).extend(torch.unique(answer)[:_OFTEN].tolist())
        return answer.tolist()

    def _recall(self, place: str) -> Any:
        made = self.answers.get(place, ())
        index = self.asked[place]
        return made[index] if index < len(made) else None

    def _keep(self, place: str, answer: Any) -> None:
        self.asked[place] += 1
        self.made.setdefault(place, []).append(answer)


class _Operations(Mode):
    """Answers operations."""

    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self.decisions = decisions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, made, packet = kwargs or {}, self.decisions, _find_packet(func)
        if packet is None:
            return func(*args, **kwargs)
        real = lambda: func(*args, **kwargs)  # noqa: E731
        if packet in _READS:
            return made.read(f"{packet} {find_place()}", real)
        if packet is _aten.nonzero:
            return func(made.select(f"{packet} {find_place()}", args[0] != 0), **kwargs)
        if packet is _aten.masked_select:
            return func(args[0], made.select(f"{packet} {find_place()}", args[1]), **kwargs)
        if packet in _INDICES and any(map(_is_mask, args[1])):
            place = find_place()
            masks = [made.select(f"mask {place}", t) if _is_mask(t) else t for t in args[1]]
            return func(args[0], masks, *args[2:], **kwargs)
        if made.ordered and packet in _ORDERS:
            return made.order(f"{packet} {find_place()}", real, args[0], _find_dim(func, args, kwargs))
        return real()


def _find_dim(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Along which an operation sorts; the last where it does not say."""
    index = next((i for i, a in enumerate(func._schema.arguments) if a.name == "dim"), len(args))
    found = kwargs.get("dim", args[index] if index < len(args) else -1)
    return -1 if found is None else found


class _Lists(TorchFunctionMode):
    """Answers tensors that become lists or arrays, which no operation shows."""

    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self.decisions = decisions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        real = lambda: func(*args, **(kwargs or {}))  # noqa: E731
        if func is Tensor.tolist:
            return self.decisions.list(f"tolist {find_place()}", real, args[0])
        if func in _LISTS:
            self.decisions.opaque[f"numpy {find_place()}"] = None
        return real()


class ListsRead(TorchFunctionMode):
    """Notes whether tensors become lists or arrays.

    Attributes:
        found: whether one did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in _LISTS
        return func(*args, **(kwargs or {}))


def is_within(place: str) -> bool:
    """Whether a module of PyTorch asks there."""
    return place.endswith(_WITHIN)


def name_line(place: str) -> str:
    """The line of the user's code, `path:line`, of what is asked there.

    >>> name_line("aten.item /code/net.py:12 within"), name_line("aten.item  within")
    ('/code/net.py:12', '')
    """
    return place.partition(" ")[2].removesuffix(_WITHIN)


def call_ways(call: Callable[[Inputs], list[Tensor]], inputs: Inputs, calls: int, ways: Sequence[Way]) -> list[Tensor]:
    """What several calls in a row give, and then, along each other way through the forward, one."""
    outputs = [output for _ in range(calls) for output in call(inputs)]
    for way in ways[1:]:
        with Decisions(way.answers).played():
            outputs += call(take_way(inputs, way))
    return outputs


def take_way(inputs: Inputs, way: Way) -> Inputs:
    """The call with which a way is taken."""
    if way.arguments is None:
        return inputs
    args, kwargs = way.arguments
    return Inputs(args, kwargs, inputs.source, outputs=inputs.outputs)
