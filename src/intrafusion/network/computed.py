"""Weights that a network computes anew in each call, and what to do about them once it is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from intrafusion.names import name_some

_TOLD = (parametrizations._WeightNorm, parametrizations._SpectralNorm)  # followed, or named in the reasons


def tell_of_computed(model: nn.Module) -> tuple[str, ...]:
    """A sentence for each kind: old-style spectral norms, masks of pruning, and parametrizations."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for tensor, *told in _list_computed(module):
            found[told[0], told[1].format(tensor)].append(f"{module_name}.{tensor}".lstrip("."))
    return tuple(
        f"{name_some(names)}: computed anew in each call by {what}; restoring leaves such alone, and they may hold "
        f"channels. After training, {call} folds that in."
        for (what, call), names in found.items()
    )


@torch.no_grad()
def compute_anew_(model: nn.Module) -> None:
    """Have modules hold what their next call will compute: until then it is of weights that are no longer there."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, prune.BasePruningMethod | WeightNorm):
                hook(module, ())


def _list_computed(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Names of tensors, what computes them, and the call that folds that in."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            yield hook.name, "a spectral norm", "torch.nn.utils.remove_spectral_norm(module, {!r})"
        elif isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name, "a mask of pruning", "torch.nn.utils.prune.remove(module, {!r})"
    if not isinstance(steps := getattr(module, "parametrizations", None), nn.ModuleDict):
        return
    for tensor, of_tensor in steps.items():
        if not any(isinstance(step, _TOLD) for step in of_tensor.children()):
            yield tensor, "a parametrization", "torch.nn.utils.parametrize.remove_parametrizations(module, {!r})"
