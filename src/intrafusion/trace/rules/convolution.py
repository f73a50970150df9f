"""Convolutions of any rank: plain, grouped, depthwise and transposed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import Role, Slice
from intrafusion.trace.call import Call
from intrafusion.trace.info import Axis, Info, LabelledTensor, Origin, Weight, Writer
from intrafusion.trace.labels import FIRST, FIXED, UNIFORM, lay_along, narrow
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.elementwise import colour_by_value
from intrafusion.trace.rules.reduction import find_channel_dims, unite_per_index


def convolve(ledger: Ledger, call: Call) -> Info:
    x, out, groups = call["input"], call.out, call["groups"]
    info, weight = ledger.look_up(x), ledger.look_up(call["weight"])
    if isinstance(info, Weight):
        info = ledger.activate(info, {1})
    if info is not None and _slides_over_channels(ledger, info):
        if not isinstance(weight, LabelledTensor) and _is_of_width_one(call, find_channel_dims(ledger, info) - {0}):
            return _pass_across(ledger, call, info, weight)
        ledger.forbid(info, f"convolved along channels: {call.where}")
    inputs = unite_per_index(ledger, info.labels, 1) if info else np.zeros(x.shape[1], np.int64)
    depthwise = groups == x.shape[1] and groups > 1
    if not isinstance(weight, Weight):
        outputs = _convolve_unknown(ledger, call, inputs, weight, depthwise)
        return LabelledTensor(lay_along(outputs, 1, out.shape))
    across = _Sides(ledger, call, weight, inputs)
    outputs = across.depthwise() if depthwise else across.plain() if groups == 1 else across.grouped()
    labels = _lay_bias(ledger, call, lay_along(outputs, 1, out.shape))
    origin = _note_kernel_origin(ledger, call, weight, ledger.look_up(call["bias"]))
    writer = None if origin is None else Writer(origin.weight, origin.dim, origin.bias)
    return LabelledTensor(labels, origin, writer=writer)


def _slides_over_channels(ledger: Ledger, info: LabelledTensor) -> bool:
    """Whether the channels lie where a convolution has its space or time, and nowhere else."""
    dims = find_channel_dims(ledger, info)
    return 1 not in dims and bool(dims - {0})


def _is_of_width_one(call: Call, dims: set[int]) -> bool:
    """Whether a convolution does the same at each place along these dimensions, and to each for itself."""
    wanted = {"stride": 1, "padding": 0, "output_padding": 0}
    at = lambda values, d: values[d - 2] if len(values) > 1 else values[0]  # noqa: E731
    alone = all(at(call[name], d) == value for name, value in wanted.items() for d in dims)
    return alone and all(call["weight"].shape[d] == 1 for d in dims)


def _pass_across(ledger: Ledger, call: Call, info: LabelledTensor, weight: Weight | None) -> LabelledTensor:
    """A kernel over tokens, as in a mixer, where what it slides over at width one are the channels: they pass."""
    ledger.pin(weight, f"runs along another axis than the channels': {call.where}")
    dims, labels = find_channel_dims(ledger, info), ledger.settle(info.labels)
    labels = labels[tuple(slice(None) if d in dims else slice(1) for d in range(labels.dim()))].expand(call.out.shape)
    return LabelledTensor(_lay_bias(ledger, call, labels))


def _lay_bias(ledger: Ledger, call: Call, labels: Tensor) -> Tensor:
    bias = ledger.look_up(call["bias"])
    if not isinstance(bias, Weight):
        return labels
    shape = [1, -1] + [1] * (call.out.dim() - 2)
    return ledger.lay(bias.map(lambda c: c.reshape(shape).broadcast_to(call.out.shape)), labels, Role.SHIFTS)


def _convolve_unknown(
    ledger: Ledger, call: Call, inputs: np.ndarray, weight: Info | None, depthwise: bool
) -> np.ndarray:
    """A constant depthwise kernel (blur pooling) sets channels apart by value; any other is refused."""
    kernel, out_channels = call["weight"], call.out.shape[1]
    if weight is None and depthwise and out_channels == len(inputs):
        laid = torch.from_numpy(inputs.copy())[:, None].expand(len(inputs), kernel[0].numel())
        return narrow(colour_by_value(ledger, laid, kernel.flatten(1), call.where))[:, 0]
    reason = f"convolution with a kernel that is no parameter: {call.where}"
    ledger.relations.forbid(inputs, reason)
    ledger.forbid(weight, reason)
    return np.full(out_channels, FIXED)


def _note_kernel_origin(ledger: Ledger, call: Call, weight: Weight, bias: Info | None) -> Origin | None:
    """Remembered where the kernel and the bias are whole parameters, for batch-norm folding."""
    name = weight.single
    if (
        name is None
        or ledger.shapes[name] != tuple(call["weight"].shape)
        or (bias is not None and not _name_bias(bias))
    ):
        return None
    if call["transposed"] and call["groups"] > 1:
        return None
    found = Origin(name, 1 if call["transposed"] else 0, _name_bias(bias))
    return ledger.note_origin(found)


def _name_bias(bias: Info | None) -> str | None:
    return bias.single if isinstance(bias, Weight) else None


class _Sides:
    """The output and the input dimension of one convolution's weight, and the labels on either side."""

    def __init__(self, ledger: Ledger, call: Call, weight: Weight, inputs: np.ndarray) -> None:
        self.ledger, self.call, self.weight, self.inputs = ledger, call, weight, inputs
        self.transposed, self.groups = call["transposed"], call["groups"]
        self.out_channels = call.out.shape[1]
        out_dim, in_dim = (1, 0) if self.transposed else (0, 1)
        self.out_axes = [axis for axis in weight.axes if axis.varies == {out_dim}]
        self.in_axes = [axis for axis in weight.axes if axis.varies == {in_dim}]
        self.out_dim, self.in_dim = out_dim, in_dim
        for axis in weight.axes:
            if axis.varies >= {0, 1}:
                reason = f"weight layout mixes inputs and outputs: {call.where}"
                ledger.relations.pin(axis.tensor, axis.dim, reason)
                ledger.relations.forbid(inputs, reason)

    def record(self, axes: list[Axis], dim: int, role: Role, labels: np.ndarray, within: Slice | None = None) -> None:
        """labels[i] belongs to index i along `dim` of the weight as the convolution sees it."""
        shape = self.call["weight"].shape
        for axis in axes:
            full = lay_along(labels, dim, (*shape[:dim], len(labels), *shape[dim + 1 :]))
            self.ledger.record(self.weight, axis, role, full, within=within)

    def fresh_outputs(self) -> np.ndarray:
        return self.ledger.relations.fresh(self.out_channels)

    def plain(self) -> np.ndarray:
        if self.out_channels == 1:  # one output channel is no channel dimension: it broadcasts
            self.record(self.in_axes, self.in_dim, Role.CONSUMES, self.inputs)
            return np.full(1, UNIFORM)
        outputs = self.fresh_outputs()
        self.record(self.in_axes, self.in_dim, Role.CONSUMES, self.inputs)
        self.record(self.out_axes, self.out_dim, Role.PRODUCES, outputs)
        return self.ledger.relations.sides.find(outputs)

    def depthwise(self) -> np.ndarray:
        """Each input channel has its own kernels: the weight follows."""
        # A constant that its own kernel multiplies is the same for all channels no longer.
        known = np.where(self.inputs == UNIFORM, FIXED, self.inputs)
        several = self.out_channels // len(known)
        # `several` outputs of one input are one channel in as many slots, which later layers may treat differently.
        outputs = np.repeat(known, several)
        if several > 1:
            outputs = self.ledger.relations.copy(outputs, np.arange(len(outputs)) % several)
        axes, dim, labels = (self.in_axes, 0, self.inputs) if self.transposed else (self.out_axes, 0, outputs)
        shape = self.call["weight"].shape
        for axis in axes:
            channels = np.broadcast_to(labels, (shape[dim],))
            positions = axis.coordinates[(slice(None), *[0] * (len(shape) - 1))].numpy()
            keep = (channels >= FIXED) & (positions >= 0)
            self.ledger.relations.share(axis.tensor, axis.dim, Role.SCALES, positions[keep], channels[keep])
        return outputs

    def grouped(self) -> np.ndarray:
        """Every group of a grouped convolution is a block; along the shorter dimension it sees its slice only."""
        # The longer dimension of the weight runs through all groups. The shorter one counts from zero in each group, so
        # one index is another channel in every group: the slice along the longer one says which.
        outputs, groups = self.fresh_outputs(), self.groups
        whole, part = (self.in_axes, self.out_axes) if self.transposed else (self.out_axes, self.in_axes)
        whole_labels, part_labels = (self.inputs, outputs) if self.transposed else (outputs, self.inputs)
        whole_role, part_role = (Role.CONSUMES, Role.PRODUCES) if self.transposed else (Role.PRODUCES, Role.CONSUMES)
        self.record(whole, 0, whole_role, whole_labels)
        size = len(whole_labels) // groups
        for g, (rows, columns) in enumerate(
            zip(np.split(whole_labels, groups), np.split(part_labels, groups), strict=True)
        ):
            for axis in part:
                self.record([axis], 1, part_role, columns, self.slice_of(axis, whole, g * size, size))
            members = np.concatenate([rows, columns])
            self.ledger.relations.block(members[members >= FIRST], Cause.CONVOLUTION, self.call.where)
        return self.ledger.relations.sides.find(outputs)

    def slice_of(self, axis: Axis, whole: list[Axis], start: int, size: int) -> Slice | None:
        """Where this group's kernels lie along the other dimension of the same parameter."""
        for other in whole:
            if other.tensor == axis.tensor:
                rows = other.coordinates[(slice(start, start + size), *[0] * (other.coordinates.dim() - 1))]
                return Slice(other.dim, int(rows[0]), int(rows[-1]) + 1)
        return None
