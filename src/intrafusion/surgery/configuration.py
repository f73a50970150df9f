"""Which numbers of a configuration set which sizes of a network, and the configuration that smaller tensors need.

Of networks of transformers, which are built from a configuration. No architecture is known here: a number is changed,
the network is built on the meta device, where nothing is allocated, and what has changed is what the number sets.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.names import name_some
from intrafusion.network.apart import forked_random_numbers
from intrafusion.network.double import TOLERANCE, copy_as_double, output_difference, run_in_double
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.surgery.numbers import list_numbers, with_number
from intrafusion.surgery.permute import add_reasons

Shapes = Mapping[str, tuple[int, ...]]
Side = tuple[str, int]
"""A dimension of a tensor."""

_STEPS: WeakKeyDictionary[ChannelGraph, Mapping[str, int]] = WeakKeyDictionary()
"""Of what every size in a graph of `tie_by_config` must be a multiple, by group."""
_SAVING = "save_pretrained"
_TRIED = 8  # values of one number
_UNSET = ("token", "type", "version", "architectures")  # parts of the names of what is None and no size


def is_configured(model: nn.Module) -> bool:
    """Whether it is a network of transformers, which `from_pretrained` builds from its configuration."""
    found = sys.modules.get("transformers.modeling_utils")  # not imported, or not to be: then there is no such network
    return found is not None and isinstance(model, found.PreTrainedModel)


def build_from_config(model: nn.Module, config: Any) -> nn.Module:
    """A network of the same class, with random weights: what `from_pretrained` makes of the configuration."""
    kind, read = type(model), type(config).from_dict
    with _silent(), forked_random_numbers():
        return kind(read(config.to_dict()))


@contextmanager
def _silent() -> Iterator[None]:
    """Without what transformers says of odd configurations, many of which are tried."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _build_shapes(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]] | None:
    """None where such a network cannot be built."""
    try:
        with torch.device("meta"):
            return {n: tuple(t.shape) for n, t in named_tensors(build_from_config(model, config)).items()}
    except Exception:  # whatever sizes that do not go together make it raise
        return None


# ---- which number sets what -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Number:
    """A number of a configuration, and by how much each side grows as it grows by one.

    Attributes:
        place: see `numbers`.
        value: what it is, or what None there stands for.
    """

    place: str
    value: int
    growth: Mapping[Side, Fraction]


def _find_numbers(model: nn.Module, config: Any, shapes: Shapes, sizes: Iterable[int]) -> Iterator[_Number]:
    """Those that set sides of one of these sizes, or multiples of them; what is None comes last."""
    wanted = {size for size in sizes if size > 1}
    for place, value in list_numbers(config).items():
        if value > 1 and any(size % value == 0 or value % size == 0 for size in wanted):
            yield from _probe(model, config, shapes, place, value)
    for place in _list_unset(config):
        for value in wanted:
            if _build_shapes(model, with_number(config, place, value)) == shapes:
                yield from _probe(model, config, shapes, place, value)


