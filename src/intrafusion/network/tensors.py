"""The tensors of a network by name, and copies of networks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_initialised(model: nn.Module) -> None:
    """
    Raises:
        ModelError: its first call would give it parameters, and make it one of another class.
    """
    lazy = [name for name, tensor in named_tensors(model).items() if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"{lazy[0]!r} is not initialised yet, it belongs to a lazy module; run the network once first."
        )


def check_graph(graph: ChannelGraph, model: nn.Module, *, smaller: bool = False) -> None:
    """
    Args:
        smaller: the network may have been made smaller since.
    Raises:
        ModelError: the graph is of another network.
    """
    tensors = named_tensors(model)
    for name, shape in graph.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None or (found != tuple(shape) and not smaller) or len(found) != len(shape):
            raise ModelError(
                f"graph: expected that of this network ({type(model).__name__}), got one in which {name!r} is "
                f"{list(shape)}, where this one has {'none' if found is None else list(found)}; "
                "intrafusion.inspect(model, example_inputs) finds the right one."
            )


def copy_model(
    model: nn.Module, *, share: bool | Collection[str] = False, standing_in: Mapping[int, Tensor] | None = None
) -> nn.Module:
    """A deep copy, also of networks that hold tensors with a history, which the copies are without.

    Args:
        share: whether parameters and buffers are to be the same ones, not copies; or the names of those that are.
        standing_in: what is to stand in the place of tensors, by their id.
    """
    try:
        tensors = named_tensors(model)
        shared = tensors if share is True else share or ()
        own = {id(tensors[name]): tensors[name] for name in shared}
        return copy.deepcopy(model, {**_copy_empty(model), **_copy_computed(model), **own, **(standing_in or {})})
    except Exception as error:
        raise ModelError(
            f"the network ({type(model).__name__}) cannot be copied: {type(error).__name__}: {error}. "
            "Remove what holds an open handle, such as a file or a lock, or pass inplace=True on a network of your own."
        ) from error


def _copy_empty(model: nn.Module) -> dict[int, object]:
    """Copies of the dicts of modules that hold nothing, a dozen each for hooks, by the id of what they are copies of.

    They are most of what a network holds, and what takes longest to copy otherwise.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): type(value)() for value in held if type(value) in (dict, OrderedDict) and not has_content(value)}


def _copy_computed(model: nn.Module) -> dict[int, object]:
    """Copies of tensors with a history, by their id: old-style norms, pruning and caches leave them in modules."""
    held = (value for module in model.modules() for value in vars(module).values())
    found = (x for value in held if isinstance(value, (Tensor, list, tuple, dict)) for x in tree_leaves(value))
    return {id(x): x.detach().clone() for x in found if isinstance(x, Tensor) and not x.is_leaf}


def has_content(mapping: dict[Any, Any]) -> bool:
    """Whether a dict, or one that is ordered, holds anything; the latter may have attributes, too."""
    return bool(mapping) or (type(mapping) is not dict and bool(mapping.__dict__))
