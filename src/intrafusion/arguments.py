"""What is handed to a public function: checked against its annotations, before any work.

`checked` stands on every door of the library, functions and classes alike, so that an annotation is all that an
argument needs. What a type cannot say, such as a number of at least 1, is said by an annotation too: `Count`, `Seed`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.errors import ArgumentError, ModelError, show

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Such:
    """Which numbers, or tensors, are meant, and how a message calls them."""

    words: str
    holds: Callable[[Any], bool]


def _is_real(tensor: Tensor, dims: int) -> bool:
    return tensor.dim() == dims and tensor.dtype is not torch.bool and not tensor.is_complex()


Count = Annotated[int, Such("a whole number of at least 1", lambda v: 1 <= v < 2**63)]
Seed = Annotated[int, Such("a whole number from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)]
Positive = Annotated[float, Such("a finite number above 0", lambda v: 0 < v < math.inf)]
NotNegative = Annotated[float, Such("a finite number of at least 0", lambda v: 0 <= v < math.inf)]
Fraction = Annotated[float, Such("a fraction in (0, 1]", lambda v: 0 < v <= 1)]
Natural = Annotated[int, Such("a whole number of at least 0", lambda v: 0 <= v < 2**63)]
Vector = Annotated[Tensor, Such("a vector of real numbers", lambda t: _is_real(t, 1))]
Matrix = Annotated[Tensor, Such("a matrix of real numbers", lambda t: _is_real(t, 2))]
Indices = Annotated[Tensor, Such("a vector of int64", lambda t: t.dim() == 1 and t.dtype is torch.int64)]
Batch = Annotated[Tensor, Such("images (n, ...)", lambda t: t.dim() > 0)]


class Fault(NamedTuple):
    """A value that is not what was expected, and where inside the argument it lies."""

    path: str
    expected: str
    value: Any


def checked(door: F, *, leaving: Collection[str] = ()) -> F:
    """The function, or the class, that refuses arguments which are not what its annotations say.

    Of paths, ~ is the home of the user. Arguments that are missing or unknown stay Python's own TypeError.

    Args:
        leaving: names of arguments that it checks itself.
    Raises:
        ModelError: of the call: something that is no network, or cannot be called like one.
        ArgumentError: of the call: anything else.
    """
    if not isinstance(door, type):
        return cast(F, _guard(door, door, getattr(door, "__qualname__", ""), leaving))
    guarded = cast(Any, door)
    guarded.__init__ = _guard(guarded.__init__, door, door.__name__, leaving)
    return cast(F, guarded)


def _guard(function: Any, annotated: Any, where: str, leaving: Collection[str]) -> Callable[..., Any]:
    """The function, which is called once its arguments are what `annotated` says."""
    signature = inspect.signature(function)
    hints = functools.cache(lambda: get_type_hints(annotated, include_extras=True))
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = {p.name for p in signature.parameters.values() if p.default is p.empty}
    plain_names = frozenset(names) if len(names) == len(signature.parameters) else frozenset()
    paths = functools.cache(lambda: frozenset(name for name, hint in hints().items() if _names_path(hint)))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given, known = dict(zip(names, args, strict=False)) | kwargs, hints()
        if len(given) == len(args) + len(kwargs) and needed <= given.keys() <= plain_names:
            pairs = [(name, value, known[name]) for name, value in given.items() if name in known]
        else:
            pairs = _pair_with_hints(_bind(signature, args, kwargs), known)
        for name, value, hint in pairs:
            if name not in leaving:
                check_argument(value, hint, f"{where}: {name}", annotated)
        if paths():
            args = tuple(expand_home(x) if k < len(names) and names[k] in paths() else x for k, x in enumerate(args))
            kwargs = {name: expand_home(x) if name in paths() else x for name, x in kwargs.items()}
        return function(*args, **kwargs)

    return call


def expand_home(path: Any) -> Any:
    """The same path, with the home of the user, or of the one that it names, for ~ in front; anything else as it is."""
    if isinstance(path, str):
        return os.path.expanduser(path)
    if isinstance(path, os.PathLike) and isinstance(text := os.fspath(path), str) and text.startswith("~"):
        return Path(os.path.expanduser(text))
    return path


def _names_path(hint: Any) -> bool:
    return any((get_origin(alternative) or alternative) in (os.PathLike, Path) for alternative in _alternatives(hint))


def _bind(signature: inspect.Signature, args: Any, kwargs: Any) -> inspect.BoundArguments | None:
    """None for arguments that are missing or unknown."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError:
        return None


