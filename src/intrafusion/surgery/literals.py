"""Sizes that a network holds as numbers in its attributes: which must follow, found by trying.

A `view`, a `split` or a padding may take a size from an attribute, from a list or from a config. Surgery cannot know
which numbers are widths: 16 may be channels, pixels or a batch. So where the smaller network fails, the numbers of the
modules that were running are tried, old size -> new size, those first that the failing function names; a number counts
only if the network then runs and bears out all that is asked of it.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import CodeType, TracebackType
from typing import NamedTuple

from torch import nn

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import Memory, preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.surgery.blame import counted_calls, find_lines, list_steps
from intrafusion.surgery.numbers import find_numbers, write_number_
from intrafusion.surgery.scopes import find_scope, is_inside
from intrafusion.surgery.write import Repair, find_own_tensors, make_repairs_

_TRIES = 24  # networks that are run for one set of groups
_PART_TRIES = 12  # for some groups of these
_ALL_TRIES = 96  # and in all
_OPTIONS = 12  # at one failure
_END = 1 << 40  # more than any network has calls of modules
_SUM, _ORIGINS = "tensor", frozenset(["channel", "block", "tensor"])  # of a size
_IN_VAIN = 3  # failures at one place that nothing mended, after which they are not looked at again

Place = tuple[str, str]
"""A module's name, and a place in it; see `numbers`."""

Numbers = Mapping[Place, int]
"""What is written to places."""


class _Change(NamedTuple):
    """A size that became another.

    scope: the smallest module around all groups that made it so; origin: the kind of the group that has this size, or
    that it is a dimension of a tensor, to which several may add up.
    """

    old: int
    new: int
    scope: str
    origin: str


class _Lesson(NamedTuple):
    """How numbers of one kind followed: groups inside the module, and what is as large as the number: see `_Change`."""

    inside: bool
    origins: frozenset[str]


_Targets = dict[int, bool]
"""What a number may become, the likeliest first, and whether groups that lie inside its module say so."""


@dataclass(frozen=True)
class Breakdown:
    """What went wrong with a network: in words, and the modules that were running, the innermost first.

    Attributes:
        named: what the code of each of these modules mentions: in the expression that failed, in the whole function.
        place: where in the code.
        calls: of modules until then, one that lasts; a network that ran to its end came further than any.
        final: whether no number can mend it.
        runs: whether it runs, and shows other groups or gives something else.
        around: the module where it is seen, if no code failed.
    """

    why: str
    running: tuple[str, ...] = ()
    named: tuple[tuple[set[str], set[str]], ...] = ()
    place: tuple[tuple[int, int], ...] = ()
    final: bool = False
    runs: bool = False
    around: str = ""
    calls: int = _END

    __repr__ = show_briefly

    @classmethod
    def of(cls, why: str, error: Exception, model: nn.Module, calls: int = 0) -> Breakdown:
        names = {id(m): n for n, m in model.named_modules()}
        found: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
        for step in list_steps(error):
            code = step.tb_frame.f_code
            module = step.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(module, nn.Module) and id(module) in names:
                near, far = found[names[id(module)]]
                near |= _find_names_near(step)
                far |= set(code.co_names)
        place = tuple((id(step.tb_frame.f_code), step.tb_lasti) for step in list_steps(error))
        return cls(why, tuple(found), tuple(found.values()), place, calls=calls)

    def is_like(self, other: Breakdown) -> bool:
        """Whether a network came no further than another."""
        if self.running or other.running:
            return (self.running, self.place, self.calls) == (other.running, other.place, other.calls)
        return self.why == other.why


def _find_names_near(step: TracebackType) -> set[str]:
    """Attributes that are read on the lines of the expression that failed."""
    first, last = find_lines(step)
    code = step.tb_frame.f_code
    return {name for name, line in _list_attributes_read(code, code.co_linetable) if first <= line <= last}


@lru_cache(maxsize=512)
def _list_attributes_read(code: CodeType, _: bytes) -> list[tuple[str, int]]:
    """Attributes that a function reads, each with its line; the same code may stand on other lines elsewhere."""
    reads = (i for i in dis.get_instructions(code) if i.opname in ("LOAD_ATTR", "LOAD_METHOD") and i.positions)
    return [(str(i.argval), i.positions.lineno or 0) for i in reads if i.positions]


