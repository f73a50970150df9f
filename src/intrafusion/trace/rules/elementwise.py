"""Element-wise operations: channels at the same position move together, per-channel weights follow them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import Role
from intrafusion.trace.call import Call
from intrafusion.trace.info import Info, LabelledTensor, Outcome, Tail, Weight, Writer
from intrafusion.trace.labels import FIRST, FIXED, compact, find_varying, narrow, widen
from intrafusion.trace.ledger import Ledger

UNTAGGED = (
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
DISTANCES = ("_cdist_forward", "_euclidean_dist")  # of which each is made of differences
_OPERATION_ROLES = {"add": Role.SHIFTS, "sub": Role.SHIFTS, "mul": Role.SCALES, "div": Role.SCALES}
_OPERATION_ROLES |= dict.fromkeys(DISTANCES, Role.SHIFTS)

_LINEAR = ("add", "sub", "rsub", "mul", "div", "neg", "clone", "copy", "_to_copy", "alias", "detach", "lift_fresh")

_Operand = Tensor | Info | tuple[Info | None, Tensor] | None  # a pair: what is known of a tensor, and its values


def combine_elementwise(ledger: Ledger, call: Call) -> Outcome:
    out = call.outputs[0]
    info = combine(ledger, call, call.tensors, out.shape)
    return [info] * len(call.outputs) if len(call.outputs) > 1 else info


def gate(ledger: Ledger, call: Call) -> Info | None:
    """Gated linear unit: the two halves are multiplied."""
    x, dim = call["self"], call["dim"]
    info = ledger.look_up(x)
    if info is None:
        return None
    half = x.shape[dim] // 2
    part = lambda c, start: c.narrow(dim, start, half)  # noqa: E731
    parts = [(info.map(lambda c, s=start: part(c, s)), part(x, start)) for start in (0, half)]
    return combine(ledger, call, parts, call.out.shape)


def combine(ledger: Ledger, call: Call, operands: Sequence[_Operand], shape: torch.Size) -> Info:
    """The result of operands that meet position by position."""
    activations: list[tuple[Tensor, set[int]]] = []
    weights: list[Weight] = []
    constants: list[Tensor] = []
    found: list[LabelledTensor] = []
    for info, values in _list_operands(ledger, operands):
        if isinstance(info, LabelledTensor):
            found.append(info)
            labels = info.labels.broadcast_to(shape)
            activations.append((labels, set(range(len(shape))) if values is None else find_extent(values, len(shape))))
        elif isinstance(info, Weight):
            weights.append(info.broadcast_to(shape) if _needs_broadcast(info, shape) else info)
        elif values is not None and values.numel() > 1:
            constants += [values.real, values.imag] if values.is_complex() else [values]
    if not activations:
        return _combine_weights(ledger, call, weights, constants, shape)
    if call.name == "mul" and len(activations) == len(weights) == 1 and not constants:
        made = _spread_fixed(ledger, weights[0], *activations[0])
        if made is not None:
            return made
    if call.name not in _LINEAR or (len(activations) > 1 and call.name in ("mul", "div")):
        ledger.relations.bent += [np.unique(narrow(labels)) for labels, _ in activations]
    labels = widen(meet(ledger, keep_channels(ledger, activations, call.where), outer=True), shape)
    for weight in weights:
        labels = ledger.lay(weight, labels, _OPERATION_ROLES.get(call.name, Role.FOLLOWS))
    for values in constants:
        labels = colour_by_value(ledger, labels, values, call.where)
    tail, writer = _extend_tail(ledger, call, found, weights, constants)
    return LabelledTensor(compact(labels) if weights else labels, tail=tail, writer=writer)


def _spread_fixed(ledger: Ledger, weight: Weight, labels: Tensor, extent: set[int]) -> LabelledTensor | None:
    """A number of the input times a vector, which makes channels of it as a linear layer with one input does.

    None where the input varies along all that the parameter varies along. Buffers, as frequencies of a rotary
    embedding, are fixed data: other code may make them anew from the width that it was told.
    """
    spread = set(range(labels.dim())) - extent
    if weight.nonlinear or ledger.is_of_buffers(weight) or (narrow(labels) != FIXED).any():
        return None
    if not any(axis.varies and axis.varies <= spread for axis in weight.axes):
        return None
    ledger.pin(weight, f"its rows are those of the input: {ledger.relations.where}", extent)
    return ledger.activate(weight, spread)


def _extend_tail(
    ledger: Ledger, call: Call, found: list[LabelledTensor], weights: list[Weight], constants: list[Tensor]
) -> tuple[Tail | None, Writer | None]:
    """What channels were multiplied and shifted by, and what gave them, if that is all that is done to them here."""
    vectors = [w for w in weights if w.owner is not None and _is_vector(ledger.shapes[w.owner])]
    if len(found) == len(vectors) == len(weights) == 1 and not constants:
        name, offset, (info,) = vectors[0].owner, vectors[0].offset or 0.0, found
        if call.name == "mul" and name is not None:
            ledger.relations.scaled[name].add(info.writer if offset == 0 else None)
            if info.tail is None:
                return Tail(name, offset=offset), None
        elif call.name == "add" and offset == 0:
            if info.tail is not None and info.tail.shift is None:
                return info.tail._replace(shift=name), None
            if info.tail is None and info.writer is not None and info.writer.bias is None:
                return None, info.writer._replace(bias=name)
    for tail in filter(None, (info.tail for info in found)):
        ledger.relations.strays.setdefault(tail, call.where)
    return None, None


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) == 1


def _list_operands(ledger: Ledger, operands: Sequence[_Operand]) -> list[tuple[Info | None, Tensor | None]]:
    """What is known of each, and its values; padding, which names no channel, is a constant beside what does."""
    found = [_look_up(ledger, operand) for operand in operands]
    if not any(isinstance(info, LabelledTensor) and not info.is_uniform for info, _ in found):
        return found
    is_constant = lambda info, values: isinstance(info, LabelledTensor) and info.is_uniform and values is not None  # noqa: E731
    return [(None if is_constant(info, values) else info, values) for info, values in found]


def _look_up(ledger: Ledger, operand: _Operand) -> tuple[Info | None, Tensor | None]:
    if isinstance(operand, tuple):
        return operand
    return (ledger.look_up(operand), operand) if isinstance(operand, Tensor) else (operand, None)


def find_extent(x: Tensor, rank: int) -> set[int]:
    """Dimensions, of a result of that rank, along which an operand may hold different values."""
    return {d + rank - x.dim() for d in find_varying(x)}


def keep_channels(
    ledger: Ledger, operands: Sequence[tuple[Tensor, set[int]]], where: str
) -> list[tuple[Tensor, set[int]]]:
    """Operands that meet (labels, and their `find_extent`), without fixed data that treats all channels alike.

    An operand that names no channel (fixed data, a single map, one value per block) but varies along the channels of
    another tells them apart in a way that only its data know: those are blocked.
    """
    # By representatives: labels that were united since then vary no longer.
    spread_out = [find_varying(widen(ledger.relations.roots(narrow(labels)), labels.shape)) for labels, _ in operands]
    kept = []
    for (labels, dims), own in zip(operands, spread_out, strict=True):
        array = narrow(labels)
        what = "an input, or fixed data," if (array == FIXED).all() else "an activation"
        if ((array >= FIRST) & ~ledger.relations.is_block[array]).any():
            kept.append((labels, dims))
            continue
        for (other, _), channels in zip(operands, spread_out, strict=True):
            if (channels - own) & dims:
                ledger.relations.forbid(narrow(other).ravel(), f"meets {what} that varies along its channels: {where}")
        if (array >= FIRST).any() or not any((narrow(other) >= FIRST).any() for other, _ in operands):
            kept.append((labels, dims))
    return kept


def meet(ledger: Ledger, operands: Sequence[tuple[Tensor, set[int]]], *, outer: bool = False) -> np.ndarray:
    """Labels of operands (as in `keep_channels`) put together element by element, not broadcast where none varies.

    Channels at the same position are one, but where one operand is a single value for several channels of the other.

    Args:
        outer: where each is that for the other, as the step sizes and the inputs of a state-space model: those of which
            there are fewer are gates. Else all become one.
    """
    labels, extent = narrow(operands[0][0]), set(operands[0][1])
    for other, dims in operands[1:]:
        x, y = labels, narrow(other)
        gated, gating = _find_gated(ledger, y, extent), _find_gated(ledger, x, dims)
        if gated and not gating:
            labels = ledger.relations.gate(x, y, gated)
        elif gating and not gated:
            labels = ledger.relations.gate(y, x, gating)
        elif gated and gating and outer:
            fewer = _count_channels(ledger, x) <= _count_channels(ledger, y)
            few, many, along = (x, y, gated) if fewer else (y, x, gating)
            labels = ledger.relations.gate(few, many, along)
        else:
            labels = ledger.relations.merge(*np.broadcast_arrays(x, y))
        extent |= dims
    return labels


def _find_gated(ledger: Ledger, labels: np.ndarray, extent: set[int]) -> list[int]:
    """Dimensions along which labels name several channels, and what they meet has one value."""
    roots = ledger.relations.roots(labels)
    spread = (d for d, size in enumerate(labels.shape) if size > 1 and d not in extent)
    return [d for d in spread if (roots != roots.take([0], d)).any()]


def _count_channels(ledger: Ledger, labels: np.ndarray) -> int:
    """Different ones: of a stack each place has labels of its own, of the same channels."""
    return len(np.unique(ledger.relations.roots(labels)))


def _needs_broadcast(weight: Weight, shape: torch.Size) -> bool:
    return bool(weight.axes) and weight.axes[0].coordinates.shape != shape


def keep_first(ledger: Ledger, call: Call) -> Info | None:
    """Element-wise in the first operand; the others are scratch space."""
    return combine(ledger, call, call.tensors[:1], call.out.shape)


def mask_triangle(ledger: Ledger, call: Call) -> Info | None:
    """tril and triu: a product with a constant 0/1 mask."""
    mask = call.func(torch.ones(call.out.shape), *call.args[1:], **call.kwargs)
    return combine(ledger, call, [call.args[0], mask], call.out.shape)


def _combine_weights(
    ledger: Ledger, call: Call, weights: list[Weight], constants: list[Tensor], shape: torch.Size
) -> Weight:
    """Weights combined before use: still a weight; linear only where the result is linear in the parameters."""
    linear = call.name in ("add", "sub") if len(weights) > 1 else call.name in ("mul", "div", "neg")
    first = call.args[0]
    linear &= len(weights) > 1 or (isinstance(first, Tensor) and isinstance(ledger.look_up(first), Weight))
    if linear and len(weights) == 1:
        linear = call.name == "neg" or not constants
    axes = [axis for w in weights for axis in w.axes]
    for axis in axes:
        if any(find_varying(_compact_values(c, shape)) & axis.varies for c in constants):
            ledger.relations.pin(axis.tensor, axis.dim, f"meets a constant that varies along it: {call.where}")
    nonlinear = next((w.nonlinear for w in weights if w.nonlinear), None)
    offset = _find_offset(call) if len(weights) == 1 and weights[0].single is not None else None
    return Weight(axes, nonlinear=nonlinear or (None if linear else call.where), offset=offset)


def _find_offset(call: Call) -> float | None:
    """The number that is added to the one tensor of a call, if that is what it does."""
    numbers = [a for a in call.args if isinstance(a, (int, float))]
    plain = call.name == "add" and len(call.args) == 2 and len(numbers) == 1 and call.kwargs.get("alpha", 1) == 1
    return float(numbers[0]) if plain else None


def _compact_values(values: Tensor, shape: torch.Size) -> Tensor:
    return compact(values.detach().cpu().double().nan_to_num().broadcast_to(shape))


def colour_by_value(ledger: Ledger, labels: Tensor, values: Tensor, where: str) -> Tensor:
    """A constant that varies along channels: only channels that see the same values are interchangeable."""
    channel_dims = find_varying(labels)
    offset = labels.dim() - values.dim()
    if not any(d >= offset and values.shape[d - offset] > 1 for d in channel_dims):
        return labels
    constant = _compact_values(values, labels.shape)
    if not channel_dims & find_varying(constant):
        return labels
    # A channel that stands at several places may meet a different value at each.
    labels = ledger.tell_apart(labels, find_varying(constant))
    dims = sorted(channel_dims)
    order = dims + [d for d in range(labels.dim()) if d not in channel_dims]
    x, y = np.broadcast_arrays(narrow(labels), narrow(constant))
    rows = y.transpose(order).reshape(int(np.prod([x.shape[d] for d in dims])), -1)
    channels = x.transpose(order).reshape(len(rows), -1)[:, 0]
    _, value = np.unique(rows, axis=0, return_inverse=True)
    known = channels >= FIRST
    ledger.relations.colour(channels[known], value.reshape(-1)[known])
    ledger.relations.note(channels[known], f"sees a constant that varies along channels: {where}")
    return labels