def _probe(model: nn.Module, config: Any, shapes: Shapes, place: str, value: int) -> Iterator[_Number]:
    for other in (2 * value, value // 2):
        found = _build_shapes(model, with_number(config, place, other))
        if found is None or found.keys() != shapes.keys():
            continue
        growth = {side: Fraction(b - a, other - value) for side, (a, b) in _compare(shapes, found).items()}
        if growth:
            yield _Number(place, value, growth)
        return


def _compare(before: Shapes, after: Shapes) -> dict[Side, tuple[int, int]]:
    """Sides that differ, with both sizes."""
    return {
        (name, dim): (a, b)
        for name in before
        for dim, (a, b) in enumerate(zip(before[name], after[name], strict=False))
        if a != b
    }


def _list_unset(config: Any, prefix: str = "") -> list[str]:
    """Places of None that may stand for a size."""
    found = []
    for name, value in vars(config).items():
        if value is None and not any(part in name for part in _UNSET):
            found.append(f"{prefix}{name}")
        elif hasattr(value, "to_dict"):
            found += _list_unset(value, f"{prefix}{name}.")
    return found


# ---- sizes that a configuration can say -----------------------------------------------------------------------------


def tie_by_config(graph: ChannelGraph, model: nn.Module) -> ChannelGraph:
    """The graph, in which groups are twins if one number of the configuration sets them; others are left alone.

    Raises:
        ModelError: the network has no configuration, or is another one than that says.
    """
    if graph in _STEPS:
        return graph
    numbers = _find_numbers_of(graph, model)
    groups = [g for g in graph.groups if g.is_channel and g.reducible]
    while True:
        sets = [(inside, step) for number, step in numbers if (inside := _find_set(number, groups))]
        steps = {g.name: step for inside, step in sets for g in inside}
        sound = [g for family in families_of(groups) if all(g.name in steps for g in family) for g in family]
        if len(sound) == len(groups):
            break
        groups = sound
    reason = f"no number of the {type(model.config).__name__} sets these channels alone, as uniform asks for"
    left = {g.name: reason for g in graph.groups if g.is_channel and g.reducible and g.name not in steps}
    joined = _join(inside for inside, _ in sets)
    tied = tuple(replace(g, family=joined.get(g.family, g.family)) for g in add_reasons(graph, left).groups)
    graph = replace(graph, groups=tied)
    _STEPS[graph] = steps
    return graph


def round_sizes(
    sizes: Mapping[str, int], graph: ChannelGraph, round_to: int | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Sizes that a configuration can say, which may be multiples of the number of heads, and what to say of them.

    Args:
        graph: as `tie_by_config` gives it.
    """
    rounded = dict(sizes)
    for group in graph.groups:
        step = math.lcm(_STEPS[graph].get(group.name, 1), round_to or 1)
        if sizes.get(group.name, group.size) < group.size and step <= group.size:
            rounded[group.name] = max(step, step * math.floor(sizes[group.name] / step + 0.5))
    changed = [name for name in sizes if rounded[name] != sizes[name]]
    told = ", ".join(f"{name_some([name])} {sizes[name]} -> {rounded[name]}" for name in changed[:3])
    return rounded, (f"uniform: sizes that no configuration can say were rounded: {told}",) if changed else ()


def _find_numbers_of(graph: ChannelGraph, model: nn.Module) -> list[tuple[_Number, int]]:
    """Numbers that can become smaller, and the steps in which they can."""
    if not is_configured(model):
        raise ModelError(
            "uniform: expected a network of transformers, whose configuration names sizes, "
            f"got {type(model).__name__}; leave uniform out."
        )
    config: Any = model.config
    shapes = _build_shapes(model, config)
    if shapes is None or shapes != {name: tuple(t.shape) for name, t in named_tensors(model).items()}:
        raise ModelError(
            f"uniform: {type(model).__name__} has other tensors than its {type(config).__name__} says; leave uniform "
            "out, and load the result with intrafusion.load."
        )
    found = _find_numbers(model, config, shapes, {g.size for g in graph.groups if g.reducible})
    return [(number, step) for number in found if (step := _find_step(model, config, number))]


def _find_step(model: nn.Module, config: Any, number: _Number) -> int | None:
    """The least divisor of a number by which it can become smaller; None if there is none."""
    divisors = (step for step in range(1, number.value // 2 + 1) if number.value % step == 0)
    smaller = lambda step: _build_shapes(model, with_number(config, number.place, number.value - step))  # noqa: E731
    return next((step for step in divisors if smaller(step) is not None), None)


def _find_set(number: _Number, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups that a number sets, all to one size, if they are all that it sets; else none."""
    inside = [g for g in groups if all((m.tensor, m.dim) in number.growth for m in g.members)]
    removed: dict[Side, Fraction] = {}
    for group in inside:
        for side, indices in _list_indices(group).items():
            removed[side] = removed.get(side, Fraction(0)) + Fraction(len(indices), group.size)
    return inside if len({g.size for g in inside}) == 1 and removed == number.growth else []


def _list_indices(group: ChannelGroup, start: int = 0) -> dict[Side, set[int]]:
    """Where the channels from `start` on lie in every side."""
    found: dict[Side, set[int]] = {}
    for member in group.members:
        found.setdefault((member.tensor, member.dim), set()).update(member.positions[start:].ravel().tolist())
    return found


def _join(sets: Iterable[Sequence[ChannelGroup]]) -> dict[int, int]:
    """The family that each family becomes part of."""
    joined: dict[int, int] = {}
    for inside in sets:
        families = {joined.get(g.family, g.family) for g in inside}
        first = min(families)
        joined.update(dict.fromkeys(families, first))
        joined.update({f: first for f, other in joined.items() if other in families})
    return joined


def shrink_shapes(graph: ChannelGraph, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors once these groups have these sizes."""
    gone: dict[Side, set[int]] = {}
    for group in graph.groups:
        if group.is_channel and group.name in sizes:
            for side, indices in _list_indices(group, sizes[group.name]).items():
                gone.setdefault(side, set()).update(indices)
    return {
        name: tuple(n - len(gone.get((name, dim), ())) for dim, n in enumerate(shape))
        for name, shape in graph.shapes.items()
    }


# ---- the configuration that fits ------------------------------------------------------------------------------------


def find_config(model: nn.Module, shapes: Shapes) -> tuple[Any, str]:
    """The configuration of a network that has these shapes, and what is in the way where there is none (None).

    Args:
        model: of which its `config` is, or was before it became smaller.
        shapes: of all tensors, or of those that matter.
    """
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    found = _build_shapes(model, config)
    if found is None or not found.keys() >= shapes.keys():
        return None, f"{type(model).__name__} cannot be built from its {type(config).__name__} alone"
    smaller = _compare({n: found[n] for n in shapes}, shapes)
    while left := _compare({n: found[n] for n in shapes}, shapes):
        better = _find_better(model, config, found, shapes, left)
        if better is None:
            return None, f"no {type(config).__name__} gives {_describe(smaller, left)}"
        config, found = better
    return config, ""


def _find_better(
    model: nn.Module, config: Any, found: Shapes, shapes: Shapes, left: Mapping[Side, tuple[int, int]]
) -> tuple[Any, dict[str, tuple[int, ...]]] | None:
    """The configuration with one number changed whose network differs least, if it differs less."""
    best, fewest = None, len(left)
    for number in _find_numbers(model, config, found, {old for old, _ in left.values()}):
        for value in _list_values(number, left):
            changed = with_number(config, number.place, value)
            built = _build_shapes(model, changed)
            if built is None or not built.keys() >= shapes.keys():
                continue
            differ = len(_compare({n: built[n] for n in shapes}, shapes))
            if differ < fewest:
                best, fewest = (changed, built), differ
        if fewest == 0:
            break
    return best


def _list_values(number: _Number, left: Mapping[Side, tuple[int, int]]) -> list[int]:
    """What a number must be for the sides that it sets, the most frequent first."""
    wanted = Counter(
        number.value + (new - old) / number.growth[side] for side, (old, new) in left.items() if side in number.growth
    )
    return [int(value) for value, _ in wanted.most_common(_TRIED) if value.denominator == 1 and value >= 1]


def _describe(smaller: Mapping[Side, tuple[int, int]], left: Iterable[Side]) -> str:
    """All new sizes of the kinds that are in the way, by what they were."""
    kinds = {smaller[side][0] for side in left if side in smaller}
    sizes: dict[int, set[int]] = {}
    for old, new in smaller.values():
        if old in kinds:
            sizes.setdefault(old, set()).add(new)
    told = "; ".join(f"{old} -> {', '.join(map(str, sorted(new)))}" for old, new in sizes.items())
    told = told or "what gets smaller and what stays do not go together"
    return f"these sizes: {told} (as in {name_some(list(dict.fromkeys(name for name, _ in left)))})"


@dataclass(frozen=True)
class _Refusal:
    """Stands in for `save_pretrained` where no configuration says what the tensors are."""

    why: str

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ModelError(
            f"save_pretrained: {self.why}, so that from_pretrained would fail; Compressed.save and intrafusion.load "
            "take every size, and compress(..., uniform=True) makes sizes that a configuration can say."
        )


def fit_config_(model: nn.Module, inputs: Inputs | None = None) -> str | None:
    """Give a network that became smaller the configuration that says so, or have `save_pretrained` refuse (in place).

    Args:
        inputs: on which the network that is built from the configuration must compute the same; None: not tried.
    Returns:
        why there is no configuration; None where there is one, or the network needs none.
    """
    if not is_configured(model):
        return None
    config, why = find_config(model, {name: tuple(t.shape) for name, t in named_tensors(model).items()})
    if config is not None and inputs is not None and not _computes_the_same(model, config, inputs):
        why = f"a network of these sizes, built from its {type(config).__name__}, gives other outputs"
    if why:
        refuse_saving_(model, why)
        return why
    for module in _list_pretrained(model):
        vars(module).pop(_SAVING, None)
    _write_config_(model, config)
    return None


def refuse_saving_(model: nn.Module, why: str) -> None:
    for module in _list_pretrained(model):
        vars(module)[_SAVING] = _Refusal(why)


def is_loadable(model: nn.Module) -> bool:
    """Whether `from_pretrained` opens what `save_pretrained` writes of a network, as far as is known."""
    return is_configured(model) and _SAVING not in vars(model)


def _list_pretrained(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_configured(module)]


def _computes_the_same(model: nn.Module, config: Any, inputs: Inputs) -> bool:
    """In float64, as from_pretrained may choose other kernels."""
    try:
        built = build_from_config(model, config).eval()
        built.load_state_dict(model.state_dict())
        take_rounded_(built, model)
        built.to(next(model.parameters()).device)
        found, expected = (run_in_double(copy_as_double(m), inputs) for m in (built, model))
    except Exception:  # other names of tensors, or a forward that does not run
        return False
    return len(found) == len(expected) and output_difference(found, expected) <= TOLERANCE


def take_rounded_(built: nn.Module, model: nn.Module) -> None:
    """What a network computes when it is built, and does not save, such as angles, as `model.half()` rounded it.

    In place. `from_pretrained` leaves it exact beside weights of half precision, in the original as in a smaller one.
    """
    saved, own = model.state_dict(), dict(model.named_buffers())
    for name, buffer in built.named_buffers():
        mine = own.get(name) if name not in saved else None
        if mine is not None and mine.shape == buffer.shape and torch.equal(buffer.to(mine), mine):
            buffer.data = mine.detach().to(buffer)


def _write_config_(model: nn.Module, config: Any) -> None:
    """The network gets a new configuration, and every network in it the part, or the copy, that is its own."""
    old: Any = model.config
    parts = dict(_pair_parts(old, config))
    before, after = list_numbers(old), list_numbers(config)
    changed = {place: value for place, value in after.items() if before.get(place) != value}
    for module in _list_pretrained(model):
        own: Any = module.config
        if id(own) in parts:
            vars(module)["config"] = parts[id(own)]
        elif type(own) is type(old):  # of an encoder and a decoder, each of which says what it is
            vars(module)["config"] = functools.reduce(lambda c, p: with_number(c, p, changed[p]), changed, own)


def _pair_parts(old: Any, new: Any) -> Iterator[tuple[int, Any]]:
    """The new one for every configuration in an old one, which is told by its identity."""
    yield id(old), new
    for name, value in vars(old).items():
        if hasattr(value, "to_dict"):
            yield from _pair_parts(value, getattr(new, name))


def take_config_(model: nn.Module, small: nn.Module) -> None:
    """What `fit_config_` did to a smaller network is done to another one that has become the same (in place)."""
    modules = dict(small.named_modules())
    for name, module in model.named_modules():
        if is_configured(module):
            vars(module).pop(_SAVING, None)
            own = vars(modules[name])
            vars(module).update({key: own[key] for key in ("config", _SAVING) if key in own})
