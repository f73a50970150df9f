"""A convolution or linear layer as two thinner ones, and a network rebuilt with such from their ranks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import PlanError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRank(nn.Sequential):
    """`reduce`, with the kernel of the layer it stands for, then `expand`, 1 x 1, with its bias.

    A convolution with groups has `rank` channels between the two for each of its groups.
    """

    reduce: nn.Module
    expand: nn.Module

    def __init__(self, reduce: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.add_module("reduce", reduce)
        self.add_module("expand", expand)

    @property
    def rank(self) -> int:
        weight = self.reduce.weight
        assert isinstance(weight, Tensor)
        return len(weight) // int(getattr(self.reduce, "groups", 1))


def is_splittable(module: nn.Module) -> bool:
    """Whether a layer is of a type that can be split: exactly a linear layer or a convolution, no subclass of one."""
    return type(module) in (nn.Linear, *_CONVOLUTIONS)


def make_low_rank(layer: nn.Module, rank: int) -> LowRank:
    """Two layers, on the device and in the dtype of the one they stand for, with weights of zeros.

    The first has its stride, padding, padding mode and dilation; both have its groups.

    Raises:
        PlanError: not a layer that can be split.
    """
    if not is_splittable(layer):
        raise PlanError(f"a {type(layer).__name__} cannot be split into two layers of lower rank.")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        pair = nn.Linear(layer.in_features, rank, False, **place), nn.Linear(rank, layer.out_features, bias, **place)
    else:
        assert isinstance(layer, _CONVOLUTIONS)
        kind: Any = type(layer)
        same = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(layer, name) for name in same}
        between = rank * layer.groups
        pair = (
            kind(layer.in_channels, between, bias=False, **options, **place),
            kind(between, layer.out_channels, 1, groups=layer.groups, bias=bias, **place),
        )
    split = LowRank(*pair).train(layer.training)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.zero_()
            parameter.requires_grad_(weight.requires_grad)
    return split


def split_layers_(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put a `LowRank` with weights of zeros in the place of each of these layers (in place).

    Raises:
        PlanError: a name or a rank that is none of this network.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        if name not in modules or not name or not is_splittable(modules[name]):
            raise PlanError(f"the network has no convolution or linear layer {name!r} to split.")
        if type(rank) is not int or rank < 1:
            raise PlanError(f"{name}: expected a rank of at least 1, got {rank!r}.")
    for name, rank in ranks.items():
        replace_module_(model, name, make_low_rank(modules[name], rank))


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module, also where several names lead to it (in place)."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = module
                if parent.__dict__.get(key) is old:
                    parent.__dict__[key] = module


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Rank of every `LowRank` of a network, by name."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRank)}
