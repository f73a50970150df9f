"""Reductions, softmax, ordered scans and pooling: several channels seen together become a block."""

from __future__ import annotations

import itertools
import math

import numpy as np
from torch import Tensor

from intrafusion.graph import Factor
from intrafusion.trace.call import Call
from intrafusion.trace.info import Axis, Info, LabelledTensor, Outcome, Weight
from intrafusion.trace.labels import FIRST, UNIFORM, find_varying, narrow, widen
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.refusal import refuse

AGGREGATIONS = (
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "prod",
    "var_mean",
    "std_mean",
    "any",
    "_is_any_true",
    "all",
    "_is_all_true",
    "max",
    "min",
    "argmax",
    "argmin",
    "median",
)
_INDICES = ("argmax", "argmin", "max", "min", "median")
SOFTMAXES = ("_softmax", "_log_softmax", "_safe_softmax")
SCANS = ("cumsum", "cumprod", "sort", "topk", "argsort", "logcumsumexp", "cummax", "cummin")
POOLS = ("avg_pool", "max_pool", "adaptive_", "_adaptive_", "upsample_", "_upsample_", "fractional_max")


def reduce_labels(ledger: Ledger, labels: Tensor, dims: set[int], cause: Cause, where: str) -> Tensor:
    """Labels after a symmetric reduction over dims (size 1 there): several channels together give a block label."""
    array = narrow(ledger.settle(labels))
    # Where the labels do not vary, one channel is summed with itself (over space, over tokens): it stays that channel.
    over = [d for d in sorted(dims) if array.shape[d] > 1]
    shape = tuple(1 if d in dims else s for d, s in enumerate(labels.shape))
    if not over:
        return widen(array, shape)
    rest = [d for d in range(array.ndim) if d not in over]
    moved = array.transpose(rest + over)
    # Symmetric: only which channels are in a row matters, so rows are sets, and equal sets get one block label.
    rows = np.sort(moved.reshape(int(np.prod([array.shape[d] for d in rest])), -1), axis=-1)
    distinct, which = np.unique(rows, axis=0, return_inverse=True)
    if cause == Cause.REDUCTION and len(distinct) > 1 and are_branches(ledger, distinct):
        for one, other in itertools.pairwise(distinct.T):
            ledger.relations.unite(one, other)
    results = np.array([_name_together(ledger, np.unique(row), cause, where) for row in distinct])
    reduced = results[which.reshape(-1)].reshape([1 if d in over else s for d, s in enumerate(array.shape)])
    return widen(reduced, shape)


def are_branches(ledger: Ledger, rows: np.ndarray) -> bool:
    """Whether the labels of each row are channels of as many layers: branches that are summed, as by a plus."""
    return all(_are_of_layers(ledger, row) for row in rows)


def _are_of_layers(ledger: Ledger, row: np.ndarray) -> bool:
    channels = np.unique(ledger.relations.roots(row))
    makers = ledger.relations.makers(channels)
    named = bool(channels[0] >= FIRST and not ledger.relations.is_block[channels].any())
    return named and len(makers) == len(np.unique(makers))


def _name_together(ledger: Ledger, labels: np.ndarray, cause: Cause, where: str) -> int:
    channels = labels[labels >= FIRST]
    roots = np.unique(ledger.relations.roots(labels))
    if len(roots) == 1 or len(channels) == 0:
        return int(labels.max())  # one channel; or nothing but fixed data and constants, of which fixed wins
    named = roots[(roots >= FIRST) & ~ledger.relations.is_block[roots]]
    if len(named) == 1:  # beside it only blocks, such as the head it is in
        ledger.relations.unite(np.broadcast_to(named, len(channels)), channels)
        return int(named[0])
    if len(channels) == 1:
        return int(channels[0])
    return ledger.relations.block(channels, cause, where)


def unite_per_index(ledger: Ledger, labels: Tensor, dim: int) -> np.ndarray:
    """One label per index of dim: labels that share an index are united, as a weight's column sees them all."""
    size = labels.shape[dim]
    array = narrow(labels)
    if array.shape[dim] == array.size:
        return np.broadcast_to(array.reshape(-1), (size,))
    rows = np.unique(np.moveaxis(array, dim, -1).reshape(-1, array.shape[dim]), axis=0)
    # The k-th column multiplies whatever stands at index k, in every row and at every place: all that is one channel.
    united = rows[0]
    for row in rows[1:]:
        united = ledger.relations.merge(united, row)
    return np.broadcast_to(united, (size,))


def unite_over(ledger: Ledger, labels: Tensor, dims: set[int]) -> Tensor:
    """Labels of which those along some dimensions are one channel: a resampled map, branches mixed by a matrix."""
    array = narrow(labels)
    for dim in sorted(dims):
        united = array.take([0], dim)
        for k in range(1, array.shape[dim]):
            united = ledger.relations.merge(united, array.take([k], dim))
        array = united
    return widen(array, labels.shape)


