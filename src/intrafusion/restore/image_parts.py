"""The gradient of a loss on statistics of many images, of which some at a time go through the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from intrafusion.errors import NoInputsError, RecipeError
from intrafusion.network.free_memory import describe_bytes
from intrafusion.network.pass_memory import LiveBytes

Statistics = Sequence[tuple[Any, Tensor, Tensor]]
"""At one place of the network after another, what is wanted there, and mean and variance of channels, (c,) each."""

Look = Callable[[Tensor, slice], tuple[Statistics, Tensor]]
"""Of some images, which are these of all: statistics, and the mean over them of what else is lost."""

_BACKWARD = 2  # times what a forward pass keeps, with the way back


def choose_part(look: Look, images: Tensor, memory: int) -> int:
    """How many images go through at a time with their gradients.

    Raises:
        RecipeError: the memory is too little for one.
    """
    few = images[:2].detach().requires_grad_()
    live = LiveBytes([few])
    with live:
        _ = look(few, slice(0, len(few)))
    taken = math.ceil(live.peak * _BACKWARD / len(few))
    if taken > memory:
        raise RecipeError(
            f"memory: expected at least {describe_bytes(taken)}, as making one image from the network takes that, got "
            f"{describe_bytes(memory)}; or give images, or restore='noise'."
        )
    return min(len(images), memory // taken)


def differentiate_in_parts(images: Tensor, size: int, look: Look, measure: Callable[[Statistics], Tensor]) -> Tensor:
    """The gradient of a loss on all images: what `measure` gives of their statistics, and the mean of the rest.

    A pass without gradients finds the statistics; what the loss wants of them is then told to each part. With shares
    w_i, means m_i and variances v_i of the parts, m = sum w_i m_i and v = sum w_i (v_i + (m_i - m)^2), whose slope with
    respect to m is zero.

    Args:
        size: images at a time.
    """
    parts = [slice(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    shares = [(part.stop - part.start) / len(images) for part in parts]
    with torch.no_grad():
        seen = [look(images[part], part)[0] for part in parts]
    whole = [_join(shares, found) for found in zip(*seen, strict=True)]
    leaves = [t.requires_grad_() for _, *both in whole for t in both]
    slopes = torch.autograd.grad(measure(whole), leaves, materialize_grads=True)
    gradient = torch.empty_like(images)
    for part, share in zip(parts, shares, strict=True):
        own = images[part].clone().requires_grad_()
        statistics, loss = look(own, part)
        for (_, mean, variance), about, by_mean, by_variance in zip(
            statistics, leaves[::2], slopes[::2], slopes[1::2], strict=True
        ):
            spread = variance + (mean - about.detach()).square()
            loss = loss + (by_mean * mean).sum() + (by_variance * spread).sum()
        gradient[part] = differentiate(loss * share, own)
    return gradient


def _join(shares: Sequence[float], parts: Sequence[tuple[Any, Tensor, Tensor]]) -> tuple[Any, Tensor, Tensor]:
    """What is wanted, mean and variance of all, by those of parts."""
    mean = torch.stack([share * own for share, (_, own, _) in zip(shares, parts, strict=True)]).sum(0)
    spread = [share * (v + (own - mean).square()) for share, (_, own, v) in zip(shares, parts, strict=True)]
    return parts[0][0], mean, torch.stack(spread).sum(0)


def differentiate(loss: Tensor, pixels: Tensor) -> Tensor:
    """
    Raises:
        NoInputsError: the loss does not depend on the pixels.
    """
    found = torch.autograd.grad(loss, pixels, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise NoInputsError(
            "no image can be made from this network: its forward takes no gradients (no_grad, inference)."
        )
    return found