Check = Callable[[nn.Module, tuple[Repair, ...]], Breakdown | None]
"""What is wrong with a smaller network that was given these repairs; None if nothing is."""


@dataclass(eq=False)
class Literals:
    """Searches numbers that make smaller networks of one original right, and remembers which kinds of them did.

    Attributes:
        learned: (class of a module, place) of numbers that had to follow before: tried first; and what they followed.
        in_vain: how often nothing led past a place in the code; the empty place: where nothing failed to run.
    """

    model: nn.Module
    graph: ChannelGraph
    inputs: Inputs
    learned: dict[tuple[type, str], _Lesson] = field(default_factory=dict)
    in_vain: Counter[tuple[tuple[int, int], ...]] = field(default_factory=Counter)
    left: int = _ALL_TRIES

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.shapes = {n: tuple(t.shape) for n, t in named_tensors(self.model).items()}
        self.numbers = _find_all_numbers(self.model)

    @cached_property
    def shapes_of_outputs(self) -> list[tuple[int, ...]]:
        with preserve_state(self.model):
            return [tuple(t.shape) for t in self.inputs.call(self.model)]

    def holds_any_of(self, sizes: Mapping[str, int]) -> bool:
        """Whether an attribute somewhere holds the old size of a group that is reduced, and there are tries left."""
        old = {g.size for g in self.graph.groups if sizes.get(g.name, g.size) < g.size}
        return self.left > 0 and any(n in old for own in self.numbers.values() for n in own.values())

    def exist(self, small: nn.Module, sizes: Mapping[str, int]) -> bool:
        """Whether a smaller network runs, or would with other numbers; which modules need them is not looked at."""
        run = functools.partial(self.run, memory=Memory(small))  # one for all tries: they differ in numbers alone
        failure = run(small, ())
        return failure is None or self.search(small, sizes, failure, run, each=False) is not None

    def search(
        self, small: nn.Module, sizes: Mapping[str, int], failure: Breakdown, check: Check, *, each: bool = True
    ) -> Numbers | None:
        """Numbers with which a smaller network passes a check; None if none were found.

        Args:
            small: the network without them, which is written to, and as it was afterwards.
            sizes: of the groups that were reduced.
            failure: what is wrong with it as it is.
            check: looks at `small` with the numbers written.
            each: whether every one of the numbers is asked whether it has to follow, beside every kind of them.
        """
        if failure.final or self.in_vain[failure.place] >= _IN_VAIN:
            return None
        search = _Search(self, small, self._find_changes(small, sizes), check, min(_TRIES, self.left), each)
        found = search.run(failure)
        self.left -= min(_TRIES, self.left) - search.left
        if found is None:
            self.in_vain.update(search.stuck)
        else:
            self.learned |= search.find_kinds(found)
        return found

    def search_part(self, small: nn.Module, sizes: Mapping[str, int], numbers: Numbers) -> Numbers | None:
        """Numbers with which a network runs in which only some groups were reduced, given those where all are.

        Those that can follow do so if it runs with them: without, a view by head size runs, too, on fewer heads.
        """
        search = _Search(self, small, self._find_changes(small, sizes), self.run, _PART_TRIES)
        likely = {p: n for p, n in numbers.items() if n in search.find_targets(*p, own=True, exact=True)}
        if likely and (found := search.run_from(likely)) is not None:  # first: other heads may fit without them, too
            return found
        return search.run_from({})

    def fit_(self, small: nn.Module, sizes: Mapping[str, int]) -> None:
        """Let numbers of the kinds that had to follow before do so in another smaller network, as far as it then runs.

        Args:
            sizes: of the groups that were reduced in it.
        """
        if self.learned:
            search = _Search(self, small, self._find_changes(small, sizes), self.run, _PART_TRIES)
            found = search.run_from(search.recall())
            make_repairs_(small, self.repairs((search.run_from({}) if found is None else found) or {}))

    def run(self, small: nn.Module, _: tuple[Repair, ...], memory: Memory | None = None) -> Breakdown | None:
        """What goes wrong where a network is simply called: it fails, or gives outputs of other shapes.

        Args:
            memory: of the network, see `preserve_state`; then numbers are put back, too.
        """
        with counted_calls() as called:
            try:
                with preserve_state(small, memory):
                    found = [tuple(t.shape) for t in self.inputs.call(small)]
            except Exception as error:  # anything that a forward may raise
                return Breakdown.of("does not run", error, small, len(called))
        expected = self.shapes_of_outputs
        return None if found == expected else Breakdown(f"gives outputs {found} instead of {expected}")

    def find_old_sizes(self, small: nn.Module, sizes: Mapping[str, int]) -> set[int]:
        """Sizes of the original that are no sizes of a smaller network."""
        return {change.old for changes in self._find_changes(small, sizes).values() for change in changes}

    def repairs(self, numbers: Numbers) -> tuple[Repair, ...]:
        return tuple(Repair(name, place, self.numbers[name][place], new) for (name, place), new in numbers.items())

    def _find_changes(self, small: nn.Module, sizes: Mapping[str, int]) -> Mapping[str, set[_Change]]:
        """Sizes that changed, by the module that owns a tensor of that size."""
        changes: dict[str, set[_Change]] = defaultdict(set)
        reduced = [g for g in self.graph.groups if sizes.get(g.name, g.size) < g.size]
        around: dict[tuple[str, int], set[str]] = defaultdict(set)
        for group in reduced:
            modules = {member.module for member in group.members}
            for member in group.members:
                changes[member.module].add(_Change(group.size, sizes[group.name], find_scope(modules), group.kind))
                around[member.tensor, member.dim] |= modules
        for name, tensor in named_tensors(small).items():
            for dim, (old, new) in enumerate(zip(self.shapes[name], tensor.shape, strict=False)):
                if old != new:
                    changes[name.rpartition(".")[0]].add(_Change(old, new, find_scope(around[name, dim]), _SUM))
        return changes