def summarise(ledger: Ledger, call: Call) -> Outcome:
    x, out = call["self"], call.outputs[0]
    info = ledger.look_up(x)
    if info is None:
        return refuse(ledger, call) if any(map(ledger.look_up, call.tensors)) else None
    dim = call["dim"]
    dims = {d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}
    keep = out.dim() == x.dim()
    squeeze = lambda c: c if keep else c.reshape([s for d, s in enumerate(c.shape) if d not in dims])  # noqa: E731
    result: Info
    if isinstance(info, LabelledTensor):
        over = dims & find_channel_dims(ledger, info)
        if call.name == "mean" and over:
            ledger.relations.factors.append(Factor("mean", call.where, 1 / math.prod(x.shape[d] for d in over)))
        labels = squeeze(reduce_labels(ledger, info.labels, dims, Cause.REDUCTION, call.where))
        # a mean over tokens has the gain and the shift that each token has
        result = LabelledTensor(labels, tail=info.tail if call.name == "mean" and not over else None)
    else:
        result = summarise_weight(info, dims, call.where).map(squeeze)
    results = [result] * len(call.outputs)
    if isinstance(info, LabelledTensor) and call.name in _INDICES and dims & find_channel_dims(ledger, info):
        results[-1] = LabelledTensor(
            LabelledTensor.fixed(call.outputs[-1].shape).labels, indices_of=narrow(info.labels).ravel()
        )
    return results if len(results) > 1 else results[0]


def find_channel_dims(ledger: Ledger, info: LabelledTensor) -> set[int]:
    """Dimensions along which an activation holds different channels."""
    return find_varying(widen(ledger.relations.roots(narrow(info.labels)), info.labels.shape))


def fill_gaps(ledger: Ledger, labels: Tensor, dims: set[int]) -> Tensor:
    """Constants beside a channel along these dimensions are that channel's: zeros that sequences were padded with.

    The labels as they are where several channels lie along them.
    """
    array = narrow(labels)
    highest = array.max(axis=tuple(dims), keepdims=True)
    filled = np.where(array == UNIFORM, highest, array)
    alike = (ledger.relations.roots(filled) == ledger.relations.roots(highest)).all()
    return widen(highest, labels.shape) if alike else labels


def summarise_weight(weight: Weight, dims: set[int], where: str) -> Weight:
    """A weight summed, averaged or normed over some dimensions keeps its coordinates on the others."""
    first = lambda c: c[tuple(slice(0, 1) if d in dims else slice(None) for d in range(c.dim()))]  # noqa: E731
    axes = [Axis(axis.tensor, axis.dim, first(axis.coordinates)) for axis in weight.axes if not axis.varies & dims]
    return Weight(axes, nonlinear=weight.nonlinear or where)


def couple_by_softmax(ledger: Ledger, call: Call) -> Info | None:
    x = call.args[0]
    info = ledger.look_up(x)
    if isinstance(info, LabelledTensor):
        reduce_labels(ledger, info.labels, {call["dim"] % x.dim()}, Cause.SOFTMAX, call.where)
        return LabelledTensor(info.labels)
    return Weight(info.axes, nonlinear=call.where) if info else None


def scan(ledger: Ledger, call: Call) -> Outcome:
    """Scans and sorts: fine along any dimension but the channels'."""
    x = call.args[0]
    info, out = ledger.look_up(x), call.outputs[0]
    dim = (call["dim"] if call["dim"] is not None else -1) % x.dim()
    if not isinstance(info, LabelledTensor) or dim in find_channel_dims(ledger, info):
        return refuse(ledger, call, "ordered operation along channels")
    result = LabelledTensor(info.labels.narrow(dim, 0, 1).expand(out.shape))
    return [result] * len(call.outputs) if len(call.outputs) > 1 else result


def pool(ledger: Ledger, call: Call) -> Outcome:
    """Pooling and resampling over the last 1 to 3 dimensions."""
    x, out = call.args[0], call.outputs[0]
    info = ledger.look_up(x)
    rank = int(next(c for c in call.name if c.isdigit()))
    dims = set(range(x.dim() - rank, x.dim()))
    if info is None:
        return refuse(ledger, call)
    info = ledger.activate(info, set(range(x.dim())) - dims)
    crossed = {d for d in find_channel_dims(ledger, info) & dims if out.shape[d] != 1}
    if crossed and not find_varying(info.labels) - dims:
        return refuse(ledger, call, "pooling across channels")
    maps = unite_over(ledger, info.labels, crossed)
    labels = reduce_labels(ledger, maps, dims, Cause.REDUCTION, call.where).expand(out.shape)
    return (
        [LabelledTensor(labels), *[None] * (len(call.outputs) - 1)] if len(call.outputs) > 1 else LabelledTensor(labels)
    )
