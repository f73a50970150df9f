"""Matrix products: linear layers, products of two weights, products of two activations, embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import Role
from intrafusion.trace.info import Activation, Info, Origin, Plane, Weight
from intrafusion.trace.labels import UNIFORM, along, filled, narrowed, spread, varying
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.elementwise import combine, extent, with_channels
from intrafusion.trace.rules.reduction import blocks, channel_vector

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot")


def embedding(t: Tracer, call: Call) -> Info | None:
    """Rows picked by token: the width is channels, the rows stay."""
    table, indices = t.info(call["weight"]), call["indices"]
    if table is None:
        return None
    if isinstance(table, Weight):
        t.pin(table, "rows are picked by data", {0})
        table = t.activate(table, {1})
    row = table.labels[:1].reshape([1] * indices.dim() + [-1])
    return Activation(row.expand(call.out.shape))


def linear_layer(t: Tracer, call: Call) -> Info:
    """aten::linear, seen where torch does not decompose it: x @ weight.T + bias."""
    x, weight = call["input"], call["weight"]
    rows = (1, -1, x.shape[-1])
    kernel = moved(t.info(weight), lambda c: c.t()[None])
    if isinstance(kernel, Weight):
        kernel.transposed = True
    source = moved(t.info(x), lambda c: c.reshape(rows))
    product_info = contract(t, call, source, kernel, x.reshape(rows), weight.t()[None])
    info = product_info.map(lambda c: c.reshape(call.out.shape))
    return combine(t, call, [info, call["bias"]], call.out.shape) if call["bias"] is not None else info


def product(t: Tracer, call: Call) -> Info | None:
    """Every matrix product, as a batch of matrices (batch, rows, inner) @ (batch, inner, columns)."""
    added = call.name.startswith(("add", "badd"))
    a, b = call.tensors[1:3] if added else call.tensors[:2]
    left, right = batched(a, left=True), batched(b, left=False)
    a_info, b_info = moved(t.info(a), left), moved(t.info(b), right)
    result: Info | None = None
    if a_info is not None or b_info is not None:
        result = contract(t, call, a_info, b_info, left(a), right(b)).map(lambda c: c.reshape(call.out.shape))
        source = origin(t, call, t.info(b), call.tensors[0] if added else None)
        if isinstance(result, Activation):
            result.origin = source
    if not added:
        return result
    kept = result.origin if isinstance(result, Activation) else None
    result = add(t, call, result, call.tensors[0])
    if isinstance(result, Activation):
        result.origin = kept
    return result


def add(t: Tracer, call: Call, result: Info | None, bias: Tensor) -> Info:
    info = t.info(bias)
    if isinstance(result, Activation) and isinstance(info, Weight):
        return Activation(t.follow(info.broadcast_to(call.out.shape), result.labels, Role.SHIFTS))
    return combine(t, call, [(result, call.out), bias], call.out.shape)


def origin(t: Tracer, call: Call, weight: Info | None, bias: Tensor | None) -> Origin | None:
    """A linear layer whose weight and bias are whole parameters, for batch-norm folding."""
    name = weight.single if isinstance(weight, Weight) else None
    if name is None or not isinstance(weight, Weight) or call.out.dim() != 2 or len(t.shapes[name]) != 2:
        return None
    info = t.info(bias)
    bias_name = info.single if isinstance(info, Weight) else None
    if bias is not None and bias_name is None:
        return None
    out_dims = [p.dim for p in weight.planes if p.varies == {1}]
    if len(out_dims) != 1 or t.shapes[name][out_dims[0]] != call.out.shape[1]:
        return None
    found = Origin(name, out_dims[0], bias_name)
    t.origins.append(found)
    return found


def batched(x: Tensor, *, left: bool):
    """How a vector or matrix is seen as a batch of matrices."""
    if x.dim() == 3:
        return lambda c: c
    if x.dim() == 2:
        return lambda c: c[None]
    return (lambda c: c[None, None]) if left else (lambda c: c[None, :, None])


def moved(info: Info | None, view) -> Info | None:
    if info is None:
        return None
    result = info.map(view)
    if isinstance(result, Weight) and isinstance(info, Weight):
        result.transposed = info.transposed
    return result


def flip(c: Tensor) -> Tensor:
    return c.transpose(1, 2)


def contract(t: Tracer, call: Call, a: Info | None, b: Info | None, x: Tensor, y: Tensor) -> Info:
    """What (batch, rows, inner) @ (batch, inner, columns) does, by what either side is."""
    shape = torch.Size((x.shape[0], x.shape[1], y.shape[2]))
    if isinstance(a, Weight) and isinstance(b, Weight):
        if not b.transposed:
            return product_of_weights(t, a, b, x.shape[2], shape)
        a = t.activate(a, {2})
    if x.shape[2] == 1 and not (isinstance(b, Weight) and b.transposed):
        outer = [(i and i.map(lambda c: c.expand(shape)), v.expand(shape)) for i, v in ((a, x), (b, y))]
        return combine(t, call, outer, shape)
    if isinstance(b, Weight):
        return linear(t, call, a, b, shape)
    if isinstance(a, Weight):
        turned = linear(t, call, b and b.map(flip), a.map(flip), torch.Size((shape[0], shape[2], shape[1])))
        return turned.map(flip)
    if isinstance(a, Activation) and isinstance(b, Activation):
        return product_of_activations(t, call, (a, x), (b, y), shape)
    return product_with_constant(t, call, a or b, 2 if a else 1, shape)


def linear(t: Tracer, call: Call, a: Info | None, b: Weight, shape: torch.Size) -> Activation:
    """An activation (batch, rows, inner) times a weight (batch, inner, columns)."""
    inner = None
    if isinstance(a, Activation):
        inner = channel_inputs(t, a.labels)
    mixed = [p for p in b.planes if p.varies >= {1, 2}]
    for plane in mixed:
        reason = f"weight layout mixes inputs and outputs: {call.where}"
        t.relations.pin(plane.tensor, plane.dim, reason)
        t.forbid(a, reason)
    in_planes = [p for p in b.planes if 1 in p.varies and 2 not in p.varies]
    out_planes = [p for p in b.planes if 2 in p.varies and 1 not in p.varies]
    if inner is not None:
        for plane in in_planes:
            t.record(b, plane, Role.CONSUMES, inner)
        if not in_planes and 1 in varying(inner):
            t.relations.forbid(narrowed(inner).ravel(), f"contracted with a constant: {call.where}")
    return Activation(outputs(t, b, out_planes, shape))


def channel_inputs(t: Tracer, labels: Tensor) -> Tensor:
    """Labels (batch, rows, inner) as the weight's columns see them: (batch, inner, 1), rows united."""
    batch, _, inner = labels.shape
    if 0 not in varying(labels):
        return along(channel_vector(t, labels, 2), 1, (batch, inner, 1))
    return torch.stack([along(channel_vector(t, m[None], 2), 0, (inner, 1)) for m in labels])


