"""One dispatched operation, as a rule sees it: its arguments by name, its outputs, and where it happened."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Call:
    """One dispatched operation with its arguments by name."""

    __slots__ = ("args", "func", "kwargs", "module", "name", "out", "tensors")

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, module: str) -> None:
        self.func, self.args, self.kwargs, self.out, self.module = func, args, kwargs, out, module
        self.name = name_operation(func)
        self.tensors = find_tensors((*args, *kwargs.values()))

    def __getitem__(self, name: str) -> Any:
        names, defaults = _list_arguments(self.func)
        if name in self.kwargs:
            return self.kwargs[name]
        index = names.index(name) if name in names else len(self.args)
        return self.args[index] if index < len(self.args) else defaults.get(name)

    @property
    def outputs(self) -> list[Any]:
        return list(self.out) if isinstance(self.out, (list, tuple)) else [self.out]

    @property
    def in_place(self) -> bool:
        return self.func._schema.is_mutable

    @property
    def where(self) -> str:
        """For messages: the operation and the module that was running."""
        return f"{self.name} in {self.module or 'the network'}"


def find_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Every tensor among the arguments, or the results, of an operation, lists of tensors included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


@functools.cache
def _list_arguments(func: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Argument names of an aten overload, and its defaults."""
    arguments = func._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments}


@functools.cache
def name_operation(func: Any) -> str:
    """'add' for aten::add, aten::add_ and every overload; 'mine::add' stays: it may mean something else."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace != "aten":
        return func._schema.name
    return name if name.startswith("__") else name.rstrip("_")
