"""Sizes that norms without parameters state and do not use: no tensor tells them, so a call does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.network.apart import only_here
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.surgery.write import Repair, find_own_tensors, make_repairs_

_STATED = {nn.modules.batchnorm._NormBase: "num_features", nn.GroupNorm: "num_channels"}


def fit_idle_sizes_(model: nn.Module, small: nn.Module, inputs: Inputs) -> tuple[Repair, ...]:
    """Have such norms of a smaller network state how many channels they see, where those of the original did."""
    names = {name: attribute for name, module in model.named_modules() if (attribute := _find_stated(module))}
    if not names:
        return ()
    before, after = (_see_channels(network, names, inputs) for network in (model, small))
    repairs = tuple(
        Repair(name, attribute, before[name], after[name])
        for name, attribute in names.items()
        if before.get(name) == getattr(model.get_submodule(name), attribute)
        and name in after
        and getattr(small.get_submodule(name), attribute) != after[name]
    )
    make_repairs_(small, repairs)
    return repairs


def _find_stated(module: nn.Module) -> str | None:
    if any(tensor.dim() for tensor in find_own_tensors(module).values()):
        return None
    return next((attribute for kind, attribute in _STATED.items() if isinstance(module, kind)), None)


def _see_channels(network: nn.Module, names: Mapping[str, Any], inputs: Inputs) -> dict[str, int]:
    """How many channels each of these modules is called on."""
    seen: dict[str, int] = {}
    modules = {name: network.get_submodule(name) for name in names}

    def hook_of(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(x := args[0], Tensor):
                single = isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
                seen[name] = x.shape[-module._get_no_batch_dim() if single else 1]

        return only_here(see)

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules.items()]
    try:
        with preserve_state(network), torch.no_grad():
            inputs.call(network)
    finally:
        for handle in handles:
            handle.remove()
    return seen
