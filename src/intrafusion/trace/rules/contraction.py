"""Matrix products: linear layers, products of two weights, products of two activations, embeddings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import Role
from intrafusion.trace.call import Call
from intrafusion.trace.info import Axis, Info, LabelledTensor, Origin, Weight, Writer
from intrafusion.trace.labels import UNIFORM, fill, find_varying, lay_along, narrow, widen
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.elementwise import colour_by_value, combine, find_extent, keep_channels, meet
from intrafusion.trace.rules.reduction import (
    are_branches,
    find_channel_dims,
    reduce_labels,
    unite_over,
    unite_per_index,
)

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "_sparse_addmm")


def embed(ledger: Ledger, call: Call) -> Info | None:
    """Rows picked by token: the width is channels, the rows stay."""
    table, indices = ledger.look_up(call["weight"]), call["indices"]
    if table is None:
        return None
    if isinstance(table, Weight):
        ledger.pin(table, "rows are picked by data", {0})
        table = ledger.activate(table, {1})
    row = table.labels[:1].reshape([1] * indices.dim() + [-1])
    return LabelledTensor(row.expand(call.out.shape))


def apply_linear(ledger: Ledger, call: Call) -> Info:
    """aten::linear, seen where torch does not decompose it: x @ weight.T + bias."""
    x, weight = call["input"], call["weight"]
    rows = (1, -1, x.shape[-1])
    kernel = _map(ledger.look_up(weight), lambda c: c.t()[None])
    if isinstance(kernel, Weight):
        kernel.transposed = True
    source = _map(ledger.look_up(x), lambda c: c.reshape(rows))
    product_info = _contract(ledger, call, source, kernel, x.reshape(rows), weight.t()[None])
    info = product_info.map(lambda c: c.reshape(call.out.shape))
    return combine(ledger, call, [info, call["bias"]], call.out.shape) if call["bias"] is not None else info


def multiply(ledger: Ledger, call: Call) -> Info | None:
    """Every matrix product, as a batch of matrices (batch, rows, inner) @ (batch, inner, columns)."""
    added = call.name.startswith(("add", "badd", "_sparse_add"))
    a, b = call.tensors[1:3] if added else call.tensors[:2]
    left, right = _as_matrices(a, left=True), _as_matrices(b, left=False)
    a_info, b_info = _map(ledger.look_up(a), left), _map(ledger.look_up(b), right)
    result: Info | None = None
    if a_info is not None or b_info is not None:
        result = _contract(ledger, call, a_info, b_info, left(a), right(b)).map(lambda c: c.reshape(call.out.shape))
        source = _note_matrix_origin(ledger, call, ledger.look_up(b), call.tensors[0] if added else None)
        if isinstance(result, LabelledTensor):
            result.origin = source
    if added:
        kept = result.origin if isinstance(result, LabelledTensor) else None
        result = _add_bias(ledger, call, result, call.tensors[0])
        if isinstance(result, LabelledTensor):
            result.origin = kept
    if isinstance(result, LabelledTensor) and result.origin is not None:
        result.writer = Writer(result.origin.weight, result.origin.dim, result.origin.bias)
    return result


def _add_bias(ledger: Ledger, call: Call, result: Info | None, bias: Tensor) -> Info:
    info = ledger.look_up(bias)
    if isinstance(result, LabelledTensor) and isinstance(info, Weight):
        return LabelledTensor(ledger.lay(info.broadcast_to(call.out.shape), result.labels, Role.SHIFTS))
    return combine(ledger, call, [(result, call.out), bias], call.out.shape)


def _note_matrix_origin(ledger: Ledger, call: Call, weight: Info | None, bias: Tensor | None) -> Origin | None:
    """A linear layer whose weight and bias are whole parameters, for batch-norm folding."""
    name = weight.single if isinstance(weight, Weight) else None
    if name is None or not isinstance(weight, Weight) or call.out.dim() != 2 or len(ledger.shapes[name]) != 2:
        return None
    info = ledger.look_up(bias)
    bias_name = info.single if isinstance(info, Weight) else None
    if bias is not None and bias_name is None:
        return None
    out_dims = [axis.dim for axis in weight.axes if axis.varies == {1}]
    if len(out_dims) != 1 or ledger.shapes[name][out_dims[0]] != call.out.shape[1]:
        return None
    found = Origin(name, out_dims[0], bias_name)
    return ledger.note_origin(found)


def _as_matrices(x: Tensor, *, left: bool):
    """How a vector or matrix is seen as a batch of matrices."""
    if x.dim() == 3:
        return lambda c: c
    if x.dim() == 2:
        return lambda c: c[None]
    return (lambda c: c[None, None]) if left else (lambda c: c[None, :, None])


def _map(info: Info | None, view) -> Info | None:
    if info is None:
        return None
    result = info.map(view)
    if isinstance(result, Weight) and isinstance(info, Weight):
        result.transposed = info.transposed
    return result


def _flip(c: Tensor) -> Tensor:
    return c.transpose(1, 2)


def _contract(ledger: Ledger, call: Call, a: Info | None, b: Info | None, x: Tensor, y: Tensor) -> Info:
    """What (batch, rows, inner) @ (batch, inner, columns) does, by what either side is."""
    shape = torch.Size((x.shape[0], x.shape[1], y.shape[2]))
    # Two weights are one weight of lower rank (LoRA), unless the right one lies as in F.linear: then the left one is an
    # input that is learned, such as a query.
    if isinstance(a, Weight) and isinstance(b, Weight):
        if not b.transposed:
            return _multiply_weights(ledger, a, b, x.shape[2], shape)
        a = ledger.activate(a, {2})
    # An inner dimension of one sums nothing: an outer product, and so element-wise on the expanded sides.
    if x.shape[2] == 1 and not (isinstance(b, Weight) and b.transposed):
        outer = [(i and i.map(lambda c: c.expand(shape)), v.expand(shape)) for i, v in ((a, x), (b, y))]
        return combine(ledger, call, outer, shape)
    turned = torch.Size((shape[0], shape[2], shape[1]))
    if isinstance(b, Weight):
        return _map_linearly(ledger, call, a, (b, y), shape)
    if isinstance(a, Weight):
        return _map_linearly(ledger, call, b and b.map(_flip), (a.map(_flip), _flip(x)), turned).map(_flip)
    if isinstance(a, LabelledTensor) and isinstance(b, LabelledTensor):
        return _multiply_activations(ledger, call, (a, x), (b, y), shape)
    if isinstance(a, LabelledTensor):
        return _multiply_constant(ledger, call, a, y, shape)
    assert isinstance(b, LabelledTensor)
    return _multiply_constant(ledger, call, b.map(_flip), _flip(x), turned).map(_flip)


def _map_linearly(
    ledger: Ledger, call: Call, a: Info | None, by: tuple[Weight, Tensor], shape: torch.Size
) -> LabelledTensor:
    """An activation (batch, rows, inner) times a weight (batch, inner, columns) of these values."""
    b, values = by
    if isinstance(a, LabelledTensor) and _runs_across(ledger, a, b):
        ledger.pin(b, f"runs along another axis than the channels': {call.where}")
        return _multiply_constant(ledger, call, a, values, shape)
    inner = None
    if isinstance(a, LabelledTensor):
        inner = _gather_inputs(ledger, a.labels)
    mixed = [axis for axis in b.axes if axis.varies >= {1, 2}]
    for axis in mixed:
        reason = f"weight layout mixes inputs and outputs: {call.where}"
        ledger.relations.pin(axis.tensor, axis.dim, reason)
        ledger.forbid(a, reason)
    in_axes = [axis for axis in b.axes if 1 in axis.varies and 2 not in axis.varies]
    out_axes = [axis for axis in b.axes if 2 in axis.varies and 1 not in axis.varies]
    if inner is not None:
        unseen = _find_unseen(ledger, in_axes, inner)
        for axis in in_axes:
            if axis in unseen:
                ledger.relations.pin(axis.tensor, axis.dim, f"meets what has no channels along it: {call.where}")
                continue
            ledger.record(b, axis, Role.CONSUMES, inner)
            if isinstance(a, LabelledTensor):
                ledger.relations.tails[axis.tensor, axis.dim].add(a.tail)
        if not in_axes and 1 in find_varying(inner):
            ledger.relations.forbid(narrow(inner).ravel(), f"multiplied by a constant matrix: {call.where}")
    return LabelledTensor(_make_outputs(ledger, b, out_axes, shape))


def _find_unseen(ledger: Ledger, axes: list[Axis], inner: Tensor) -> list[Axis]:
    """Axes of what a weight reads along which there are no channels: the other axes tell each label.

    As where several functions of each channel are read, flattened, by a weight (outputs, channels, functions).
    """
    if len(axes) < 2:
        return []
    roots = ledger.relations.roots(narrow(inner))  # what was stacked has labels of its own at each place
    labels, *rows = (
        a.ravel() for a in np.broadcast_arrays(roots, *(narrow(axis.coordinates[..., :1]) for axis in axes))
    )
    count = lambda *columns: np.unique(np.stack(columns), axis=1).shape[1]  # noqa: E731
    rests = [[row for row in rows if row is not own] for own in rows]
    unseen = [
        axis for axis, rest in zip(axes, rests, strict=True) if count(labels, *rest) == count(*rest) < len(labels)
    ]
    return unseen if len(unseen) < len(axes) else []


def _runs_across(ledger: Ledger, a: LabelledTensor, b: Weight) -> bool:
    """Whether a matrix mixes rows, or branches, of an activation (batch, rows, inner) that has its channels elsewhere.

    Buffers do where there are channels along the rows at all. A weight that training made does over what are no
    channels, such as the tokens of a mixer, and over the branches of several layers; else it has channels of its own.
    """
    dims = find_channel_dims(ledger, a)
    if 1 not in dims or ledger.is_of_buffers(b):
        return 1 in dims
    if 2 not in dims:
        return True
    labels = narrow(ledger.settle(a.labels))
    return are_branches(ledger, np.unique(labels.reshape(-1, labels.shape[2]), axis=0))


def _gather_inputs(ledger: Ledger, labels: Tensor) -> Tensor:
    """Labels (batch, rows, inner) as the weight's columns see them: (batch, inner, 1), rows united."""
    batch, _, inner = labels.shape
    # One weight for the whole batch sees all its labels in one column; a batch of weights sees each its own.
    if 0 not in find_varying(labels):
        return lay_along(unite_per_index(ledger, labels, 2), 1, (batch, inner, 1))
    return torch.stack([lay_along(unite_per_index(ledger, m[None], 2), 0, (inner, 1)) for m in labels])