def outputs(t: Tracer, b: Weight, planes: list[Plane], shape: torch.Size) -> Tensor:
    """New labels for the columns of a weight."""
    batch, _, columns = shape
    if not planes:
        return filled(UNIFORM, shape) if columns == 1 else t.fixed(shape).labels
    count = batch if any(0 in p.varies for p in planes) else 1
    fresh = torch.from_numpy(t.relations.fresh(count * columns)).view(count, 1, columns)
    for plane in planes:
        t.record(
            b, plane, Role.PRODUCES, fresh.expand(batch, 1, columns).expand(batch, plane.coordinates.shape[1], columns)
        )
    return spread(t.relations.roots(fresh.numpy()), shape)


def product_of_weights(t: Tracer, a: Weight, b: Weight, inner: int, shape: torch.Size) -> Weight:
    """Two weights multiplied before use (LoRA): the inner dimension is a group of its own."""
    left = [p for p in a.planes if 2 in p.varies]
    right = [p for p in b.planes if 1 in p.varies]
    if left and right:
        labels = t.relations.fresh(inner)
        for plane in left:
            t.record(a, plane, Role.CONSUMES, along(labels, 2, plane.coordinates.shape))
        for plane in right:
            t.record(b, plane, Role.PRODUCES, along(labels, 1, plane.coordinates.shape))
    planes = [
        Plane(p.tensor, p.dim, p.coordinates.narrow(2, 0, 1).expand(shape)) for p in a.planes if 2 not in p.varies
    ]
    planes += [
        Plane(p.tensor, p.dim, p.coordinates.narrow(1, 0, 1).expand(shape)) for p in b.planes if 1 not in p.varies
    ]
    return Weight(planes, nonlinear=a.nonlinear or b.nonlinear)


def product_of_activations(
    t: Tracer, call: Call, a: tuple[Activation, Tensor], b: tuple[Activation, Tensor], shape: torch.Size
) -> Activation:
    """Attention and its like: what is contracted pairs up, what is kept meets."""
    met = with_channels(
        t,
        [
            (a[0].labels[..., None], extent(a[1][..., None], 4)),
            (b[0].labels[:, None], extent(b[1][:, None], 4)),
        ],
        call.where,
    )
    labels = narrowed(met[0])
    for other in met[1:]:
        labels = t.relations.merge(*np.broadcast_arrays(labels, narrowed(other)))
    four = (shape[0], *labels.shape[1:])
    reduced = blocks(t, spread(labels, four), {2}, Cause.PRODUCT, call.where).squeeze(2)
    return Activation(spread(narrowed(reduced), shape))


def product_with_constant(t: Tracer, call: Call, info: Info | None, inner: int, shape: torch.Size) -> Activation:
    """A constant mixing matrix: fine over tokens, refused over channels."""
    assert isinstance(info, Activation)
    labels = spread(t.relations.roots(narrowed(info.labels)), info.labels.shape)
    if inner in varying(labels):
        t.relations.forbid(narrowed(labels).ravel(), f"contracted with a constant: {call.where}")
    return Activation(blocks(t, labels, {inner}, Cause.REDUCTION, call.where).expand(shape))
