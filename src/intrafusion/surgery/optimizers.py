"""Optimizers that train a network go on after its weights became smaller in place."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from intrafusion.graph import ChannelGraph
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.maps import _remap, mean_weights
from intrafusion.surgery.streams import find_turned


def find_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Every optimizer alive that trains a parameter of a network; wrappers that share one state count once."""
    own = {id(p) for p in model.parameters()}
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    found = [o for o in alive if any(id(p) in own for group in o.param_groups for p in group["params"])]
    return list({id(o.state): o for o in found}.values())


def carry_state_(model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> tuple[str, ...]:
    """Take what optimizers remember of the parameters through the same maps; to be called before these are written.

    A momentum becomes that of the new weights, M V U; second moments (nothing negative) become weighted means. What has
    another shape than the parameter cannot follow and is forgotten: the optimizer starts anew there. So it does where
    channels were rotated, as gains went from norms into readers.

    Returns:
        a note for each optimizer.
    """
    groups = [g for g in graph.groups if g.name in maps]
    changed = {m.tensor for g in groups for m in g.members}
    turned = {m.tensor for g in find_turned(groups, maps) for m in g.members}
    names = {p: name for name, p in model.named_parameters() if name in changed}
    means = {name: _make_averaging(reduction) for name, reduction in maps.items()}
    notes = []
    for optimizer in find_optimizers(model):
        reset = []
        for parameter, name in names.items():
            state = optimizer.state.get(parameter, {})
            tensors = {k: t for k, t in state.items() if isinstance(t, Tensor) and t.dim() > 0}
            odd = any(t.shape != parameter.shape for t in tensors.values()) or _keeps_more(state)
            if odd or (state and name in turned):
                optimizer.state.pop(parameter)
                reset.append(name)
                continue
            for key, value in tensors.items():
                chosen = means if bool((value >= 0).all()) else maps
                moved = _remap(name, value.double(), groups, chosen, set())
                state[key] = moved.to(value.dtype)
        if hasattr(optimizer, "_numel_cache"):
            optimizer._numel_cache = None  # type: ignore[attr-defined]
        notes.append(_describe(optimizer, reset))
    return tuple(notes)


def _keeps_more(state: Mapping[str, object]) -> bool:
    """Lists of tensors and the like, as of LBFGS."""
    return any(isinstance(value, (list, tuple, dict)) and len(value) for value in state.values())


def _make_averaging(reduction: ReductionMap) -> ReductionMap:
    return ReductionMap(mean_weights(reduction.merge), mean_weights(reduction.unmerge.T).T.contiguous())


def _describe(optimizer: torch.optim.Optimizer, reset: list[str]) -> str:
    kind = type(optimizer).__name__
    if not reset:
        return f"the optimizer {kind} of this network goes on: its state went through the same maps as the weights"
    return (
        f"the optimizer {kind} of this network goes on, but starts anew for {reset[0]!r} and {len(reset) - 1} more: "
        "what it remembers of them has not the shape of a weight, or their channels were rotated"
    )
