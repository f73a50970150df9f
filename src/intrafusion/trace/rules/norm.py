"""Batch, instance, group, layer and RMS norms, and weight norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from intrafusion.graph import Role
from intrafusion.trace.info import Activation, Info, Weight
from intrafusion.trace.labels import compact, spread
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.elementwise import combine
from intrafusion.trace.rules.reduction import blocks, channel_vector

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer

NORMS = (
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_fused_rms_norm",
)
ROLES = {"weight": Role.SCALES, "bias": Role.SHIFTS, "running_mean": Role.MEAN, "running_var": Role.VARIANCE}


def norm(t: Tracer, call: Call) -> list[Info | None]:
    x = call["input"]
    info = t.info(x)
    tensors = {name: call[name] for name in ROLES if isinstance(call[name], Tensor)}
    rest: list[Info | None] = [None] * (len(call.outputs) - 1)
    if info is None:
        for tensor in tensors.values():
            t.pin(t.info(tensor), f"normalises fixed data: {call.where}")
        return [None, *rest]
    last = "layer" in call.name or "rms" in call.name
    if not isinstance(info, Activation):
        return [normalised_weight(t, call, info, tensors, last), *rest]
    couple_statistics(t, call, info, last)
    labels = info.labels
    for name, tensor in tensors.items():
        labels = follow(t, labels, tensor, ROLES[name], x, last)
    if "batch" in call.name:
        remember(t, call, info, tensors)
    return [Activation(compact(labels)), *rest]


def follow(t: Tracer, labels: Tensor, tensor: Tensor, role: Role, x: Tensor, last: bool) -> Tensor:
    """One of the norm's own tensors, laid along the channels."""
    weight = t.info(tensor)
    if not isinstance(weight, Weight):
        return labels
    return t.follow(along_channels(weight, tensor, x, last), labels, role)


def along_channels(weight: Weight, tensor: Tensor, x: Tensor, last: bool) -> Weight:
    shape = tensor.shape if last else (1, -1, *[1] * (x.dim() - 2))
    return weight.map(lambda c: c.reshape(shape).broadcast_to(x.shape))


def couple_statistics(t: Tracer, call: Call, info: Activation, last: bool) -> None:
    """Layer, RMS and group norms see several channels at once; batch and instance norms do not."""
    x = call["input"]
    if last:
        dims = set(range(x.dim() - len(call["normalized_shape"]), x.dim()))
        blocks(t, info.labels, dims, Cause.STATISTICS, call.where)
    elif "group" in call.name and call["group"] < x.shape[1]:
        channels = channel_vector(t, info.labels, 1).reshape(call["group"], -1)
        blocks(t, spread(channels, channels.shape), {1}, Cause.STATISTICS, call.where)


def remember(t: Tracer, call: Call, info: Activation, tensors: dict[str, Tensor]) -> None:
    """A batch norm that reads a linear map's output directly may be folded into it."""
    names = tuple(owner(t, tensors.get(name)) for name in ROLES)
    mean = names[2]
    if mean is not None:
        t.relations.norm_calls[mean] += 1
    if info.origin is not None:
        info.origin.norm, info.origin.eps = names, call["eps"] or 0.0


def owner(t: Tracer, tensor: Tensor | None) -> str | None:
    info = t.info(tensor)
    return info.single if isinstance(info, Weight) else None


def normalised_weight(t: Tracer, call: Call, weight: Weight, tensors: dict[str, Tensor], last: bool) -> Weight:
    """A norm applied to a weight (weight standardisation): coordinates stay, linearity is lost."""
    x, planes = call["input"], list(weight.planes)
    for tensor in tensors.values():
        info = t.info(tensor)
        if isinstance(info, Weight):
            planes += along_channels(info, tensor, x, last).planes
    return Weight(planes, nonlinear=call.where)


def weight_norm(t: Tracer, call: Call) -> list[Info | None]:
    v, g = call["v"], call["g"]
    return [combine(t, call, [v, g], call.outputs[0].shape), None]
