"""A network run in float64, and how far two outputs lie apart."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from intrafusion.graph import Way
from intrafusion.network.decisions import call_ways
from intrafusion.network.grouped import is_grouped_product, multiply_groups
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import Memory, preserve_state
from intrafusion.network.tensors import copy_model, named_tensors

TOLERANCE = 1e-8


class DoublePrecision(Mode):
    """Everything in float64, also where a network casts to less or makes constants in less.

    What is made is lengthened, not what is viewed: what is written into a part must not go into part of a copy.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs = {**kwargs, "dtype": _double_of(kwargs["dtype"])}
        if func._schema.is_mutable or (func.is_view and func is not torch.ops.aten.lift_fresh.default):
            return func(*args, **kwargs)
        args, kwargs = tuple(map(_as_double, args)), {name: _as_double(x) for name, x in kwargs.items()}
        if is_grouped_product(func):  # it has no float64
            return multiply_groups(*args, **kwargs)
        if func.namespace == "quantized":  # nor have these
            return tree_map(_as_double, func(*tree_map(_as_single, args), **tree_map(_as_single, kwargs)))
        return _as_double(func(*args, **kwargs))


def _as_double(x: Any) -> Any:
    """An argument of an operation, or what it gives: a tensor, tensors in a list, or none."""
    if isinstance(x, Tensor):
        dtype = _double_of(x.dtype)
        return x if dtype is x.dtype else x.to(dtype)
    return type(x)(map(_as_double, x)) if type(x) in (list, tuple) else x


def _as_single(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x


def _double_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


def copy_as_double(model: nn.Module) -> nn.Module:
    """A copy in double precision, complex parameters and buffers included."""
    double = copy_model(model).double()
    for tensor in named_tensors(double).values():
        if tensor.is_complex():
            tensor.data = tensor.data.to(torch.complex128)
    return double


def run_in_double(
    model: nn.Module,
    inputs: Inputs,
    calls: int = 1,
    draws: contextlib.AbstractContextManager[object] | None = None,
    ways: Sequence[Way] = (),
    memory: Memory | None = None,
) -> list[Tensor]:
    """Every tensor that one call, or several in a row, give in float64; random numbers start from one seed.

    Args:
        calls: as many as the network was traced over, `ChannelGraph.calls`.
        ways: `ChannelGraph.ways`, which are followed too, each in a call of its own.
        draws: a mode that notes or replaces what the forward draws, see `trace.random`.
        memory: see `preserve_state`.
    """
    drawing = draws or contextlib.nullcontext()
    with preserve_state(model, memory), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), DoublePrecision(), drawing:
        return call_ways(lambda given: given.double().call(model), inputs, calls, ways)


def output_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference over all outputs, relative to each output's largest value; inf if not comparable."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            worst = max(worst, _relative_difference(a, b))
    return worst


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """Infinities and NaN may stand where they stand in b (masked classes, undefined places); elsewhere none may."""
    finite = torch.isfinite(b)
    alike = (a == b) | (a.isnan() & b.isnan())
    if not bool((torch.where(finite, torch.isfinite(a), alike)).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1e-300))
