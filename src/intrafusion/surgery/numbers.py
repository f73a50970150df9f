"""Whole numbers and tensors that modules hold in attributes, also in lists, dicts and configs there.

A place is a path from a module: "size", "sizes.1" (an entry of a list or tuple), "cfg.dim" (of a config or a dict).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 3  # of lists, dicts and configs in each other
_LONG = 256  # a list of more is data
_PLUMBING = frozenset(vars(nn.Module()))
_CLOSED = (
    *(nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType),
    *(functools.partial, torch.Generator, torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader),
)


def find_numbers(module: nn.Module) -> dict[str, int]:
    """Every whole number in the attributes of a module itself, by its place; those of its class included."""
    return _find_held({**_list_class_attributes(type(module)), **vars(module)}, lambda value: type(value) is int)


def find_held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of floating numbers that modules hold in attributes, as a state from the last call; no buffers."""
    return {
        f"{name}.{place}" if name else place: tensor
        for name, module in model.named_modules()
        for place, tensor in _find_held(vars(module), _is_state).items()
    }


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _find_held(attributes: Mapping[str, Any], wanted: Callable[[Any], bool]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in attributes.items():
        if name not in _PLUMBING:
            found |= _walk(name, value, wanted, frozenset(), _DEPTH)
    return found


def _list_class_attributes(kind: type) -> dict[str, Any]:
    """Numbers, and lists of such, that a user's class gives all its modules."""
    own = [c for c in reversed(kind.__mro__) if not c.__module__.startswith("torch.") and c is not object]
    return {
        name: value
        for c in own
        for name, value in vars(c).items()
        if type(value) in (int, tuple, list) and not name.startswith("__")
    }


def list_numbers(holder: Any) -> dict[str, int]:
    """Every whole number in a list, dict or config."""
    return {
        place: number
        for key, item in _list_items(holder)
        for place, number in _walk(key, item, lambda value: type(value) is int, frozenset(), _DEPTH).items()
    }


def _walk(place: str, value: Any, wanted: Callable[[Any], bool], above: frozenset[int], depth: int) -> dict[str, Any]:
    if wanted(value):
        return {place: value}
    if depth == 0 or id(value) in above:
        return {}
    above, found = above | {id(value)}, {}
    for key, item in _list_items(value):
        found |= _walk(f"{place}.{key}", item, wanted, above, depth - 1)
    return found


def _list_items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        yield from ((str(k), item) for k, item in enumerate(value[:_LONG] if len(value) <= _LONG else ()))
    elif isinstance(value, dict):
        yield from ((k, item) for k, item in value.items() if isinstance(k, str) and "." not in k)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = dict.fromkeys([*(f.name for f in dataclasses.fields(value)), *getattr(value, "__dict__", ())])
        yield from ((name, getattr(value, name)) for name in names if "." not in name and hasattr(value, name))
    elif type(getattr(value, "__dict__", None)) is dict and not isinstance(value, _CLOSED):
        yield from ((k, item) for k, item in vars(value).items() if "." not in k)


def write_number_(module: nn.Module, place: str, value: Any) -> None:
    """Write to a place. Lists, dicts and configs on the way are copied first: others may hold them too."""
    name, *keys = place.split(".")
    setattr(module, name, _replace_at(getattr(module, name), keys, value) if keys else value)


def with_number(holder: Any, place: str, value: Any) -> Any:
    """A copy of a list, dict or config that has the value at a place."""
    return _replace_at(holder, place.split("."), value)


def _replace_at(holder: Any, keys: list[str], value: Any) -> Any:
    """A copy of a holder that has the value at the end of these keys."""
    key, *rest = keys
    if isinstance(holder, tuple):
        items = list(holder)
        items[int(key)] = _replace_at(items[int(key)], rest, value) if rest else value
        make = getattr(holder, "_make", type(holder))  # a named tuple takes its fields one by one
        return make(items)
    new = copy.copy(holder)
    if isinstance(holder, list):
        new[int(key)] = _replace_at(new[int(key)], rest, value) if rest else value
    elif isinstance(holder, dict):
        new[key] = _replace_at(new[key], rest, value) if rest else value
    else:  # past the `__setattr__` of frozen configs
        object.__setattr__(new, key, _replace_at(getattr(new, key), rest, value) if rest else value)
    return new


def explain_state(model: nn.Module, sizes: Container[int]) -> str:
    """What to say where channels of these sizes cannot shrink and tensors of that size are held in attributes."""
    names = [name for name, tensor in find_held_tensors(model).items() if any(n in sizes for n in tensor.shape)]
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"; the network holds tensors of that width in attributes ({shown}): clear what it keeps from earlier calls"
