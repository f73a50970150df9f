"""Views, copies, concatenation: the labels move exactly as the data does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from intrafusion.trace.info import Activation, Info, Plane, Result, Weight
from intrafusion.trace.labels import FIRST, FIXED, UNIFORM, compact, filled, narrowed, spread, varying
from intrafusion.trace.rules.elementwise import combine
from intrafusion.trace.rules.reduction import channel_dims
from intrafusion.trace.rules.refusal import refuse

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer

IDENTITIES = (
    "clone",
    "alias",
    "detach",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "lift_fresh_copy",
    "native_dropout",
    "_reshape_alias_copy",
    "_conj",
    "positive",
)
MOVES = (
    "t",
    "transpose",
    "permute",
    "view",
    "_unsafe_view",
    "reshape",
    "expand",
    "squeeze",
    "unsqueeze",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unbind",
    "flip",
    "roll",
    "repeat",
    "constant_pad_nd",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "unfold",
    "index_select",
    "index",
    "gather",
    "diagonal",
    "im2col",
    "movedim",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "rot90",
    "take_along_dim",
    "as_strided",
    "_reshape_alias",
    "expand_copy",
    "permute_copy",
    "view_copy",
)
FACTORIES = (
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "new_empty_strided",
    "bernoulli",
)
PARTS = ("slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind", "narrow")
ABSENT = -1  # coordinate of an element that comes from no index of the parameter


def identity(t: Tracer, call: Call) -> Info | None:
    info = t.info(call.args[0])
    return Activation(info.labels) if isinstance(info, Activation) else info


def constant(t: Tracer, call: Call) -> None:
    """The result does not depend on any channel."""


def move(t: Tracer, call: Call) -> Result:
    source = call.args[0]
    info = t.info(source)
    for tensor in call.tensors[1:]:
        index = t.info(tensor)
        if isinstance(index, Activation) and (varying(index.labels) or picks_channels(t, call, info)):
            return refuse(t, call, "data-dependent index")
    if info is None:
        return refuse(t, call, "index that depends on channels") if any(map(t.info, call.tensors)) else None
    if isinstance(info, Activation):
        info = each_apart(t, call, info)
    if isinstance(call.out, (list, tuple)):
        return split(info, call)
    run = mover(call, UNIFORM if isinstance(info, Activation) else ABSENT)
    moved = info.map(run)
    if isinstance(moved, Weight):
        moved.transposed = call.name in ("t", "transpose")
    return moved


def each_apart(t: Tracer, call: Call, info: Activation) -> Activation:
    """Before a part is taken along a dimension: a channel that stands there several times, told apart."""
    return Activation(t.told_apart(info.labels, picked_dims(call)))


def picked_dims(call: Call) -> set[int]:
    """Dimensions along which some indices are taken and others may not be."""
    dims = {call["dim"] or 0} if call.name in (*PARTS, "index_select", "gather", "take_along_dim") else set()
    if call.name == "index":
        dims = {d for d, index in enumerate(call.args[1]) if index is not None}
    return {d % call.args[0].dim() for d in dims}


def picks_channels(t: Tracer, call: Call, info: Info | None) -> bool:
    return isinstance(info, Activation) and bool(picked_dims(call) & channel_dims(t, info))


def split(info: Info, call: Call) -> list[Info | None]:
    run = mover(call, UNIFORM)
    if isinstance(info, Activation):
        return [Activation(compact(part)) for part in run(info.labels)]
    parts = [(p, run(p.coordinates)) for p in info.planes]
    return [
        Weight([Plane(p.tensor, p.dim, compact(pieces[k])) for p, pieces in parts], nonlinear=info.nonlinear)
        for k in range(len(call.outputs))
    ]


def mover(call: Call, padding: int) -> Callable[[Tensor], Any]:
    """The call's own operation, as a function of a label tensor."""
    source, rest = call.args[0], [on_cpu(a) for a in call.args[1:]]
    if call.name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"):
        return lambda x: x.reshape(call.out.shape)
    if call.name == "constant_pad_nd":
        rest[1:] = [padding]
    if call.name == "as_strided":
        return lambda x: as_strided(x, source, rest)

    def run(x: Tensor) -> Any:
        if leaves_in_place(call, varying(x), x.dim()):
            return (
                x[tuple(slice(0, 1) for _ in x.shape)].expand(call.out.shape)
                if not varying(x)
                else stretched(x, call.out)
            )
        try:
            return call.func(x, *rest, **call.kwargs)
        except (RuntimeError, NotImplementedError):  # an operation without an integer kernel
            result = call.func(x.double(), *rest, **call.kwargs)
            return result.long() if isinstance(result, Tensor) else [r.long() for r in result]

    return run


