"""What of a network is trained: all of it, some kinds of parameters, or low-rank changes that are merged away."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intrafusion.arguments import Count, Positive, Seed, checked
from intrafusion.errors import ArgumentError, ModelError, unknown_name

KINDS = ("full", "unfrozen", "biases", "norms", "head", "lora")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def kinds_of(trainable: str | Sequence[str]) -> tuple[str, ...]:
    """("biases", "norms") from "biases+norms" or a sequence.

    Raises:
        ArgumentError: an unknown kind, or none.
    """
    kinds = tuple(trainable.split("+") if isinstance(trainable, str) else trainable)
    for kind in kinds:
        if not isinstance(kind, str) or kind not in KINDS:
            raise ArgumentError(unknown_name("kind of parameters", kind, KINDS))
    if not kinds:
        raise ArgumentError(f"trainable: expected at least one of {', '.join(KINDS)}, got none.")
    return kinds


class _LowRankChange(nn.Module):
    r"""W + s (B A * mask), s = alpha / rank; B starts at zero, so that nothing changes at first.

    Reference: Hu et al. 2022 (LoRA); with the mask Zimmer et al. 2023 (MaskLoRA).
    """

    mask: Tensor | None

    def __init__(
        self, weight: Tensor, rank: int, alpha: float, mask: Tensor | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, rows, columns)
        a = (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.scale = alpha / rank
        self.register_buffer("mask", None if mask is None else mask.to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        change = self.scale * (self.b @ self.a).reshape(weight.shape)
        return weight + (change if self.mask is None else change * self.mask)


class _Masked(nn.Module):
    """W * mask: what is masked stays zero while the rest is trained."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@checked
@contextmanager
def adapt(
    model: nn.Module,
    trainable: str | Sequence[str] = "full",
    *,
    rank: Count = 32,
    alpha: Positive = 16.0,
    masks: Mapping[str, Tensor] | None = None,
    within: str = "",
    seed: Seed = 0,
) -> Iterator[list[nn.Parameter]]:
    """Only these parameters can be trained inside the block; afterwards adapters are merged into the weights.

    Parameters keep their identity and their requires_grad; shapes and the code of the network are unchanged.

    Args:
        trainable: of "full", "unfrozen" (what requires a gradient already), "biases", "norms", "head" (the last layer)
            and "lora" (a low-rank change of every convolution and linear layer), one, or several joined by "+".
        rank: of the low-rank changes, at most the rank of the layer.
        alpha: a change counts alpha / rank.
        masks: entries of weights that may be other than zero, by name; the others stay zero.
        within: train parameters of this module only.
        seed: of the low-rank changes.
    Raises:
        ModelError: nothing would be trained, or a mask that fits no weight.
    """
    kinds = kinds_of(trainable)
    _check_masks(model, masks or {})
    flags = {p: p.requires_grad for p in model.parameters()}
    floating = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    chosen = {name for name, p in floating.items() if _is_wanted(model, name, p, kinds, within)}
    parts: list[nn.Module] = []
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        trained = [p for n, p in model.named_parameters() if n in chosen]
        generator = torch.Generator().manual_seed(seed)
        for name, layer in _layers_of(model):
            inside = not within or name == within or name.startswith(f"{within}.")
            mask = (masks or {}).get(f"{name}.weight")
            if "lora" in kinds and inside:
                assert isinstance(layer.weight, Tensor)
                change = _LowRankChange(layer.weight, rank, alpha, mask, generator)
                parametrize.register_parametrization(layer, "weight", change)
                trained += [change.a, change.b]
                parts.append(layer)
            elif mask is not None and f"{name}.weight" in chosen:
                parametrize.register_parametrization(layer, "weight", _Masked(mask.to(next(layer.parameters()).device)))
                parts.append(layer)
        if not trained:
            where = repr(within) if within else "the network"
            raise ModelError(
                f"train: {where} has no parameters of the kind {' or '.join(kinds)} to train; choose others."
            )
        yield trained
    finally:
        for layer in parts:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _is_wanted(model: nn.Module, name: str, parameter: nn.Parameter, kinds: Sequence[str], within: str) -> bool:
    owner, _, own = name.rpartition(".")
    if within and owner != within and not owner.startswith(f"{within}."):
        return False
    return (
        "full" in kinds
        or ("unfrozen" in kinds and parameter.requires_grad)
        or ("biases" in kinds and "bias" in own)
        or ("norms" in kinds and isinstance(model.get_submodule(owner), _NORMS))
        or ("head" in kinds and owner == _head_of(model))
    )


def _head_of(model: nn.Module) -> str:
    """Name of the last linear layer or convolution."""
    names = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    if not names:
        raise ModelError("train: the network has no linear layer or convolution that could be its head.")
    return names[-1]


def _layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers and convolutions with a plain weight."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _LAYERS) and not parametrize.is_parametrized(m)]
    parent = lambda name: model.get_submodule(name.rpartition(".")[0])  # noqa: E731
    return [(n, m) for n, m in found if not isinstance(parent(n), nn.MultiheadAttention)]


def _check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    weights = {f"{name}.weight": layer.weight for name, layer in _layers_of(model)}
    for name, mask in masks.items():
        weight = weights.get(name)
        if not isinstance(weight, Tensor) or weight.shape != mask.shape:
            has = "no such weight" if not isinstance(weight, Tensor) else f"a weight {list(weight.shape)}"
            raise ModelError(f"masks: {name!r} is {list(mask.shape)}, the network has {has}; `masks_of` makes some.")