def _pair_with_hints(bound: inspect.BoundArguments | None, hints: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, annotation) of every argument that was given."""
    if bound is None:
        return  # the function is called all the same: Python says best what is missing
    for name, value in bound.arguments.items():
        if name not in hints:
            continue
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            yield from ((key, item, hints[name]) for key, item in value.items())
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((name, item, hints[name]) for item in value)
        else:
            yield name, value, hints[name]


def check_argument(value: Any, hint: Any, where: str, door: Any = None) -> None:
    """Raise unless a value is what an annotation says; see `checked`."""
    if type(value) in _PLAIN and type(value) in _alternatives(hint):
        return
    own = _OWN.get(_key_of(hint))
    if own is not None:
        own(value)
    elif (fault := find_fault(value, hint)) is not None:
        error = ModelError if "torch.nn.Module" in fault.expected else ArgumentError
        advice = _advise(fault) or f"see help({door.__module__}.{door.__qualname__})"
        raise error(f"{where}{fault.path}: expected {fault.expected}, got {show(fault.value)}; {advice}.")


_PLAIN = frozenset([str, bool, type(None)])
"""Classes of which every value is what their name, alone or among others, asks for."""


def check_module(model: Any, where: str = "model") -> None:
    """
    Raises:
        ModelError: something that is no network.
    """
    check_argument(model, nn.Module, where)


# ---- annotations with a check of their own --------------------------------------------------------------------------

_OWN: dict[frozenset[Any], Callable[[Any], object]] = {}


def check_by(hint: Any, check: Callable[[Any], object]) -> None:
    """From now on arguments with this annotation, or with None beside it, are checked by a function that raises."""
    _OWN[_key_of(hint)] = check


@functools.cache
def _key_of(hint: Any) -> frozenset[Any]:
    return frozenset(map(repr, _alternatives(hint))) - {repr(type(None))}


# ---- is a value what an annotation says? ----------------------------------------------------------------------------


def find_fault(value: Any, hint: Any) -> Fault | None:
    """What of a value is not as an annotation says; None if all is."""
    if type(value) is hint and (hint not in _KINDS or _is_plainly(value)):
        return None
    origin = get_origin(hint)
    if hint is Any or hint is object or isinstance(hint, TypeVar):
        return None
    if origin is Annotated:
        base, *ranges = get_args(hint)
        fault = find_fault(value, base)
        meant = value if base is Tensor else plain(value)
        expected = next((such.words for such in ranges if fault or not such.holds(meant)), None)
        return None if expected is None else Fault("", expected, value)
    if origin in (Union, types.UnionType):
        return _find_in_union(value, hint)
    if origin is Literal:
        fits = any(type(value) is type(item) and value == item for item in get_args(hint))
        return None if fits else Fault("", " or ".join(map(repr, get_args(hint))), value)
    kind = hint if origin is None else origin
    if not _is_of_kind(value, kind) or (origin is Callable and not takes(value, get_args(hint)[0])):
        return Fault("", describe_hint(hint), value)
    return _find_inside(value, kind, get_args(hint))


def _is_plainly(value: Any) -> bool:
    """Whether a value of the very class that is named is what that means, which most values are, seen at once."""
    return type(value) in _PLAIN or (type(value) is int and abs(value) < 2**63)


@functools.cache
def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _find_in_union(value: Any, hint: Any) -> Fault | None:
    """The fault inside the value where an alternative fits it from outside, else that none does."""
    faults = list[Fault]()
    for alternative in _alternatives(hint):
        if (fault := find_fault(value, alternative)) is None:
            return None
        faults.append(fault)
    return next((f for f in faults if f.path), Fault("", describe_hint(hint), value))


_WHOLE = (str, bytes, type, Tensor, np.ndarray)
"""What could be gone through, and is never meant so."""

_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda v: isinstance(plain(v), bool)),
    int: ("a whole number", lambda v: isinstance(plain(v), int) and _is_number(plain(v))),
    float: ("a number", lambda v: _is_number(plain(v))),
    str: ("a name", lambda v: isinstance(v, str)),
    type(None): ("None", lambda v: v is None),
    Tensor: ("a dense tensor with values", lambda v: isinstance(v, Tensor) and _has_values(v)),
    Callable: ("a function", callable),
    Sequence: ("a list or tuple", lambda v: isinstance(v, Sequence) and not isinstance(v, (str, bytes))),
    list: ("a list or tuple", lambda v: isinstance(v, (list, tuple))),
    Collection: ("a list, tuple or set", lambda v: isinstance(v, Collection) and not isinstance(v, _WHOLE)),
    Iterable: ("an iterable", lambda v: isinstance(v, Iterable) and not isinstance(v, _WHOLE)),
    Mapping: ("a mapping", lambda v: isinstance(v, Mapping)),
    os.PathLike: ("a path", lambda v: isinstance(v, os.PathLike)),
    nn.Module: ("a torch.nn.Module", lambda v: isinstance(v, nn.Module)),
    np.ndarray: ("a NumPy array", lambda v: isinstance(v, np.ndarray)),
    type: ("a class", lambda v: isinstance(v, type)),
}
"""How a message calls what an annotation names, and what is one; for other classes, their objects."""


def _is_of_kind(value: Any, kind: Any) -> bool:
    if kind in _KINDS:
        return _KINDS[kind][1](value)
    if isinstance(value, type) or not isinstance(value, kind):
        return False
    called = vars(kind).get("__call__") if getattr(kind, "_is_protocol", False) else None
    return called is None or takes(value, (None,) * (len(inspect.signature(called).parameters) - 1))


def _is_number(value: Any) -> bool:
    """Not NaN, and no integer that a tensor could not hold."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value == value and (isinstance(value, float) or abs(value) < 2**63)


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def takes(function: Any, arguments: Any) -> bool:
    """Whether a function can be called with as many arguments as a list or tuple has, as far as it tells."""
    if not isinstance(arguments, (list, tuple)):
        return True
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(*arguments)
    except TypeError:
        return False
    except (ValueError, AttributeError):  # written in C, it does not tell
        pass
    return True


