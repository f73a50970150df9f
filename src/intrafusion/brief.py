"""One line for an object, however much it holds: what a prompt shows, and a debugger."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from intrafusion.table import WIDTH

_INDENT = "    "


def show_briefly(self: Any) -> str:
    """A dataclass as its call: shapes in place of tensors, and no fields that hold what they hold by default.

    To be a class's `__repr__`. One line, or one for each field where that is wider than a screen.
    """
    parts = [
        f"{field.name}={_BRIEF.repr(getattr(self, field.name, None))}"
        for field in fields(self)
        if field.repr and not _is_default(getattr(self, field.name, None), field)
    ]
    name = type(self).__name__
    line = f"{name}({', '.join(parts)})"
    if len(line) <= WIDTH:
        return line
    room = WIDTH - len(_INDENT) - 1
    return "\n".join([f"{name}(", *(f"{_INDENT}{_cut(part, room)}," for part in parts), ")"])


def _is_default(value: Any, field: Field[Any]) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(default, (dict, list, tuple)):
        return isinstance(value, type(default)) and not value and not default
    return default is value or (isinstance(default, (bool, int, float, str)) and _is_same(default, value))


def _is_same(default: object, value: object) -> bool:
    return type(default) is type(value) and default == value


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."


class _Brief(reprlib.Repr):
    """Python's own short form, with shapes for tensors and counts for what there is much of."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 3
        self.maxstring = self.maxother = 70

    def repr1(self, x: Any, level: int) -> str:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if isinstance(x, type) or (callable(x) and hasattr(x, "__qualname__")):
            return str(x.__qualname__)
        if hasattr(x, "named_modules"):
            return f"{type(x).__name__}(...)"
        if is_dataclass(x):
            return self._repr_dataclass(x)
        if isinstance(x, Mapping) and not isinstance(x, dict):
            return super().repr1(dict(x), level)
        items = list(x) if isinstance(x, (tuple, list)) else []
        return (
            f"<{len(items)} {type(items[0]).__name__}>" if items and is_dataclass(items[0]) else super().repr1(x, level)
        )

    def _repr_dataclass(self, x: Any) -> str:
        shown = repr(x)
        return shown if len(shown) <= self.maxother and "\n" not in shown else f"{type(x).__name__}(...)"


_BRIEF = _Brief()
