"""Batch, instance, group, layer and RMS norms, and weight norm."""

from __future__ import annotations

from torch import Tensor

from intrafusion.graph import Role, WeightNorm
from intrafusion.trace.call import Call
from intrafusion.trace.info import Info, LabelledTensor, Tail, Weight
from intrafusion.trace.labels import compact, widen
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.elementwise import combine
from intrafusion.trace.rules.reduction import reduce_labels, unite_per_index

NORMALISATIONS = (
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
_OWN_ROLES = {
    "weight": Role.SCALES,
    "bias": Role.SHIFTS,
    "running_mean": Role.MEAN,
    "running_var": Role.VARIANCE,
}


def normalise(ledger: Ledger, call: Call) -> list[Info | None]:
    x = call["input"]
    info = ledger.look_up(x)
    tensors = {name: call[name] for name in _OWN_ROLES if isinstance(call[name], Tensor)}
    rest: list[Info | None] = [None] * (len(call.outputs) - 1)
    if info is None:
        for tensor in tensors.values():
            ledger.pin(ledger.look_up(tensor), f"normalises fixed data: {call.where}")
        return [None, *rest]
    last = "layer" in call.name or "rms" in call.name
    if not isinstance(info, LabelledTensor):
        return [_normalise_weight(ledger, call, info, tensors, last), *rest]
    _couple_statistics(ledger, call, info, last)  # a block for its own sake: the labels pass unchanged
    labels = info.labels
    for name, tensor in tensors.items():
        labels = _lay_own_tensor(ledger, labels, tensor, _OWN_ROLES[name], x, last)
    if "batch" in call.name:
        _note_norm(ledger, call, info, tensors)
    scale, shift = (_find_owner(ledger, tensors.get(name)) if last else None for name in ("weight", "bias"))
    return [LabelledTensor(compact(labels), tail=Tail(scale, shift) if scale or shift else None), *rest]


def _lay_own_tensor(ledger: Ledger, labels: Tensor, tensor: Tensor, role: Role, x: Tensor, last: bool) -> Tensor:
    """One of the norm's own tensors, laid along the channels."""
    weight = ledger.look_up(tensor)
    if not isinstance(weight, Weight):
        return labels
    return ledger.lay(_lay_along_channels(weight, tensor, x, last), labels, role)


def _lay_along_channels(weight: Weight, tensor: Tensor, x: Tensor, last: bool) -> Weight:
    shape = tensor.shape if last else (1, -1, *[1] * (x.dim() - 2))
    return weight.map(lambda c: c.reshape(shape).broadcast_to(x.shape))


def _couple_statistics(ledger: Ledger, call: Call, info: LabelledTensor, last: bool) -> None:
    """Layer, RMS and group norms see several channels at once; batch and instance norms do not."""
    x = call["input"]
    if last:
        dims = set(range(x.dim() - len(call["normalized_shape"]), x.dim()))
        reduce_labels(ledger, info.labels, dims, Cause.STATISTICS, call.where)
    elif "group" in call.name and call["group"] < x.shape[1]:
        channels = unite_per_index(ledger, info.labels, 1).reshape(call["group"], -1)
        reduce_labels(ledger, widen(channels, channels.shape), {1}, Cause.STATISTICS, call.where)


def _note_norm(ledger: Ledger, call: Call, info: LabelledTensor, tensors: dict[str, Tensor]) -> None:
    """A batch norm that reads a linear map's output directly may be folded into it."""
    names = tuple(_find_owner(ledger, tensors.get(name)) for name in _OWN_ROLES)
    mean = names[2]
    if mean is not None:
        ledger.relations.norm_calls[mean] += 1
    if info.origin is not None:
        info.origin.norm, info.origin.eps = names, find_eps(call)


def find_eps(call: Call) -> float:
    """What a norm adds to the variance; cuDNN and MIOpen call it by another name."""
    return call["eps"] or call["epsilon"] or 0.0


def _find_owner(ledger: Ledger, tensor: Tensor | None) -> str | None:
    info = ledger.look_up(tensor)
    return info.single if isinstance(info, Weight) else None


def _normalise_weight(ledger: Ledger, call: Call, weight: Weight, tensors: dict[str, Tensor], last: bool) -> Weight:
    """A norm applied to a weight (weight standardisation): coordinates stay, linearity is lost."""
    x, axes = call["input"], list(weight.axes)
    for tensor in tensors.values():
        info = ledger.look_up(tensor)
        if isinstance(info, Weight):
            axes += _lay_along_channels(info, tensor, x, last).axes
    return Weight(axes, nonlinear=call.where)


def reparametrise(ledger: Ledger, call: Call) -> list[Info | None]:
    v, g = call["v"], call["g"]
    direction, length = _find_owner(ledger, v), _find_owner(ledger, g)
    if direction is not None and length is not None and ledger.shapes[direction] == tuple(v.shape):
        ledger.relations.weight_norms[direction] = WeightNorm(direction, length, call["dim"] % v.dim())
    return [combine(ledger, call, [v, g], call.outputs[0].shape), None]
