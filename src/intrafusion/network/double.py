"""A network run in float64, and how far two outputs lie apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state

TOLERANCE = 1e-8


class _DoublePrecision(TorchDispatchMode):
    """Everything in float64, also where a network casts to less or makes constants in less."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = torch.float64
        if not func._schema.is_mutable:
            args, kwargs = tree_map(_as_double, args), tree_map(_as_double, kwargs)
        return func(*args, **kwargs)


def _as_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def run_in_double(model: nn.Module, inputs: Inputs, calls: int = 1) -> list[Tensor]:
    """Every tensor that one call, or several in a row, give in float64."""
    with preserve_state(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _DoublePrecision():
        return [output for _ in range(calls) for output in inputs.double().call(model)]


def output_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference over all outputs, relative to each output's largest value; inf if not comparable."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and a.is_floating_point():
            error = (a - b).abs().max() / b.abs().max().clamp(min=1e-300)
            worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
    return worst
