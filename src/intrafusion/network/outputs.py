"""What a forward returned, opened: every tensor in it, wherever it lies, and what could not be looked into."""

from __future__ import annotations

import datetime
import enum
import itertools
import numbers
import pathlib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError

LONGEST = 10_000
"""Items that are taken out of an iterator; one that goes on is refused, as it may never end."""

_PLAIN = (
    *(type(None), str, bytes, bytearray, numbers.Number, enum.Enum, range, slice, type, types.EllipsisType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, datetime.date, pathlib.PurePath),
)
"""What holds no tensor."""

_CACHE = (
    "the cache for a next call; to reduce these, let the example ask for none (use_cache=False in transformers), or "
    "name the outputs that matter: outputs=, in a shell --outputs"
)
"""What is said of the part of an output that keeps keys, values or states for the next call."""

_CACHES = ("past_key_values", "cache_params")

_CLOSED = (nn.Module, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, np.ndarray)


@dataclass(eq=False)
class Opened:
    """The tensors of an output in a fixed order, and the kinds of objects in it that could not be opened.

    Attributes:
        entries: where the output has names for its parts, what each part is called and its tensors.
    """

    tensors: list[Tensor] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    entries: list[tuple[str, list[Tensor]]] = field(default_factory=list)

    __repr__ = show_briefly


def open_output(output: Any) -> Opened:
    """Every tensor in what a forward returned: in tuples, sets, mappings, dataclasses, attributes, at any depth.

    Iterators are read to their end; see `read_iterators` for an output that is to be used afterwards. A tensor that
    stands in several places counts as often, but for the attributes that a container keeps besides its items.

    Raises:
        ModelError: an iterator that does not end.
    """
    opened, entered, found = Opened(), set[int](), set[int]()
    stack: list[tuple[Any, bool]] = [(output, False)]
    kept: list[Any] = []  # alive, so that no id is given twice
    while stack:
        value, besides = stack.pop()
        if isinstance(value, Tensor):
            opened.tensors.extend([] if besides and id(value) in found else [value])
            found.add(id(value))
        elif not isinstance(value, _PLAIN) and id(value) not in entered:
            entered.add(id(value))
            kept.append(value)
            items, attributes = _parts_of(value)
            stack.extend((x, True) for x in reversed(attributes))
            stack.extend((x, besides) for x in reversed(items))
            opened.closed.extend([] if items or attributes or _is_open(value) else [type(value).__name__])
    opened.closed = list(dict.fromkeys(opened.closed))
    return opened


def name_entries(output: Any) -> list[tuple[str, list[Tensor]]]:
    """What the parts of an output are called, of a dict, a named tuple or an object, and the tensors in each.

    A cache for the next call is called one, by its class or by the name that transformers gives it.

    >>> name_entries({"boxes": [torch.zeros(2)], "scale": 3})
    [('boxes', [tensor([0., 0.])])]
    """
    if isinstance(output, Mapping):
        named = {str(key): item for key, item in output.items()}
    elif isinstance(output, tuple):
        named = dict(zip(getattr(output, "_fields", ()), output, strict=False))
    else:
        named = _attributes_of(output) if _is_open(output) and not isinstance(output, (Tensor, Collection)) else {}
    found = [(_call_cache(name, item), open_output(item).tensors) for name, item in named.items()]
    return [(name, tensors) for name, tensors in found if tensors]


def name_tensors(output: Any) -> list[str]:
    """What each tensor of an output is called, in the order of `open_output`: its entry, else its place in a sequence.

    >>> name_tensors({"boxes": [torch.zeros(2), torch.ones(2)]}), name_tensors((torch.zeros(1), [torch.ones(1)]))
    (['boxes', 'boxes'], ['output 0', 'output 1'])
    """
    entries = name_entries(output)
    if not entries and isinstance(output, (list, tuple)):
        entries = [(f"output {k}", open_output(item).tensors) for k, item in enumerate(output)]
    names = {id(t): name.partition(":")[0] for name, tensors in reversed(entries) for t in tensors}
    return [names.get(id(t), "output") for t in open_output(output).tensors]


def _call_cache(name: str, item: Any) -> str:
    is_cache = type(item).__name__.endswith("Cache") or name in _CACHES
    return f"{name}: {_CACHE}" if is_cache else name


def _parts_of(value: Any) -> tuple[list[Any], list[Any]]:
    """What lies directly in an object, and what a container keeps in attributes besides (maybe the same once more)."""
    if not _is_open(value):
        return [], []
    attributes = list(_attributes_of(value).values())
    if isinstance(value, Mapping):
        return list(value.values()), attributes
    if isinstance(value, Iterator):
        return _read(value), []
    if isinstance(value, Set) and any(isinstance(item, Tensor) for item in value):
        raise ModelError("the network returns tensors in a set, which has no order; return them in a tuple or a dict.")
    return (list(value), attributes) if isinstance(value, Collection) else (attributes, [])


def _is_open(value: Any) -> bool:
    """Not so: modules, functions, arrays, and objects of compiled code, which have neither attributes nor items."""
    if isinstance(value, _CLOSED):
        return False
    return isinstance(value, (Collection, Iterator)) or _has_dict(value) or bool(_slots_of(value))


