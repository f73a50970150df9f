"""Which layers are meant: by name pattern, by type, or by a function; their outputs or their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import BudgetError, show, unknown_name
from intrafusion.graph import ChannelGraph, ChannelGroup
from intrafusion.names import name_some

Match = str | type | Callable[[str, nn.Module], bool]
NOT_INCLUDED = "not included"
_SIDES = ("outputs", "inputs")
_TYPE = "type:"  # before the name of a class, where the class itself cannot be given, as in a YAML recipe


@checked
@dataclass(frozen=True)
class Selector:
    """Layers and the side of them that is meant: the channels they produce, or the channels they read."""

    match: Match
    side: str = "outputs"

    def __str__(self) -> str:
        """As recipes write it down."""
        if isinstance(self.match, str):
            return f"{self.match}:{self.side}"
        name = getattr(self.match, "__qualname__", repr(self.match))
        return f"{_TYPE if isinstance(self.match, type) else ''}{name}:{self.side}"

    def describe(self) -> str:
        """As a caller says it.

        >>> inputs_of("head").describe(), outputs_of("stem.*").describe(), inputs_of(nn.Conv2d).describe()
        ('head:inputs', 'stem.*', 'inputs_of(Conv2d)')
        """
        reads = self.side == "inputs"
        if isinstance(self.match, str):
            return f"{self.match}:inputs" if reads else self.match
        name = getattr(self.match, "__qualname__", repr(self.match))
        return f"inputs_of({name})" if reads else name

    @checked
    def layers(self, model: nn.Module, option: str = "include/exclude") -> set[str]:
        """Names of the modules that match.

        Args:
            option: that the layers are selected for.
        Raises:
            BudgetError: none does; the nearest name is suggested.
        """
        modules = dict(model.named_modules())
        found = {name for name, module in modules.items() if self._matches(name, module)}
        if not found:
            raise BudgetError(f"{option}: {self._explain_none(modules)}")
        return found

    def _explain_none(self, modules: Mapping[str, nn.Module]) -> str:
        kinds = {type(m).__qualname__ for n, m in modules.items() if n}
        if isinstance(self.match, str):
            is_type = self.match.startswith(_TYPE)
            wanted = self.match.removeprefix(_TYPE)
            return (
                unknown_name("type of layer", wanted, kinds)
                if is_type
                else unknown_name("layer", wanted, [n for n in modules if n])
            )
        if isinstance(self.match, type):
            shown = name_some(sorted(kinds))
            return f"no layer of the network is a {self.match.__qualname__}; there are {shown}."
        return (
            f"the function {self.describe()} says yes to none of the {len(modules)} layers; it is called (name, layer)."
        )

    def _matches(self, name: str, module: nn.Module) -> bool:
        if isinstance(self.match, str) and self.match.startswith(_TYPE):
            return self.match.removeprefix(_TYPE) in {c.__qualname__ for c in type(module).__mro__}
        if isinstance(self.match, str):
            return fnmatchcase(name, self.match)
        return isinstance(module, self.match) if isinstance(self.match, type) else bool(self.match(name, module))


@checked
def outputs_of(match: Match) -> Selector:
    """The channels that these layers produce."""
    return Selector(match, "outputs")


@checked
def inputs_of(match: Match) -> Selector:
    """The channels that these layers read."""
    return Selector(match, "inputs")


def as_selectors(what: Any) -> tuple[Selector, ...] | None:
    """One selector or several; a bare name, type or function means the outputs, "name:inputs" the inputs.

    "type:Conv2d" is the type of that name, also as recipes write it down.
    """
    if what is None:
        return None
    if isinstance(what, (str, bytes, type, Selector, nn.Module, Tensor)) or not isinstance(what, Iterable):
        what = (what,)
    return tuple(_as_selector(item) for item in what)


def _as_selector(item: Any) -> Selector:
    if isinstance(item, Selector):
        return item
    if isinstance(item, str):
        name, _, side = item.rpartition(":")
        return Selector(name, side) if name and side in _SIDES else Selector(item)
    if isinstance(item, type):
        return Selector(item)
    if callable(item) and not isinstance(item, nn.Module):
        return Selector(cast(Callable[[str, nn.Module], bool], item))
    raise BudgetError(
        f"include/exclude: expected a name, a layer type or a function (name, module) -> bool, got {show(item)}."
    )


def _is_meant(group: ChannelGroup, selector: Selector, layers: set[str]) -> bool:
    """Whether a group is produced (or read) by one of these layers, or by a layer inside one of them."""
    own = group.producers if selector.side == "outputs" else group.consumers
    return any(_is_inside(layer, layers) for layer in own)


def find_left_alone(
    graph: ChannelGraph, model: nn.Module, include: Iterable[Selector] | None, exclude: Iterable[Selector]
) -> dict[str, str]:
    """Why each group that the user does not want reduced is left alone, by name."""
    excluded = [(s, s.layers(model, "exclude")) for s in exclude]
    included = None if include is None else [(s, s.layers(model, "include")) for s in include]
    reasons: dict[str, str] = {}
    for group in graph.groups:
        if included is not None and not any(_is_meant(group, s, layers) for s, layers in included):
            reasons[group.name] = NOT_INCLUDED
        for selector, layers in excluded:
            if _is_meant(group, selector, layers):
                reasons[group.name] = f"excluded ({selector.describe()})"
    return reasons


def find_meant(model: nn.Module, include: Iterable[Selector] | None, exclude: Iterable[Selector]) -> set[str]:
    """Names of all modules that are included and not excluded, by themselves or inside of another one."""
    names = [name for name, _ in model.named_modules() if name]
    left = set[str]().union(*(s.layers(model, "exclude") for s in exclude))
    chosen = None if include is None else set[str]().union(*(s.layers(model, "include") for s in include))
    return {name for name in names if (chosen is None or _is_inside(name, chosen)) and not _is_inside(name, left)}


def _is_inside(name: str, layers: set[str]) -> bool:
    """Whether a layer is one of these, or inside one of them."""
    return name in layers or any(name.startswith(f"{parent}.") for parent in layers if parent)


def explain_idle_selectors(
    graph: ChannelGraph, model: nn.Module, include: Iterable[Selector] | None, exclude: Iterable[Selector]
) -> tuple[str, ...]:
    """Notes on selectors without effect: included layers without channels to reduce, excluded ones without channels."""
    reducible = [g for g in graph.groups if g.is_channel and g.reducible]
    notes = [
        f"include {s.describe()!r} changes nothing: none of its channels can be reduced"
        for s in include or () if not _touches(reducible, s, model)
    ]  # fmt: skip
    notes += [
        f"exclude {s.describe()!r} changes nothing: these layers have no channels of their own"
        for s in exclude if not _touches(graph.groups, s, model)
    ]  # fmt: skip
    return tuple(f"{note}; name the layers whose weights they are." for note in notes)


def _touches(groups: Iterable[ChannelGroup], selector: Selector, model: nn.Module) -> bool:
    layers = selector.layers(model)
    return any(_is_meant(group, selector, layers) for group in groups)
