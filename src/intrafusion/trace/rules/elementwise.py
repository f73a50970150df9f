"""Element-wise operations: channels at the same position move together, per-channel weights follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import Role
from intrafusion.trace.info import Activation, Info, Result, Weight
from intrafusion.trace.labels import FIRST, FIXED, compact, narrowed, spread, varying

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer

EXTRA = (
    "_prelu_kernel",
    "masked_fill",
    "where",
    "lerp",
    "hardswish",
    "hardsigmoid",
    "mish",
    "log_sigmoid_forward",
    "nan_to_num",
    "addcmul",
    "addcdiv",
    "polar",
    "complex",
)
ROLES = {"add": Role.SHIFTS, "sub": Role.SHIFTS, "mul": Role.SCALES, "div": Role.SCALES}

Operand = Tensor | Info | tuple[Info | None, Tensor] | None  # a pair: what is known of a tensor, and its values


def elementwise(t: Tracer, call: Call) -> Result:
    out = call.outputs[0]
    written_part(t, call)
    info = combine(t, call, call.tensors, out.shape)
    return [info] * len(call.outputs) if len(call.outputs) > 1 else info


def glu(t: Tracer, call: Call) -> Info | None:
    """Gated linear unit: the two halves are multiplied."""
    x, dim = call["self"], call["dim"]
    info = t.info(x)
    if info is None:
        return None
    half = x.shape[dim] // 2
    part = lambda c, start: c.narrow(dim, start, half)  # noqa: E731
    parts = [(info.map(lambda c, s=start: part(c, s)), part(x, start)) for start in (0, half)]
    return combine(t, call, parts, call.out.shape)


def combine(t: Tracer, call: Call, operands: Sequence[Operand], shape: torch.Size) -> Info:
    """The result of operands that meet position by position."""
    activations: list[tuple[Tensor, set[int]]] = []
    weights: list[Weight] = []
    constants: list[Tensor] = []
    for info, values in (described(t, operand) for operand in operands):
        if isinstance(info, Activation):
            labels = info.labels.broadcast_to(shape)
            activations.append((labels, set(range(len(shape))) if values is None else extent(values, len(shape))))
        elif isinstance(info, Weight):
            weights.append(info.broadcast_to(shape) if needs_broadcast(info, shape) else info)
        elif values is not None and values.numel() > 1:
            constants += [values.real, values.imag] if values.is_complex() else [values]
    if not activations:
        return combined_weights(t, call, weights, constants, shape)
    met = with_channels(t, activations, call.where)
    labels = met[0]
    for other in met[1:]:
        labels = merge(t, labels, other)
    for weight in weights:
        labels = t.follow(weight, labels, ROLES.get(call.name, Role.FOLLOWS))
    for values in constants:
        labels = pattern(t, labels, values, call.where)
    return Activation(compact(labels) if weights else labels)


def described(t: Tracer, operand: Operand) -> tuple[Info | None, Tensor | None]:
    if isinstance(operand, tuple):
        return operand
    return (t.info(operand), operand) if isinstance(operand, Tensor) else (operand, None)


def extent(x: Tensor, rank: int) -> set[int]:
    """Dimensions, of a result of that rank, along which an operand may hold different values."""
    return {d + rank - x.dim() for d in varying(x)}


def with_channels(t: Tracer, operands: Sequence[tuple[Tensor, set[int]]], where: str) -> list[Tensor]:
    """Labels of operands that meet, without fixed data that treats all channels alike.

    An operand that names no channel (fixed data, a single map, one value per block) but varies along the channels of
    another tells them apart in a way that only its data know: those are blocked.
    """
    spread_out = [varying(spread(t.relations.roots(narrowed(labels)), labels.shape)) for labels, _ in operands]
    kept = []
    for (labels, dims), own in zip(operands, spread_out, strict=True):
        array = narrowed(labels)
        what = "an input, or fixed data," if (array == FIXED).all() else "an activation"
        if ((array >= FIRST) & ~t.relations.is_block[array]).any():
            kept.append(labels)
            continue
        for (other, _), channels in zip(operands, spread_out, strict=True):
            if (channels - own) & dims:
                t.relations.forbid(narrowed(other).ravel(), f"meets {what} that varies along its channels: {where}")
        if (array >= FIRST).any() or not any((narrowed(other) >= FIRST).any() for other, _ in operands):
            kept.append(labels)
    return kept


def needs_broadcast(weight: Weight, shape: torch.Size) -> bool:
    return bool(weight.planes) and weight.planes[0].coordinates.shape != shape


def merge(t: Tracer, a: Tensor, b: Tensor) -> Tensor:
    """Unite two label tensors of one shape."""
    x, y = np.broadcast_arrays(narrowed(a), narrowed(b))
    return spread(t.relations.merge(x, y), a.shape)


def first_alone(t: Tracer, call: Call) -> Info | None:
    """Element-wise in the first operand; the others are scratch space."""
    return combine(t, call, call.tensors[:1], call.out.shape)


def triangle(t: Tracer, call: Call) -> Info | None:
    """tril and triu: a product with a constant 0/1 mask."""
    mask = call.func(torch.ones(call.out.shape), *call.args[1:], **call.kwargs)
    return combine(t, call, [call.args[0], mask], call.out.shape)


def combined_weights(
    t: Tracer, call: Call, weights: list[Weight], constants: list[Tensor], shape: torch.Size
) -> Weight:
    """Weights combined before use: still a weight; linear only where the result is linear in the parameters."""
    linear = call.name in ("add", "sub") if len(weights) > 1 else call.name in ("mul", "div", "neg")
    linear &= len(weights) > 1 or (isinstance(call.args[0], Tensor) and isinstance(t.info(call.args[0]), Weight))
    if linear and len(weights) == 1:
        linear = call.name == "neg" or not constants
    planes = [p for w in weights for p in w.planes]
    for plane in planes:
        if any(varying(compact_values(c, shape)) & plane.varies for c in constants):
            t.relations.pin(plane.tensor, plane.dim, f"meets a constant that varies along it: {call.where}")
    nonlinear = next((w.nonlinear for w in weights if w.nonlinear), None)
    return Weight(planes, nonlinear=nonlinear or (None if linear else call.where))


def compact_values(values: Tensor, shape: torch.Size) -> Tensor:
    return compact(values.detach().cpu().double().nan_to_num().broadcast_to(shape))


def pattern(t: Tracer, labels: Tensor, values: Tensor, where: str) -> Tensor:
    """A constant that varies along channels: only channels that see the same values are interchangeable."""
    channel_dims = varying(labels)
    offset = labels.dim() - values.dim()
    if not any(d >= offset and values.shape[d - offset] > 1 for d in channel_dims):
        return labels
    constant = compact_values(values, labels.shape)
    if not channel_dims & varying(constant):
        return labels
    labels = t.told_apart(labels, varying(constant))
    dims = sorted(channel_dims)
    order = dims + [d for d in range(labels.dim()) if d not in channel_dims]
    x, y = np.broadcast_arrays(narrowed(labels), narrowed(constant))
    rows = y.transpose(order).reshape(int(np.prod([x.shape[d] for d in dims])), -1)
    channels = x.transpose(order).reshape(len(rows), -1)[:, 0]
    _, value = np.unique(rows, axis=0, return_inverse=True)
    known = channels >= FIRST
    t.relations.colour(channels[known], value.reshape(-1)[known])
    t.relations.note(channels[known], f"sees a constant that varies along channels: {where}")
    return labels


def written_part(t: Tracer, call: Call) -> None:
    """An in-place operation on a view changes its base, which must be a tracked activation."""
    if not call.in_place or not isinstance(call.args[0], Tensor) or not call.args[0]._is_view():
        return
    view, base = call.args[0], call.args[0]._base
    known, whole = t.info(view), t.info(base)
    if whole is None:
        for tensor in call.tensors:
            t.forbid(t.info(tensor), f"in-place write into part of an untracked tensor: {call.where}")
    elif isinstance(known, Weight):
        t.pin(known, f"in-place write: {call.where}")
