"""Reductions, softmax, ordered scans and pooling: several channels seen together become a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from intrafusion.trace.info import Activation, Info, Plane, Result, Weight
from intrafusion.trace.labels import FIRST, narrowed, spread, varying
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.refusal import refuse

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer

REDUCTIONS = (
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
    "all",
    "max",
    "min",
    "argmax",
    "argmin",
    "median",
)
INDICES = ("argmax", "argmin", "max", "min", "median")
SOFTMAXES = ("_softmax", "_log_softmax", "_safe_softmax")
ORDERED = ("cumsum", "cumprod", "sort", "topk", "argsort", "logcumsumexp", "cummax", "cummin")
POOLS = ("avg_pool", "max_pool", "adaptive_", "_adaptive_", "upsample_", "_upsample_", "fractional_max")


def blocks(t: Tracer, labels: Tensor, dims: set[int], cause: Cause, where: str) -> Tensor:
    """Labels after a symmetric reduction over dims (size 1 there): several channels together give a block label."""
    array = narrowed(t.settled(labels))
    over = [d for d in sorted(dims) if array.shape[d] > 1]
    shape = tuple(1 if d in dims else s for d, s in enumerate(labels.shape))
    if not over:
        return spread(array, shape)
    rest = [d for d in range(array.ndim) if d not in over]
    moved = array.transpose(rest + over)
    rows = np.sort(moved.reshape(int(np.prod([array.shape[d] for d in rest])), -1), axis=-1)
    distinct, which = np.unique(rows, axis=0, return_inverse=True)
    results = np.array([block_of(t, np.unique(row), cause, where) for row in distinct])
    reduced = results[which.reshape(-1)].reshape([1 if d in over else s for d, s in enumerate(array.shape)])
    return spread(reduced, shape)


def block_of(t: Tracer, labels: np.ndarray, cause: Cause, where: str) -> int:
    channels = labels[labels >= FIRST]
    roots = np.unique(t.relations.roots(labels))
    if len(roots) == 1 or len(channels) == 0:
        return int(labels.max())
    named = roots[(roots >= FIRST) & ~t.relations.is_block[roots]]
    if len(named) == 1:  # beside it only blocks, such as the head it is in
        t.relations.unite(np.broadcast_to(named, len(channels)), channels)
        return int(named[0])
    if len(channels) == 1:
        return int(channels[0])
    return t.relations.block(channels, cause, where)


def channel_vector(t: Tracer, labels: Tensor, dim: int) -> np.ndarray:
    """One label per index of dim: labels that share an index are united, as a weight's column sees them all."""
    size = labels.shape[dim]
    array = narrowed(labels)
    if array.shape[dim] == array.size:
        return np.broadcast_to(array.reshape(-1), (size,))
    rows = np.unique(np.moveaxis(array, dim, -1).reshape(-1, array.shape[dim]), axis=0)
    united = rows[0]
    for row in rows[1:]:
        united = t.relations.merge(united, row)
    return np.broadcast_to(united, (size,))


def reduction(t: Tracer, call: Call) -> Result:
    x, out = call["self"], call.outputs[0]
    info = t.info(x)
    if info is None:
        return refuse(t, call) if any(map(t.info, call.tensors)) else None
    dim = call["dim"]
    dims = {d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}
    keep = out.dim() == x.dim()
    squeeze = lambda c: c if keep else c.reshape([s for d, s in enumerate(c.shape) if d not in dims])  # noqa: E731
    result: Info
    if isinstance(info, Activation):
        result = Activation(squeeze(blocks(t, info.labels, dims, Cause.REDUCTION, call.where)))
    else:
        result = reduced_weight(info, dims, call.where).map(squeeze)
    results = [result] * len(call.outputs)
    if isinstance(info, Activation) and call.name in INDICES and dims & channel_dims(t, info):
        results[-1] = Activation(t.fixed(call.outputs[-1].shape).labels, indices_of=narrowed(info.labels).ravel())
    return results if len(results) > 1 else results[0]


def channel_dims(t: Tracer, info: Activation) -> set[int]:
    """Dimensions along which an activation holds different channels."""
    return varying(spread(t.relations.roots(narrowed(info.labels)), info.labels.shape))


def reduced_weight(weight: Weight, dims: set[int], where: str) -> Weight:
    """A weight summed, averaged or normed over some dimensions keeps its coordinates on the others."""
    first = lambda c: c[tuple(slice(0, 1) if d in dims else slice(None) for d in range(c.dim()))]  # noqa: E731
    planes = [Plane(p.tensor, p.dim, first(p.coordinates)) for p in weight.planes if not p.varies & dims]
    return Weight(planes, nonlinear=weight.nonlinear or where)


def softmax(t: Tracer, call: Call) -> Info | None:
    x = call.args[0]
    info = t.info(x)
    if isinstance(info, Activation):
        blocks(t, info.labels, {call["dim"] % x.dim()}, Cause.SOFTMAX, call.where)
        return Activation(info.labels)
    return Weight(info.planes, nonlinear=call.where) if info else None


def ordered(t: Tracer, call: Call) -> Result:
    """Scans and sorts: fine along any dimension but the channels'."""
    x = call.args[0]
    info, out = t.info(x), call.outputs[0]
    dim = (call["dim"] if call["dim"] is not None else -1) % x.dim()
    if not isinstance(info, Activation) or dim in channel_dims(t, info):
        return refuse(t, call, "ordered operation along channels")
    result = Activation(info.labels.narrow(dim, 0, 1).expand(out.shape))
    return [result] * len(call.outputs) if len(call.outputs) > 1 else result


def pool(t: Tracer, call: Call) -> Result:
    """Pooling and resampling over the last 1 to 3 dimensions."""
    x, out = call.args[0], call.outputs[0]
    info = t.info(x)
    rank = int(next(c for c in call.name if c.isdigit()))
    dims = set(range(x.dim() - rank, x.dim()))
    if info is None:
        return refuse(t, call)
    info = t.activate(info, set(range(x.dim())) - dims)
    crossed = varying(info.labels) & dims
    if any(out.shape[d] != 1 for d in crossed):
        return refuse(t, call, "pooling across channels")
    labels = blocks(t, info.labels, dims, Cause.REDUCTION, call.where).expand(out.shape)
    return [Activation(labels), *[None] * (len(call.outputs) - 1)] if len(call.outputs) > 1 else Activation(labels)
