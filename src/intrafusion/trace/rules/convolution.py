"""Convolutions of any rank: plain, grouped, depthwise and transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from intrafusion.graph import Role, Slice
from intrafusion.trace.info import Activation, Info, Origin, Plane, Weight
from intrafusion.trace.labels import FIRST, FIXED, UNIFORM, along, narrowed
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.elementwise import pattern
from intrafusion.trace.rules.reduction import channel_vector

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer


def convolution(t: Tracer, call: Call) -> Info:
    x, out, groups = call["input"], call.out, call["groups"]
    info, weight = t.info(x), t.info(call["weight"])
    if isinstance(info, Weight):
        info = t.activate(info, {1})
    inputs = channel_vector(t, info.labels, 1) if info else np.zeros(x.shape[1], np.int64)
    depthwise = groups == x.shape[1] and groups > 1
    if not isinstance(weight, Weight):
        outputs = unknown_kernel(t, call, inputs, weight, depthwise)
        return Activation(along(outputs, 1, out.shape))
    across = Sides(t, call, weight, inputs)
    outputs = across.depthwise() if depthwise else across.plain() if groups == 1 else across.grouped()
    labels = along(outputs, 1, out.shape)
    bias = t.info(call["bias"])
    if isinstance(bias, Weight):
        shape = [1, -1] + [1] * (out.dim() - 2)
        labels = t.follow(bias.map(lambda c: c.reshape(shape).broadcast_to(out.shape)), labels, Role.SHIFTS)
    return Activation(labels, origin(t, call, weight, bias))


def unknown_kernel(t: Tracer, call: Call, inputs: np.ndarray, weight: Info | None, depthwise: bool) -> np.ndarray:
    """A constant depthwise kernel (blur pooling) sets channels apart by value; any other is refused."""
    kernel, out_channels = call["weight"], call.out.shape[1]
    if weight is None and depthwise and out_channels == len(inputs):
        laid = torch.from_numpy(inputs.copy())[:, None].expand(len(inputs), kernel[0].numel())
        return narrowed(pattern(t, laid, kernel.flatten(1), call.where))[:, 0]
    reason = f"convolution with a kernel that is no parameter: {call.where}"
    t.relations.forbid(inputs, reason)
    t.forbid(weight, reason)
    return np.full(out_channels, FIXED)


def origin(t: Tracer, call: Call, weight: Weight, bias: Info | None) -> Origin | None:
    """Remembered where the kernel and the bias are whole parameters, for batch-norm folding."""
    name = weight.single
    if name is None or t.shapes[name] != tuple(call["weight"].shape) or (bias is not None and not bias_name(bias)):
        return None
    if call["transposed"] and call["groups"] > 1:
        return None
    found = Origin(name, 1 if call["transposed"] else 0, bias_name(bias))
    t.origins.append(found)
    return found


def bias_name(bias: Info | None) -> str | None:
    return bias.single if isinstance(bias, Weight) else None


class Sides:
    """The output and the input dimension of one convolution's weight, and the labels on either side."""

    def __init__(self, t: Tracer, call: Call, weight: Weight, inputs: np.ndarray) -> None:
        self.t, self.call, self.weight, self.inputs = t, call, weight, inputs
        self.transposed, self.groups = call["transposed"], call["groups"]
        self.out_channels = call.out.shape[1]
        out_dim, in_dim = (1, 0) if self.transposed else (0, 1)
        self.out_planes = [p for p in weight.planes if p.varies == {out_dim}]
        self.in_planes = [p for p in weight.planes if p.varies == {in_dim}]
        self.out_dim, self.in_dim = out_dim, in_dim
        for plane in weight.planes:
            if plane.varies >= {0, 1}:
                reason = f"weight layout mixes inputs and outputs: {call.where}"
                t.relations.pin(plane.tensor, plane.dim, reason)
                t.relations.forbid(inputs, reason)

    def record(
        self, planes: list[Plane], dim: int, role: Role, labels: np.ndarray, within: Slice | None = None
    ) -> None:
        """labels[i] belongs to index i along `dim` of the weight as the convolution sees it."""
        shape = self.call["weight"].shape
        for plane in planes:
            full = along(labels, dim, (*shape[:dim], len(labels), *shape[dim + 1 :]))
            self.t.record(self.weight, plane, role, full, within=within)

    def fresh_outputs(self) -> np.ndarray:
        return self.t.relations.fresh(self.out_channels)

    def plain(self) -> np.ndarray:
        if self.out_channels == 1:  # one output channel is no channel dimension: it broadcasts
            self.record(self.in_planes, self.in_dim, Role.CONSUMES, self.inputs)
            return np.full(1, UNIFORM)
        outputs = self.fresh_outputs()
        self.record(self.in_planes, self.in_dim, Role.CONSUMES, self.inputs)
        self.record(self.out_planes, self.out_dim, Role.PRODUCES, outputs)
        return self.t.relations.roots(outputs)

    def depthwise(self) -> np.ndarray:
        """Each input channel has its own kernels: the weight follows."""
        known = np.where(self.inputs == UNIFORM, FIXED, self.inputs)
        several = self.out_channels // len(known)
        outputs = np.repeat(known, several)
        if several > 1:
            outputs = self.t.relations.copy(outputs, np.arange(len(outputs)) % several)
        planes, dim, labels = (self.in_planes, 0, self.inputs) if self.transposed else (self.out_planes, 0, outputs)
        shape = self.call["weight"].shape
        for plane in planes:
            channels = np.broadcast_to(labels, (shape[dim],))
            positions = plane.coordinates[(slice(None), *[0] * (len(shape) - 1))].numpy()
            keep = (channels >= FIXED) & (positions >= 0)
            self.t.relations.follow(plane.tensor, plane.dim, Role.SCALES, positions[keep], channels[keep])
        return outputs

    def grouped(self) -> np.ndarray:
        """Every group of a grouped convolution is a block; along the shorter dimension it sees its slice only."""
        outputs, groups = self.fresh_outputs(), self.groups
        whole, part = (self.in_planes, self.out_planes) if self.transposed else (self.out_planes, self.in_planes)
        whole_labels, part_labels = (self.inputs, outputs) if self.transposed else (outputs, self.inputs)
        whole_role, part_role = (Role.CONSUMES, Role.PRODUCES) if self.transposed else (Role.PRODUCES, Role.CONSUMES)
        self.record(whole, 0, whole_role, whole_labels)
        size = len(whole_labels) // groups
        for g, (rows, columns) in enumerate(
            zip(np.split(whole_labels, groups), np.split(part_labels, groups), strict=True)
        ):
            for plane in part:
                self.record([plane], 1, part_role, columns, self.slice_of(plane, whole, g * size, size))
            members = np.concatenate([rows, columns])
            self.t.relations.block(members[members >= FIRST], Cause.CONVOLUTION, self.call.where)
        return self.t.relations.roots(outputs)

    def slice_of(self, plane: Plane, whole: list[Plane], start: int, size: int) -> Slice | None:
        """Where this group's kernels lie along the other dimension of the same parameter."""
        for other in whole:
            if other.tensor == plane.tensor:
                rows = other.coordinates[(slice(start, start + size), *[0] * (other.coordinates.dim() - 1))]
                return Slice(other.dim, int(rows[0]), int(rows[-1]) + 1)
        return None