def on_cpu(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(on_cpu(a) for a in argument)
    return argument.cpu() if isinstance(argument, Tensor) else argument


def leaves_in_place(call: Call, dims: set[int], rank: int) -> bool:
    """Padding, rolling or flipping along dimensions on which the labels do not vary changes no label."""
    if call.name.endswith(("_pad1d", "_pad2d", "_pad3d")) or call.name == "constant_pad_nd":
        touched = {rank - 1 - k for k in range(len(call["padding" if "_pad" in call.name[-6:] else "pad"]) // 2)}
    elif call.name in ("roll", "flip") and call["dims"]:
        touched = {d % rank for d in call["dims"]}
    elif call.name == "index_select":
        touched = {call["dim"] % rank}
    else:
        return False
    return not touched & dims


def stretched(x: Tensor, out: Tensor) -> Tensor:
    """Labels on a shape that differs only where they do not vary."""
    small = x
    for d in range(x.dim()):
        if d not in varying(x):
            small = small.narrow(d, 0, 1)
    return small.expand(out.shape)


def as_strided(x: Tensor, source: Tensor, arguments: list[Any]) -> Tensor:
    size, stride, offset = arguments[0], arguments[1], arguments[2] if len(arguments) > 2 else None
    same_layout = torch.empty_strided(source.shape, source.stride(), dtype=torch.long).copy_(x)
    start = 0 if offset is None else offset - source.storage_offset()
    return same_layout.as_strided(size, stride, start).clone()


def view_as_real(t: Tracer, call: Call) -> Info | None:
    info = t.info(call.args[0])
    return info.map(lambda c: c[..., None].expand(call.out.shape)) if info else None


def view_as_complex(t: Tracer, call: Call) -> Info | None:
    """Real and imaginary part become one element: they move together."""
    x = call.args[0]
    info = t.info(x)
    if info is None:
        return None
    parts = [(info.map(lambda c, k=k: c[..., k]), x[..., k]) for k in (0, 1)]
    return combine(t, call, parts, call.out.shape)


def copy(t: Tracer, call: Call) -> Result:
    """x.copy_(y): what y is; a write into part of another tensor is refused."""
    target, source = call.args[0], call.args[1]
    if target._is_view():
        refuse(t, call, "in-place write into part of a tensor")
        return t.info(target)
    return combine(t, call, [source], target.shape)


def concatenate(t: Tracer, call: Call) -> Info:
    dim = (call["dim"] or 0) % call.out.dim()
    tensors = [x for x in call["tensors"] if call.name == "stack" or x.dim() == call.out.dim()]
    infos = [t.info(x) for x in tensors]
    join = torch.stack if call.name == "stack" else torch.cat
    if not any(isinstance(i, Activation) for i in infos):
        return joined_weights(tensors, infos, lambda parts: join(parts, dim))
    channels = set().union(*(varying(i.labels) for i in infos if isinstance(i, Activation))) or {dim}
    labels = [as_labels(t, x, i, channels) for x, i in zip(tensors, infos, strict=True)]
    if call.name == "cat" and all(dim not in varying(x) for x in labels):
        labels = same_channels(t, labels, dim)
    kept = set().union(*map(varying, labels)) | ({dim} if call.name == "cat" else set())
    if call.name == "stack" or any(dim in varying(x) for x in labels):
        labels = apart(t, labels)
    index = lambda x: tuple(slice(None) if d in kept else slice(0, 1) for d in range(x.dim()))  # noqa: E731
    return Activation(compact(join([x[index(x)] for x in labels], dim)).expand(call.out.shape))


def apart(t: Tracer, labels: list[Tensor]) -> list[Tensor]:
    """Parts of one concatenation that hold the same channels, told apart."""
    held = [np.unique(t.relations.roots(narrowed(x))) for x in labels]
    shared, count = np.unique(np.concatenate(held), return_counts=True)
    if not (shared[count > 1] >= FIRST).any():
        return labels
    return [spread(t.relations.copy(narrowed(x), k), x.shape) for k, x in enumerate(labels)]


def joined_weights(tensors: list[Tensor], infos: list[Info | None], join: Callable[[list[Tensor]], Tensor]) -> Weight:
    """Weights fused at run time: every parameter keeps its coordinates in its own part."""
    weights = [i if isinstance(i, Weight) else Weight([]) for i in infos]
    planes = []
    for tensor, d in dict.fromkeys((p.tensor, p.dim) for w in weights for p in w.planes):
        parts = [
            next((p.coordinates for p in w.planes if (p.tensor, p.dim) == (tensor, d)), filled(ABSENT, x.shape))
            for w, x in zip(weights, tensors, strict=True)
        ]
        planes.append(Plane(tensor, d, compact(join(parts))))
    return Weight(planes, nonlinear=next((w.nonlinear for w in weights if w.nonlinear), None))


def as_labels(t: Tracer, tensor: Tensor, info: Info | None, channels: set[int]) -> Tensor:
    """The labels of one part of a concatenation, whatever it is."""
    if info is None:
        constant = tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())
        return filled(UNIFORM if constant else FIXED, tensor.shape)
    if isinstance(info, Weight):
        return t.activate(info, channels).labels
    labels = t.settled(info.labels)
    return labels if narrowed(labels).any() else filled(FIXED, tensor.shape)


def same_channels(t: Tracer, labels: list[Tensor], dim: int) -> list[Tensor]:
    """A concatenation of tokens, not of channels: the parts carry the same channels."""
    merged = narrowed(labels[0].narrow(dim, 0, 1))
    for other in labels[1:]:
        piece = narrowed(other.narrow(dim, 0, 1))
        if (piece > FIXED).any():
            merged = t.relations.merge(*np.broadcast_arrays(merged, piece))
    return [spread(np.where(narrowed(x) >= FIRST, merged, narrowed(x)), x.shape) for x in labels]
