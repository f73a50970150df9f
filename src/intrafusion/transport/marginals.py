"""How much mass each channel brings to, or receives from, the transport."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intrafusion.arguments import Indices, Vector, checked
from intrafusion.errors import ArgumentError, unknown_name

_LEAST = 1e-6  # of a uniform share: no channel is ever without mass, so plans can be divided by their marginals


@checked
def marginal(name: str, importance: Vector, kept: Indices) -> Tensor:
    """Positive masses of k channels that sum to 1.

    Args:
        name: "uniform" (1/k), "importance" (i / sum i), "softmax" (exp i / sum exp i) or
            "radical" (kept channels weigh k / number kept, the others 1, divided by the sum).
        importance: (k,) scores of the channels.
        kept: indices among the k of the channels that stay; only "radical" looks at them.
    Raises:
        ArgumentError: unknown name, or "importance" with a negative score.
    Reference: Theus et al. 2024, Table 4; "softmax" from the paper's text, "radical" from its released code.
    """
    if name not in MARGINALS:
        raise ArgumentError(unknown_name("marginal", name, MARGINALS))
    if len(importance) == 0 or not bool(torch.isfinite(importance).all()):
        raise ArgumentError("marginal: expected finite scores of at least one channel; look at the criterion.")
    if len(kept) == 0 or not 0 <= int(kept.min()) <= int(kept.max()) < len(importance):
        raise ArgumentError(f"kept: expected some of {len(importance)} channels, got {kept.tolist()!r:.80}.")
    mass = MARGINALS[name](importance.double(), kept).clamp_min(_LEAST / len(importance))
    return mass / mass.sum()


def _uniform(importance: Tensor, kept: Tensor) -> Tensor:
    return torch.full_like(importance, 1 / len(importance))


def _proportional(importance: Tensor, kept: Tensor) -> Tensor:
    if bool((importance < 0).any()):
        raise ArgumentError(
            f"marginal 'importance': expected scores >= 0, got {importance.min().item():.4g}; use 'softmax'."
        )
    largest = importance.max()
    if largest == 0:
        return _uniform(importance, kept)
    mass = importance / largest
    return mass / mass.sum()


def _softmax(importance: Tensor, kept: Tensor) -> Tensor:
    return torch.softmax(importance, dim=0)


def _radical(importance: Tensor, kept: Tensor) -> Tensor:
    mass = torch.ones_like(importance)
    mass[kept] = len(importance) / len(kept)
    return mass / mass.sum()


MARGINALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": _uniform,
    "importance": _proportional,
    "softmax": _softmax,
    "radical": _radical,
}