def _make_outputs(ledger: Ledger, b: Weight, axes: list[Axis], shape: torch.Size) -> Tensor:
    """New labels for the columns of a weight."""
    batch, _, columns = shape
    if not axes:
        return fill(UNIFORM, shape) if columns == 1 else LabelledTensor.fixed(shape).labels
    # A weight of its own for each matrix of the batch (experts, bilinear forms) makes channels of its own.
    count = batch if any(0 in axis.varies for axis in axes) else 1
    fresh = torch.from_numpy(ledger.relations.fresh(count * columns)).view(count, 1, columns)
    for axis in axes:
        ledger.record(
            b, axis, Role.PRODUCES, fresh.expand(batch, 1, columns).expand(batch, axis.coordinates.shape[1], columns)
        )
    # Where the layer ran before: its channels as they were then, and not what they were multiplied with since.
    return widen(ledger.relations.sides.find(fresh.numpy()), shape)


def _multiply_weights(ledger: Ledger, a: Weight, b: Weight, inner: int, shape: torch.Size) -> Weight:
    """Two weights multiplied before use (LoRA): the inner dimension is a group of its own."""
    left = [axis for axis in a.axes if 2 in axis.varies]
    right = [axis for axis in b.axes if 1 in axis.varies]
    if left and right:
        labels = ledger.relations.fresh(inner)
        for axis in left:
            ledger.record(a, axis, Role.CONSUMES, lay_along(labels, 2, axis.coordinates.shape))
        for axis in right:
            ledger.record(b, axis, Role.PRODUCES, lay_along(labels, 1, axis.coordinates.shape))
    axes = [
        Axis(axis.tensor, axis.dim, axis.coordinates.narrow(2, 0, 1).expand(shape))
        for axis in a.axes
        if 2 not in axis.varies
    ]
    axes += [
        Axis(axis.tensor, axis.dim, axis.coordinates.narrow(1, 0, 1).expand(shape))
        for axis in b.axes
        if 1 not in axis.varies
    ]
    return Weight(axes, nonlinear=a.nonlinear or b.nonlinear)