def _find_inside(value: Any, kind: Any, inner: tuple[Any, ...]) -> Fault | None:
    """The first fault among the entries of a container; iterators are not read."""
    if not inner or kind in (Callable, type, os.PathLike):
        return None
    if isinstance(value, Mapping):
        return _find_in_mapping(value, inner[0], inner[-1])
    if kind is tuple and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            return Fault("", f"a tuple of {len(inner)}", value)
        return _find_among(zip(value, inner, strict=True))
    if isinstance(value, (Sequence, set, frozenset)):
        return _find_among(zip(value, itertools.repeat(inner[0])))
    return None


def _find_in_mapping(value: Mapping[Any, Any], key_hint: Any, hint: Any) -> Fault | None:
    for key in value:
        if (fault := find_fault(key, key_hint)) is not None:
            return fault._replace(path=f" key{fault.path}")
    for key, item in value.items():
        if (fault := find_fault(item, hint)) is not None:
            return fault._replace(path=f"[{show(key)}]{fault.path}")
    return None


def _find_among(items: Iterable[tuple[Any, Any]]) -> Fault | None:
    """The first fault among entries, each with its annotation."""
    for index, (item, hint) in enumerate(items):
        if (fault := find_fault(item, hint)) is not None:
            return fault._replace(path=f"[{index}]{fault.path}")
    return None


def plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as one of Python."""
    is_number = hasattr(value, "item") and getattr(value, "ndim", 0) == 0 and not getattr(value, "is_meta", False)
    return value.item() if is_number and not isinstance(value, type) else value


# ---- words ----------------------------------------------------------------------------------------------------------


def describe_hint(hint: Any) -> str:
    """What an annotation names, as a message calls it."""
    origin = get_origin(hint)
    if origin is Annotated:
        return next(r.words for r in get_args(hint)[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe_hint, get_args(hint))))
    if origin is Callable and isinstance(get_args(hint)[0], list):
        count = len(get_args(hint)[0])
        return f"a function of {count} argument{'' if count == 1 else 's'}"
    kind = hint if origin is None else origin
    if getattr(kind, "_is_protocol", False):
        return f"{_with_article(kind.__name__)} (an object with {', '.join(_attributes_of(kind))})"
    name = _KINDS[kind][0] if kind in _KINDS else getattr(kind, "__name__", str(kind))
    return name if kind in _KINDS else _with_article(name)


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _attributes_of(protocol: Any) -> list[str]:
    names = {**vars(protocol), **vars(protocol).get("__annotations__", {})}
    return [name for name in names if name == "__call__" or not name.startswith("_")]


_NETWORKS = {
    "dict": "build the network, and call load_state_dict on it",
    "OrderedDict": "build the network, and call load_state_dict on it",
    "str": "build the network, and load its weights",
    "PosixPath": "build the network, and load its weights",
    "ExportedProgram": "that is a program; pass the eager network that it was exported from",
    "ScriptFunction": "that is TorchScript; pass the eager network that it was made from",
    "Compressed": "pass its `.model`",
    "Fused": "pass its `.model`",
    "Factorized": "pass its `.model`",
}
"""What to do with what is given for a network, by its class."""


def _advise(fault: Fault) -> str | None:
    """What to do, where it can be told from what was given."""
    value, expected = fault.value, fault.expected
    if isinstance(value, type) and "a class" not in expected:
        return f"that is a class; make an object of it, {value.__name__}(...)"
    if "torch.nn.Module" in expected:
        return _NETWORKS.get(type(value).__name__, "pass the network itself")
    wants_tensor = any(word in expected for word in ("tensor", "vector", "matrix", "images"))
    if isinstance(value, Tensor) and wants_tensor and not _has_values(value):
        return "load its values first" if value.is_meta else "make it one with .to_dense() or .dequantize()"
    if isinstance(value, np.ndarray) and wants_tensor:
        return "torch.from_numpy(...) makes one of an array"
    if isinstance(value, (np.ndarray, Tensor)) and "list" in expected:
        return "its .tolist() makes one"
    if isinstance(value, Iterator) and "list" in expected:
        return "put what it gives into a list"
    return None
