"""What holds where an option is left out and its default stands elsewhere: shown in --help and in the docs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])
_ATTRIBUTE = "_intrafusion_defaults"


def tells_defaults(values: Mapping[str, Any]) -> Callable[[_F], _F]:
    """A decorator of a command: the real defaults of options that are None in its signature, by argument."""

    def mark(command: _F) -> _F:
        setattr(command, _ATTRIBUTE, {name: _write(value) for name, value in values.items()})
        return command

    return mark


def told_defaults(command: Any) -> dict[str, str]:
    """What `tells_defaults` was given, as text."""
    return getattr(command, _ATTRIBUTE, {})


def join_defaults(by_case: Mapping[str, Any]) -> str:
    """The default of most cases, and those of the others with their names.

    >>> join_defaults({"a": 0.5, "b": (0.9, 0.7), "c": 0.5})
    '0.5; b: 0.9, 0.7'
    """
    texts = {case: _write(value) for case, value in by_case.items()}
    usual = Counter(texts.values()).most_common(1)[0][0]
    return "; ".join([usual, *(f"{case}: {text}" for case, text in texts.items() if text != usual)])


def _write(value: Any) -> str:
    if isinstance(value, Mapping):  # a method with its hyper-parameters
        return str(value["name"])
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_write, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