def _multiply_activations(
    ledger: Ledger, call: Call, a: tuple[LabelledTensor, Tensor], b: tuple[LabelledTensor, Tensor], shape: torch.Size
) -> LabelledTensor:
    """Attention and its like: what is contracted pairs up, what is kept meets."""
    met = keep_channels(
        ledger,
        [
            (a[0].labels[..., None], find_extent(a[1][..., None], 4)),
            (b[0].labels[:, None], find_extent(b[1][:, None], 4)),
        ],
        call.where,
    )
    # Over (batch, rows, inner, columns) the product is element-wise: labels meet there, then `inner` is summed away.
    ledger.relations.products.add(call.where)
    labels = meet(ledger, met)
    four = (shape[0], *labels.shape[1:])
    reduced = reduce_labels(ledger, widen(labels, four), {2}, Cause.PRODUCT, call.where).squeeze(2)
    return LabelledTensor(widen(narrow(reduced), shape))


def _multiply_constant(
    ledger: Ledger, call: Call, info: LabelledTensor, matrix: Tensor, shape: torch.Size
) -> LabelledTensor:
    """An activation (batch, rows, inner) times a constant matrix (batch, inner, columns).

    Fine over tokens. Over the branches of the channels that lie along the rows, each branch meets numbers of its own,
    and the branches of a channel move together. Over the channels alone it is refused.
    """
    dims = find_channel_dims(ledger, info)
    labels = ledger.settle(info.labels)
    if 2 in dims and 1 in dims:
        whole = (*labels.shape, matrix.shape[2])
        labels = colour_by_value(ledger, labels[..., None].expand(whole), matrix[:, None], call.where)[..., 0]
        labels = unite_over(ledger, labels, {2})
    elif 2 in dims:
        kind, hint = "constant", ""
        if matrix.is_complex():  # a complex parameter may be meant, of which nothing is known
            kind, hint = "complex", "; a parameter is followed where view_as_complex makes it from real ones"
        ledger.relations.forbid(narrow(labels).ravel(), f"multiplied by a {kind} matrix: {call.where}{hint}")
    return LabelledTensor(reduce_labels(ledger, labels, {2}, Cause.REDUCTION, call.where).expand(shape))