def _find_all_numbers(model: nn.Module) -> dict[str, dict[str, int]]:
    """By module and place, where they may be sizes."""
    return {
        name: {place: n for place, n in find_numbers(module).items() if n > 1}
        for name, module in model.named_modules()
        if not _is_told(module)
    }


def _is_told(module: nn.Module) -> bool:
    """Whether the sizes of a module are those of its tensors, see `write.find_attributes`."""
    return type(module).__module__.startswith("torch.nn.") and bool(find_own_tensors(module))


@dataclass(eq=False)
class _Search:
    """Depth first: at each failure a few choices of numbers, each tried until the network fails again or passes."""

    known: Literals
    small: nn.Module
    changes: Mapping[str, set[_Change]]
    check: Check
    left: int
    each: bool = True  # see `Literals.search`
    stuck: set[tuple[tuple[int, int], ...]] = field(default_factory=set)  # places that nothing led past

    def __post_init__(self) -> None:
        self.modules = dict(self.small.named_modules())
        now = _find_all_numbers(self.small)  # what surgery itself repaired differs
        self.numbers = {
            name: {place: n for place, n in own.items() if now.get(name, {}).get(place) == n}
            for name, own in self.known.numbers.items()
        }

    def run(self, failure: Breakdown) -> Numbers | None:
        start = self.recall()
        if start and (found := self.run_from(start)) is not None:
            return self._without_idle(found)
        found = self._descend({}, failure)
        return found and self._without_idle(found)

    def run_from(self, start: Numbers) -> Numbers | None:
        """Begin with these numbers."""
        found = self._try(start)
        if not isinstance(found, Breakdown):
            return found
        found = self._descend(start, found)
        return found and self._without_idle(found)

    def _without_idle(self, numbers: Numbers) -> Numbers:
        """Only what has to follow: another number of that size may be one of pixels, used where nobody looked."""
        for kind in {self._kind(place): None for place in numbers}:
            fewer = {place: n for place, n in numbers.items() if self._kind(place) != kind}
            if fewer and self.left > 0 and not isinstance(self._try(fewer), Breakdown):
                numbers = fewer
        for place in numbers if self.each else ():  # one module of a class may need what another does not
            fewer = {other: n for other, n in numbers.items() if other != place}
            if fewer and self.runs_with(fewer) and not isinstance(self._try(fewer), Breakdown):
                numbers = fewer
        return numbers

    def runs_with(self, numbers: Numbers) -> bool:
        """Whether the network gives outputs of the same shapes with these numbers, which takes one call."""
        with self._written(numbers):
            return self.known.run(self.small, ()) is None

    def _kind(self, place: Place) -> tuple[type, str]:
        return type(self.known.modules[place[0]]), place[1]

    def recall(self) -> Numbers:
        """Numbers of the kinds that had to follow before."""
        learned = self.known.learned
        places = [(n, p) for n, own in self.numbers.items() for p in own if self._kind((n, p)) in learned]
        wanted = {place: self._find_likely(*place, *learned[self._kind(place)]) for place in places}
        return {place: n for place, n in wanted.items() if n is not None}

    def find_kinds(self, numbers: Numbers) -> dict[tuple[type, str], _Lesson]:
        """The kinds of these numbers, and what they follow."""
        return {self._kind(place): self._find_lesson(place, n) for place, n in numbers.items()}

    def _find_lesson(self, place: Place, new: int) -> _Lesson:
        old, changes = self.numbers[place[0]][place[1]], self._changes_in(place[0])
        inside = self.find_targets(*place, own=True).get(new, False)
        for find in (_follow, _follow_in_proportion):
            origins = {c.origin for c in changes if any(n == new for n, _ in find(old, [c]))}
            if origins:
                return _Lesson(inside, _ORIGINS if _SUM in origins else frozenset(origins))
        return _Lesson(inside, _ORIGINS)

    def _find_likely(self, name: str, place: str, inside: bool, origins: frozenset[str] = _ORIGINS) -> int | None:
        """What a number becomes where it follows as one of its kind did; None where there is nothing for it to."""
        targets = self.find_targets(name, place, own=True, origins=origins)
        return next((n for n, is_inside in targets.items() if is_inside or not inside), None)

    def _try(self, numbers: Numbers) -> Numbers | Breakdown:
        """The numbers, if the network passes with them, else what is wrong."""
        self.left -= 1
        with self._written(numbers) as repairs:
            return self.check(self.small, repairs) or numbers

    @contextlib.contextmanager
    def _written(self, numbers: Numbers) -> Iterator[tuple[Repair, ...]]:
        repairs = self.known.repairs(numbers)
        for repair in repairs:
            write_number_(self.modules[repair.module], repair.attribute, repair.new)
        try:
            yield repairs
        finally:
            for repair in repairs:
                write_number_(self.modules[repair.module], repair.attribute, repair.old)

    def _descend(self, numbers: Numbers, failure: Breakdown) -> Numbers | None:
        if self.known.in_vain[failure.place] >= _IN_VAIN:
            return None
        further, later = False, list[tuple[Numbers, Breakdown]]()
        for option in itertools.islice(self._list_options(numbers, failure), _OPTIONS):
            if self.left <= 0:
                return None
            found = self._try({**numbers, **option})
            if isinstance(found, Breakdown):
                further |= not found.is_like(failure)
                if found.calls < failure.calls:  # a step back, which only others may turn into one ahead
                    later.append(({**numbers, **option}, found))
                    continue
                found = None if found.is_like(failure) else self._descend({**numbers, **option}, found)
            if found is not None:
                return found
        for tried, found in later if self.left > 0 else ():
            if (mended := self._descend(tried, found)) is not None:
                return mended
        if not further:
            self.stuck.add(failure.place)
        return None

    def _list_options(self, numbers: Numbers, failure: Breakdown) -> Iterator[Numbers]:
        """What may mend a failure, the likeliest first, each choice once."""
        seen: list[Numbers] = []
        for option in self._propose(numbers, failure):
            if option and option not in seen:
                seen.append(option)
                yield option

    def _propose(self, numbers: Numbers, failure: Breakdown) -> Iterator[Numbers]:
        if failure.final:
            return
        for name, named in zip(failure.running, failure.named, strict=True):
            own = {p: t for p in self.numbers.get(name, ()) if (t := self.find_targets(name, p))}
            own = {p: t for p, t in own.items() if (name, p) not in numbers}
            for mentioned in named:
                places = {p: own.pop(p) for p in list(own) if mentioned & set(p.split("."))}
                exact = {p: t for p, t in places.items() if self.find_targets(name, p, exact=True)}
                for choice in itertools.chain(itertools.islice(_list_choices(exact), 1), _list_choices(places)):
                    yield self._extended(name, choice, numbers)
                    yield {(name, place): n for place, n in choice.items()}
        yield from self._propose_anywhere(numbers, failure.around)

    def _propose_anywhere(self, numbers: Numbers, around: str) -> Iterator[Numbers]:
        """Where a network does not say what is wrong with it, or where what it says came too late."""
        kinds = self._find_all_targets(numbers, around, exact=True)
        yield from kinds.values()
        yield from self._find_all_targets(numbers, around, exact=False).values()
        for a, b in itertools.combinations(kinds.values(), 2):
            yield a | b
        for option in kinds.values():
            yield from ({place: n} for place, n in option.items())

    def _find_all_targets(
        self, numbers: Numbers, around: str, *, exact: bool
    ) -> dict[tuple[type, str], dict[Place, int]]:
        """What all other numbers may become, by kind; without `exact`, those that follow groups in their modules.

        Those in `around` come first, and what a module holds itself before what its config does.
        """
        kinds: dict[tuple[type, str], dict[Place, int]] = defaultdict(dict)
        for name, own in self.numbers.items():
            for place in own:
                targets = self.find_targets(name, place, own=True, exact=exact)
                likely = next((n for n, inside in targets.items() if exact or inside), None)
                if likely is not None and (name, place) not in numbers:
                    kinds[self._kind((name, place))][name, place] = likely
        is_far = lambda places: not any(is_inside(name, around) for name, _ in places)  # noqa: E731
        return dict(sorted(kinds.items(), key=lambda kind: (is_far(kind[1]), kind[0][1].count("."))))

    def _extended(self, name: str, choice: Mapping[str, int], numbers: Numbers) -> Numbers:
        """The same places in all modules of one class at once, where they hold sizes that changed."""
        option = {(name, place): n for place, n in choice.items()}
        inside = {place: self.find_targets(name, place)[n] for place, n in choice.items()}
        for other, own in self.numbers.items():
            if other != name and type(self.known.modules[other]) is type(self.known.modules[name]):
                for place in choice.keys() & own.keys():
                    likely = self._find_likely(other, place, inside[place])
                    if likely is not None and (other, place) not in numbers:
                        option[other, place] = likely
        return option

    def find_targets(
        self, name: str, place: str, *, own: bool = False, exact: bool = False, origins: frozenset[str] = _ORIGINS
    ) -> _Targets:
        """What a number of a module may become: the new sizes of what had its size, from the nearest module that has.

        Else in proportion to a size that it is a multiple or a fraction of. What groups make it that lie inside the
        module comes first: an attention's own width may be that of the stream that it reads, too.

        Args:
            own: look no further than the module itself and what is in it.
            exact: nothing in proportion.
            origins: of the sizes that it may follow.
        """
        old = self.numbers[name][place]
        scopes = [name] if own else _list_ancestors(name)
        for find in (_follow,) if exact else (_follow, _follow_in_proportion):
            for scope in scopes:
                if found := find(old, [c for c in self._changes_in(scope) if c.origin in origins]):
                    inside = {n: any(is_inside(s, name) for m, s in found if m == n) for n, _ in found}
                    return dict(sorted(inside.items(), key=lambda item: (not item[1], item[0])))
        return {}

    def _changes_in(self, scope: str) -> set[_Change]:
        return set().union(*(changes for name, changes in self.changes.items() if is_inside(name, scope)))


def _follow(old: int, changes: Iterable[_Change]) -> set[tuple[int, str]]:
    """The new sizes of what had this one, each with where its groups are."""
    return {(c.new, c.scope) for c in changes if c.old == old}


def _follow_in_proportion(old: int, changes: Iterable[_Change]) -> set[tuple[int, str]]:
    """The same for a multiple or a fraction of a size."""
    near = [c for c in changes if c.old > 1 and (old % c.old == 0 or c.old % old == 0)]
    return {(old * c.new // c.old, c.scope) for c in near if old * c.new >= c.old and old * c.new % c.old == 0}


def _list_ancestors(name: str) -> list[str]:
    """A module and all that it lies in, the innermost first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:k]) for k in range(len(parts), -1, -1)]


def _list_choices(places: Mapping[str, _Targets]) -> Iterator[dict[str, int]]:
    """All places at once, each alone, two at a time."""
    if not places:
        return
    yield {place: next(iter(targets)) for place, targets in places.items()}
    for count in (1, 2):
        for some in itertools.combinations(places, count):
            for targets in itertools.product(*(places[place] for place in some)):
                yield dict(zip(some, targets, strict=True))