def _has_dict(value: Any) -> bool:
    return any("__dict__" in vars(cls) for cls in type(value).__mro__)


def _attributes_of(value: Any) -> dict[str, Any]:
    return {
        **{s: getattr(value, s) for s in _slots_of(value) if hasattr(value, s)},
        **(vars(value) if _has_dict(value) else {}),
    }


def _slots_of(value: Any) -> list[str]:
    return [name for cls in type(value).__mro__ for name in _own_slots(cls)]


def _own_slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    private = f"_{cls.__name__.lstrip('_')}"
    full = [f"{private}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]
    return [n for n in full if n not in ("__dict__", "__weakref__")]


def _read(iterator: Iterator[Any]) -> list[Any]:
    found = list(itertools.islice(iterator, LONGEST + 1))
    if len(found) > LONGEST:
        raise ModelError(
            f"the network returns an iterator ({type(iterator).__name__}) of more than {LONGEST} items; expected an "
            "output with an end. Wrap its forward so that it returns a list."
        )
    return found


def read_iterators(output: Any) -> Any:
    """The same output with a list in place of an iterator, so that it can be read more than once."""
    if isinstance(output, Iterator):
        return [read_iterators(item) for item in _read(output)]
    if type(output) in (list, tuple):
        return type(output)(read_iterators(item) for item in output)
    return {k: read_iterators(v) for k, v in output.items()} if type(output) is dict else output


def plain_output(output: Any) -> Any:
    """The same in dicts, lists and tuples alone, which whoever reads a file of the network has, and the class not.

    A named tuple, a dataclass and any other mapping is a dict; of another object there is the list of its tensors.

    >>> plain_output(types.MappingProxyType({"logits": (1, range(2))}))
    {'logits': (1, range(0, 2))}
    """
    if isinstance(output, (Tensor, *_PLAIN)):
        return output
    if isinstance(output, Mapping):
        return {key: plain_output(item) for key, item in output.items()}
    if isinstance(output, tuple) and (names := getattr(output, "_fields", ())):
        return {name: plain_output(item) for name, item in zip(names, output, strict=True)}
    if isinstance(output, (list, tuple)):
        return (list if isinstance(output, list) else tuple)(plain_output(item) for item in output)
    if is_dataclass(output):
        return {each.name: plain_output(getattr(output, each.name)) for each in fields(output)}
    return open_output(output).tensors


def keep_tensors(output: Any) -> Any:
    """A plain output without what is no tensor in it, such as a number or a name.

    >>> keep_tensors({"sizes": [torch.ones(1), 3], "scale": 2.0, "none": None})
    {'sizes': [tensor([1.])]}
    """
    if isinstance(output, dict):
        return {key: kept for key, item in output.items() if (kept := keep_tensors(item)) is not None}
    if isinstance(output, (list, tuple)):
        return type(output)(kept for item in output if (kept := keep_tensors(item)) is not None)
    return output if isinstance(output, Tensor) else None


def storable_output(output: Any) -> Any:
    """A plain output with None for texts and types in it, which `torch.export` writes and cannot read back.

    >>> storable_output({"sizes": (torch.ones(1), 3), "name": "a"})
    {'sizes': (tensor([1.]), 3), 'name': None}
    """
    unread = (str, bytes, torch.dtype, torch.device)
    return tree_map(lambda item: None if isinstance(item, unread) else item, plain_output(output))


# ---- which outputs matter -------------------------------------------------------------------------------------------


def pick_outputs(output: Any, wanted: Sequence[str | int]) -> Any:
    """These outputs alone: a dict of those with names, or a tuple.

    >>> pick_outputs({"logits": 1, "hidden": 2}, ["logits"]), pick_outputs((3, 4), [1])
    ({'logits': 1}, (4,))

    Raises:
        ModelError: one is not there, or None.
    """
    found = [_pick_output(output, name) for name in wanted]
    if all(isinstance(name, str) for name in wanted):
        return dict(zip(wanted, found, strict=True))
    return tuple(found)


def _pick_output(output: Any, name: str | int) -> Any:
    names = _list_names(output)
    if isinstance(name, str):
        found = names.get(name)
    else:
        items = [output] if isinstance(output, Tensor) else list(names.values()) or _list_items(output)
        found = items[name] if -len(items) <= name < len(items) else None
    if found is None:
        has = ", ".join(names) if names else f"{len(_list_items(output))} without names, from 0 on"
        raise ModelError(
            f"outputs: expected names or indices of what the network returns ({has}), got {name!r}; choose of these."
        )
    return found


def _list_names(output: Any) -> dict[str, Any]:
    """Outputs by name, those that are None left out."""
    if isinstance(output, Tensor):
        return {}
    as_dict = getattr(output, "_asdict", None)  # of a named tuple
    found: Any = output if isinstance(output, Mapping) else as_dict() if callable(as_dict) else _attributes_of(output)
    return {str(key): value for key, value in found.items() if value is not None}


def _list_items(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]
