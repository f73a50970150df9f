"""The ways through a forward that goes by the values of its tensors.

What a trace sees of `if x.mean() > 0` is one branch. The others are found by giving the other answer at every place
where a value is read back, by letting masks select everything, and on other inputs. A way is followed if it shows a
step that no other has shown: an operation at a place of the code, on what another step, or a parameter, gave.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, Way
from intrafusion.network.batches import cast_like, count_images, take_images
from intrafusion.network.decisions import Decisions, find_place, is_within, name_line, take_way
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import preserve_state
from intrafusion.trace.call import find_tensors, name_operation
from intrafusion.trace.decomposition import decompose
from intrafusion.trace.random import Draws

_RUNS = 64  # forward passes in which ways are looked for
_WAYS = 24  # that are followed
_NUMBERS = 64  # below which whole numbers are tried as an answer, where parameters were not reached
_FRUITLESS = 2  # whole numbers that make no difference, or are not taken, after which no other is tried

_Step = tuple[object, ...]


@dataclass(frozen=True)
class Ways:
    """What was found.

    Attributes:
        followed: the way of the example first.
        places: lines of the code that read values.
        reached: parameters that one of them used.
        whole: whether every answer was tried that there can be.
    """

    followed: tuple[Way, ...]
    places: tuple[str, ...]
    reached: frozenset[str]
    whole: bool

    __repr__ = show_briefly


class _Steps(Mode):
    """The steps of a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.made = WeakTensorKeyDictionary()
        self.steps: set[_Step] = set()
        self.reached: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = find_tensors((*args, *kwargs.values()))
        sources = [self.names.get(id(t)) or self.made.get(t, "") for t in given]
        out = func(*args, **kwargs)
        own = name_operation(func), find_place(), *(s for s in sources if isinstance(s, str)), _is_empty(given)
        self.steps.update((index, source, own) for index, source in enumerate(sources))
        self.reached.update(self.names[id(t)] for t in given if id(t) in self.names)
        for tensor in find_tensors((out,)):
            self.made[tensor] = own
        return out


