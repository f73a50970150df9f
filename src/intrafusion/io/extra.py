"""Extra state of modules (`get_extra_state`) as JSON and tensors, so that nothing has to be pickled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import FolderError, PlanError

PREFIX = "extra_state/"
"""Of tensors in the weight file that are part of an extra state."""


def extra_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What modules keep beside parameters and buffers, by name of the module: values of JSON, and tensors apart.

    Raises:
        FolderError: it holds something that only pickling could write.
    """
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            values[name] = _encoded(module.get_extra_state(), f"{PREFIX}{name}", name, tensors)
    return values, tensors


def _encoded(value: Any, key: str, module: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(v, f"{key}/{i}", module, tensors) for i, v in enumerate(value)]}
    if isinstance(value, Mapping) and all(type(k) is str for k in value):
        return {"dict": {k: _encoded(v, f"{key}/{k}", module, tensors) for k, v in value.items()}}
    if type(value) is float:
        return {"float": str(value)}
    raise FolderError(
        f"{module or 'the network'}: its extra state holds a {type(value).__name__}, which only a pickle could keep; "
        "expected numbers, texts, tensors, and lists or dicts of such. Convert it in get_extra_state, or use buffers."
    )


def set_extra_state_(model: nn.Module, values: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give modules back what `extra_state` wrote; folders from before there was any have none.

    Raises:
        PlanError: it is damaged, or of another network.
    """
    modules = dict(model.named_modules())
    if not isinstance(values, dict) or not set(values) <= set(modules):
        raise PlanError("plan.json: damaged, or of another network: its extra state names other modules.")
    for name, value in values.items():
        try:
            modules[name].set_extra_state(_decoded(value, tensors))
        except Exception as error:  # whatever a module of the user's makes of it
            kind = type(modules[name]).__name__
            raise PlanError(
                f"{name or 'the network'}: its extra state cannot be set ({type(error).__name__}: {error}); "
                f"it is damaged, or {kind} is not the class that it was saved from."
            ) from error


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, inner = _only(value)
    if kind == "tensor":
        return tensors[inner].clone()
    if kind == "float":
        return float(inner)
    if kind == "dict":
        return {k: _decoded(v, tensors) for k, v in inner.items()}
    return {"list": list, "tuple": tuple}[kind](_decoded(v, tensors) for v in inner)


def _only(value: dict[str, Any]) -> tuple[str, Any]:
    (pair,) = value.items()
    return pair