def _is_empty(tensors: Iterable[Tensor]) -> bool:
    return any(t.numel() == 0 for t in tensors)


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A run that is to be made.

    Attributes:
        inputs: None for those of the example.
        number: the place that answers a whole number, which is left out where all parameters are reached.
        fruitless: whole numbers just before it that made no difference.
        before: the steps that the number before it showed.
    """

    inputs: Inputs | None = None
    forced: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    number: str = ""
    fruitless: int = 0
    before: Set[_Step] = frozenset()

    __repr__ = show_briefly


@dataclass(eq=False)
class _Search:
    """The runs that were made so far, and those that are to be made."""

    model: nn.Module
    example: Inputs
    covered: set[_Step] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    asked: set[tuple[str, Any]] = field(default_factory=set)
    places: dict[str, None] = field(default_factory=dict)
    followed: list[Way] = field(default_factory=list)
    queue: deque[_Attempt] = field(default_factory=deque)
    runs: int = 0
    whole: bool = True

    __repr__ = show_briefly

    def run(self, attempt: _Attempt) -> tuple[_Steps, Decisions] | ModelError:
        """What it shows, or why the network does not run so."""
        self.runs += 1
        made = Decisions(forced=attempt.forced, whole=attempt.whole)
        try:
            return self.pass_through(attempt.inputs or self.example, made)
        except ModelError as error:
            return error

    def pass_through(self, inputs: Inputs, made: Decisions) -> tuple[_Steps, Decisions]:
        """
        Raises:
            ModelError: the network does not run so.
        """
        steps = _Steps(self.model)
        with preserve_state(self.model), torch.no_grad(), decompose(self.model), Draws(mean=True):  # noqa: SIM117
            with steps, made.played():
                inputs.call(self.model)
        return steps, made

    def go_on(self) -> None:
        """Until nothing is left to try."""
        while self.queue and self.runs < _RUNS and len(self.followed) < _WAYS:
            attempt = self.queue.popleft()
            if not (attempt.number and self.has_all()):
                self.try_one(attempt)
        self.whole = self.whole and not self.queue

    def has_all(self) -> bool:
        return self.reached >= {name for name, _ in self.model.named_parameters()}

    def try_one(self, attempt: _Attempt) -> None:
        found = self.run(attempt)
        if isinstance(found, ModelError) and attempt.forced and attempt.whole:
            found = self.run(attempt := replace(attempt, whole=False))
        if isinstance(found, ModelError):
            harmless = attempt.number or not attempt.forced or _is_deliberate(found)
            self.whole = self.whole and bool(harmless)
            if attempt.number:
                self.ask_next(replace(attempt, fruitless=attempt.fruitless + 1))
            return
        steps, made = found
        if steps.steps - self.covered or not self.followed:
            own = None if attempt.inputs is None else (attempt.inputs.args, dict(attempt.inputs.kwargs or {}))
            self.followed.append(Way(made.record, own))
        self.covered |= steps.steps
        self.reached |= steps.reached
        self.places |= dict.fromkeys(map(name_line, (*made.made, *made.opaque)))
        self.whole = self.whole and not made.opaque
        if attempt.number:
            fruitless = attempt.fruitless + 1 if steps.steps == attempt.before else 0
            self.ask_next(replace(attempt, fruitless=fruitless, before=steps.steps))
        self.ask(attempt, made)

    def ask(self, attempt: _Attempt, made: Decisions) -> None:
        """Queue what else may be answered."""
        base = replace(attempt, whole=made.selects, number="", fruitless=0, before=frozenset())
        if made.selects and not attempt.whole:
            self.add(base, "", None)
        for place, values in made.values.items():
            if is_within(place):
                continue
            if _is_whole_number(values[0]) and (place, -1) not in self.asked:
                self.asked |= {(place, -1), *((place, value) for value in values)}
                self.ask_next(replace(base, forced={**base.forced, place: -1}, number=place))
            for answer in _list_answers(values):
                key = answer if isinstance(answer, bool) else math.copysign(1, answer) * bool(answer)
                self.add(replace(base, forced={**base.forced, place: answer}), place, key)

    def ask_next(self, attempt: _Attempt) -> None:
        """Queue the whole number behind one that was tried."""
        place, last = attempt.number, attempt.forced[attempt.number]
        answer = next((n for n in range(last + 1, _NUMBERS) if (place, n) not in self.asked), None)
        if answer is not None and attempt.fruitless < _FRUITLESS:
            self.add(replace(attempt, forced={**attempt.forced, place: answer}), place, answer)

    def add(self, attempt: _Attempt, place: str, answer: Any) -> None:
        if (place, answer) not in self.asked:
            self.asked.add((place, answer))
            self.queue.append(attempt)


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_deliberate(error: ModelError) -> bool:
    """Whether the forward itself raised it: what it does not take, no other way needs."""
    cause = error.__cause__
    step = None if cause is None else cause.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    inside = step is not None and step.tb_frame.f_code.co_filename.startswith(str(Path(torch.__file__).parent))
    return isinstance(cause, AssertionError) or not (inside or isinstance(cause, (RuntimeError, IndexError)))


def _list_answers(values: Sequence[Any]) -> Iterator[Any]:
    """What else a place may answer than these; whole numbers are tried one after another.

    >>> list(_list_answers([True, True])), list(_list_answers([0.5])), list(_list_answers([7]))
    ([False], [1000.0, -1000.0, 0.0], [])
    """
    if isinstance(values[0], bool):
        yield from (answer for answer in (True, False) if set(values) != {answer})
    elif isinstance(values[0], float):
        large = 1e3 * (abs(values[0]) + 0.5)
        yield from (large, -large, 0.0)


def find_ways(model: nn.Module, example: Inputs, as_given: Inputs) -> Ways:
    """The ways through a forward that decides by values.

    Args:
        example: on which it was traced.
        as_given: the same as it was given.
    """
    search = _Search(model, example, queue=deque([_Attempt(), _Attempt(as_given)]))
    search.queue.extend(map(_Attempt, _list_others(as_given)))
    search.go_on()
    return _sum_up(search)


def find_more_ways(model: nn.Module, example: Inputs, known: Sequence[Way], given: Iterable[Inputs]) -> Ways | None:
    """The same with those that other inputs take; None where these take none that is not known.

    Args:
        known: what was followed; the example's first.
    """
    search = _Search(model, example)
    for way in known:
        inputs = take_way(example, way)
        steps, made = search.pass_through(inputs, Decisions(way.answers))
        search.covered |= steps.steps
        search.reached |= steps.reached
        search.places |= dict.fromkeys(map(name_line, made.made))
    search.followed = list(known)
    for call in given:
        for part in _shorten(search, cast_like(call, model)):
            search.try_one(_Attempt(replace(part, outputs=example.outputs)))
    if len(search.followed) == len(known):
        return None
    search.go_on()
    return _sum_up(search)


def _shorten(search: _Search, call: Inputs) -> Iterator[Inputs]:
    """The fewest first images of a call that show what all of them do; none where that is known."""
    found = search.run(_Attempt(call))
    if isinstance(found, ModelError) or found[0].steps <= search.covered:
        return
    new, total, count = found[0].steps - search.covered, count_images(call), 1
    while count < total:
        part = take_images(call, 0, count)
        tried = search.run(_Attempt(part))
        if not isinstance(tried, ModelError) and tried[0].steps >= new:
            yield part
            return
        count *= 2
    yield call


def _list_others(inputs: Inputs) -> Iterator[Inputs]:
    """Other values in the shapes of the example."""
    change = lambda function: inputs.map(lambda t: function(t) if t.is_floating_point() else t)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    noise = lambda t: torch.randn(t.shape, generator=generator).to(t)  # noqa: E731
    yield change(lambda t: -t)
    yield change(lambda t: 10 * t)
    yield from (change(noise) for _ in range(2))


def _sum_up(search: _Search) -> Ways:
    return Ways(tuple(search.followed), tuple(filter(None, search.places)), frozenset(search.reached), search.whole)


def block_unseen(graph: ChannelGraph, found: Ways) -> ChannelGraph:
    """The graph, in which groups that a way may share that nobody found are left alone.

    Such a way uses parameters that none of those that were found did, and can share only channels that are as many as
    one of these has entries along a dimension, or a part of that, as where several pixels follow one another.
    """
    unseen = {name: shape for name, shape in graph.shapes.items() if name not in found.reached}
    reasons = {g.name: why for g in graph.reducible if (why := _explain_unseen(g, unseen, found.places))}
    groups = tuple(replace(g, reason=reasons.get(g.name, g.reason)) for g in graph.groups)
    return replace(graph, groups=groups)


def _explain_unseen(group: ChannelGroup, unseen: Mapping[str, tuple[int, ...]], places: Sequence[str]) -> str:
    """Why a group is left alone; empty where nothing unseen fits it."""
    size = max((len(m.positions) * m.positions.shape[1] for m in group.members), default=group.size)
    sizes = {group.size, size}
    name = next((n for n, shape in unseen.items() if any(d % n0 == 0 for d in shape for n0 in sizes if n0 > 1)), None)
    if name is None:
        return ""
    where = f" ({Path(places[0]).name})" if places else ""
    return (
        f"the forward goes by values that it reads{where}, and {name}, which was not used on any input that was tried, "
        "may share these channels; give inputs= that use it"
    )
