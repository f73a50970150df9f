"""Views, copies, concatenation: the labels move exactly as the data does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intrafusion.trace.call import Call
from intrafusion.trace.info import Axis, Info, LabelledTensor, Outcome, Weight
from intrafusion.trace.labels import FIRST, FIXED, UNIFORM, compact, fill, find_varying, narrow, widen
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.rules.elementwise import combine, find_extent
from intrafusion.trace.rules.reduction import fill_gaps, find_channel_dims, unite_over
from intrafusion.trace.rules.refusal import refuse

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
_PARTS = ("slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind", "narrow")
_ABSENT = -1  # coordinate of an element that comes from no index of the parameter


def pass_on(ledger: Ledger, call: Call) -> Info | None:
    info = ledger.look_up(call.args[0])
    return info.map(lambda c: c) if isinstance(info, LabelledTensor) else info


def forget(ledger: Ledger, call: Call) -> None:
    """The result does not depend on any channel."""


def move(ledger: Ledger, call: Call) -> Outcome:
    source = call.args[0]
    info = ledger.look_up(source)
    indices = [ledger.look_up(t) for t in call.tensors[1:]]
    if isinstance(info, LabelledTensor) and any(isinstance(i, LabelledTensor) for i in indices):
        info = LabelledTensor(fill_gaps(ledger, info.labels, _find_picked_dims(call)))
    # An index that the data computed may pick another channel for every input; one from a buffer is the same always.
    for tensor in call.tensors[1:]:
        index = ledger.look_up(tensor)
        if isinstance(index, LabelledTensor):
            picked = _find_picked_channels(ledger, call, info)
            if find_varying(index.labels) or (picked and not _picks_branches(ledger, call, info, tensor)):
                return refuse(ledger, call, "data-dependent index")
            if isinstance(info, LabelledTensor):
                info = LabelledTensor(unite_over(ledger, info.labels, picked))
    if info is None:
        depends = any(map(ledger.look_up, call.tensors))
        return refuse(ledger, call, "index that depends on channels") if depends else None
    if isinstance(info, LabelledTensor):
        info = _tell_places_apart(ledger, call, info)
    if isinstance(call.out, (list, tuple)):
        return _split(info, call)
    run = _make_mover(call, UNIFORM if isinstance(info, LabelledTensor) else _ABSENT)
    moved = info.map(run)
    if isinstance(moved, Weight):
        moved.transposed = call.name in ("t", "transpose")
    return moved


def _tell_places_apart(ledger: Ledger, call: Call, info: LabelledTensor) -> LabelledTensor:
    """Before a part is taken along a dimension: a channel that stands there several times, told apart."""
    labels = ledger.tell_apart(info.labels, _find_picked_dims(call))
    return LabelledTensor(labels, tail=info.tail, writer=info.writer)


def _find_picked_dims(call: Call) -> set[int]:
    """Dimensions along which some indices are taken and others may not be."""
    dims = {call["dim"] or 0} if call.name in (*_PARTS, "index_select", "gather", "take_along_dim") else set()
    if call.name == "index":
        dims = {d for d, index in enumerate(call.args[1]) if index is not None}
    return {d % call.args[0].dim() for d in dims}


def _find_picked_channels(ledger: Ledger, call: Call, info: Info | None) -> set[int]:
    return _find_picked_dims(call) & find_channel_dims(ledger, info) if isinstance(info, LabelledTensor) else set()


def _picks_branches(ledger: Ledger, call: Call, info: Info | None, index: Tensor) -> bool:
    """Whether one index picks for all channels, along another dimension of theirs: an expert, a branch."""
    if not isinstance(info, LabelledTensor):
        return False
    rest = find_channel_dims(ledger, info) - _find_picked_dims(call)
    return bool(rest) and (call.name in ("index", "index_select") or not find_extent(index, index.dim()) & rest)


def _split(info: Info, call: Call) -> list[Info | None]:
    run = _make_mover(call, UNIFORM)
    if isinstance(info, LabelledTensor):
        return [LabelledTensor(compact(part), tail=info.tail, writer=info.writer) for part in run(info.labels)]
    parts = [(axis, run(axis.coordinates)) for axis in info.axes]
    return [
        Weight([Axis(axis.tensor, axis.dim, compact(pieces[k])) for axis, pieces in parts], nonlinear=info.nonlinear)
        for k in range(len(call.outputs))
    ]


def _make_mover(call: Call, padding: int) -> Callable[[Tensor], Any]:
    """The call's own operation, as a function of a label tensor."""
    source, rest = call.args[0], [_to_cpu(a) for a in call.args[1:]]
    if call.name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"):
        return lambda x: x.reshape(call.out.shape)
    if call.name == "constant_pad_nd":
        rest[1:] = [padding]  # the value that is padded with is a constant for labels, and absent for coordinates
    if call.name == "as_strided":
        return lambda x: _stride_as(x, source, rest)

    def run(x: Tensor) -> Any:
        if _leaves_labels(call, find_varying(x), x.dim()):
            return (
                x[tuple(slice(0, 1) for _ in x.shape)].expand(call.out.shape)
                if not find_varying(x)
                else _stretch(x, call.out)
            )
        try:
            return call.func(x, *rest, **call.kwargs)
        except (RuntimeError, NotImplementedError):  # an operation without an integer kernel
            result = call.func(x.double(), *rest, **call.kwargs)
            return result.long() if isinstance(result, Tensor) else [r.long() for r in result]

    return run


def _to_cpu(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_to_cpu(a) for a in argument)
    return argument.cpu() if isinstance(argument, Tensor) else argument


def _leaves_labels(call: Call, dims: set[int], rank: int) -> bool:
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


def _stretch(x: Tensor, out: Tensor) -> Tensor:
    """Labels on a shape that differs only where they do not vary."""
    small = x
    for d in range(x.dim()):
        if d not in find_varying(x):
            small = small.narrow(d, 0, 1)
    return small.expand(out.shape)


def _stride_as(x: Tensor, source: Tensor, arguments: list[Any]) -> Tensor:
    size, stride, offset = arguments[0], arguments[1], arguments[2] if len(arguments) > 2 else None
    same_layout = torch.empty_strided(source.shape, source.stride(), dtype=torch.long).copy_(x)
    start = 0 if offset is None else offset - source.storage_offset()
    return same_layout.as_strided(size, stride, start).clone()


def view_as_real(ledger: Ledger, call: Call) -> Info | None:
    info = ledger.look_up(call.args[0])
    return info.map(lambda c: c[..., None].expand(call.out.shape)) if info else None


def view_as_complex(ledger: Ledger, call: Call) -> Info | None:
    """Real and imaginary part become one element: they move together."""
    x = call.args[0]
    info = ledger.look_up(x)
    if info is None:
        return None
    parts = [(info.map(lambda c, k=k: c[..., k]), x[..., k]) for k in (0, 1)]
    return combine(ledger, call, parts, call.out.shape)


def overwrite(ledger: Ledger, call: Call) -> Outcome:
    """x.copy_(y): what y is."""
    info = ledger.look_up(call.args[1])
    return None if info is None else info.map(lambda c: c.broadcast_to(call.out.shape))


def write_part(ledger: Ledger, call: Call, view: Tensor, info: Info | None) -> Info | None:
    """What an operation in place left in part of a tensor is in the whole too, and in every other view of it."""
    base, before = view._base, ledger.look_up(view)
    assert base is not None
    whole = ledger.look_up(base)
    if isinstance(whole, Weight) and isinstance(info, LabelledTensor) and not ledger.is_of_network(base):
        whole = ledger.activate(whole, find_varying(info.labels) if base.dim() == view.dim() else set())
        ledger.learn(base, whole)
    if isinstance(whole, Weight) or _counts_otherwise(view, base):
        what = "a parameter or buffer" if isinstance(whole, Weight) else "numbers that are seen as another kind"
        for part in (whole, info):
            ledger.forbid(part, f"in-place write into part of {what}: {call.where}")
        return info
    if whole is None and info is None:
        return None
    written = _label_written(ledger, view, before, info)
    if isinstance(whole, LabelledTensor) and _are_same_channels(ledger, before, written):
        ledger.learn(base, LabelledTensor(whole.labels))  # without what it was computed by
    else:
        ledger.write_part(view, written)
    return LabelledTensor(written)


def _counts_otherwise(view: Tensor, base: Tensor) -> bool:
    """Whether the elements of a view are not those of its base, as where complex numbers are viewed as pairs."""
    return (view.itemsize, view.is_complex()) != (base.itemsize, base.is_complex())


def _label_written(ledger: Ledger, view: Tensor, before: Info | None, info: Info | None) -> Tensor:
    """The labels of what was written: of channels, of a parameter along them, or of a constant."""
    if isinstance(info, LabelledTensor):
        return info.labels
    channels = find_channel_dims(ledger, before) if isinstance(before, LabelledTensor) else set()
    if info is None:
        varies = find_varying(compact(view.detach().cpu().double().nan_to_num())) & channels
        return fill(FIXED if varies else UNIFORM, view.shape)
    return ledger.activate(info, channels or set().union(*(axis.varies for axis in info.axes))).labels


def _are_same_channels(ledger: Ledger, before: Info | None, after: Tensor) -> bool:
    if not isinstance(before, LabelledTensor):
        return False
    old, new = np.broadcast_arrays(narrow(before.labels), narrow(after))
    return np.array_equal(ledger.relations.roots(old), ledger.relations.roots(new))


def concatenate(ledger: Ledger, call: Call) -> Info:
    dim = (call["dim"] or 0) % call.out.dim()
    whole = call.name == "stack" or not call.out.numel()
    tensors = [
        x for x in call["tensors"] if whole or (x.numel() and x.dim() == call.out.dim())
    ]  # no experts without rows
    infos = [ledger.look_up(x) for x in tensors]
    join = torch.stack if call.name == "stack" else torch.cat
    if not any(isinstance(i, LabelledTensor) for i in infos):
        return _join_weights(tensors, infos, lambda parts: join(parts, dim))
    channels = set().union(*(find_varying(i.labels) for i in infos if isinstance(i, LabelledTensor))) or {dim}
    labels = [_label_part(ledger, x, i, channels) for x, i in zip(tensors, infos, strict=True)]
    if call.name == "cat" and all(dim not in find_varying(x) for x in labels):
        labels = _unite_parts(ledger, labels, dim)
    kept = set().union(*map(find_varying, labels)) | ({dim} if call.name == "cat" else set())
    if call.name == "stack" or any(dim in find_varying(x) for x in labels):
        labels = _tell_parts_apart(ledger, labels)
    index = lambda x: tuple(slice(None) if d in kept else slice(0, 1) for d in range(x.dim()))  # noqa: E731
    tails = {i.tail if isinstance(i, LabelledTensor) else None for i in infos}
    joined = compact(join([x[index(x)] for x in labels], dim)).expand(call.out.shape)
    return LabelledTensor(joined, tail=tails.pop() if len(tails) == 1 else None)


def _tell_parts_apart(ledger: Ledger, labels: list[Tensor]) -> list[Tensor]:
    """Parts of one concatenation that hold the same channels, told apart."""
    held = [np.unique(ledger.relations.roots(narrow(x))) for x in labels]
    shared, count = np.unique(np.concatenate(held), return_counts=True)
    if not (shared[count > 1] >= FIRST).any():
        return labels
    return [widen(ledger.relations.copy(narrow(x), k), x.shape) for k, x in enumerate(labels)]


def _join_weights(tensors: list[Tensor], infos: list[Info | None], join: Callable[[list[Tensor]], Tensor]) -> Weight:
    """Weights fused at run time: every parameter keeps its coordinates in its own part."""
    weights = [i if isinstance(i, Weight) else Weight([]) for i in infos]
    axes = []
    for tensor, d in dict.fromkeys((axis.tensor, axis.dim) for w in weights for axis in w.axes):
        parts = [
            next(
                (axis.coordinates for axis in w.axes if (axis.tensor, axis.dim) == (tensor, d)), fill(_ABSENT, x.shape)
            )
            for w, x in zip(weights, tensors, strict=True)
        ]
        axes.append(Axis(tensor, d, compact(join(parts))))
    return Weight(axes, nonlinear=next((w.nonlinear for w in weights if w.nonlinear), None))


def _label_part(ledger: Ledger, tensor: Tensor, info: Info | None, channels: set[int]) -> Tensor:
    """The labels of one part of a concatenation, whatever it is."""
    if info is None:
        constant = tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())
        return fill(UNIFORM if constant else FIXED, tensor.shape)
    if isinstance(info, Weight):
        return ledger.activate(info, channels).labels
    labels = ledger.settle(info.labels)
    return labels if narrow(labels).any() else fill(FIXED, tensor.shape)


def _unite_parts(ledger: Ledger, labels: list[Tensor], dim: int) -> list[Tensor]:
    """A concatenation of tokens, not of channels: the parts carry the same channels."""
    merged = narrow(labels[0].narrow(dim, 0, 1))
    for other in labels[1:]:
        piece = narrow(other.narrow(dim, 0, 1))
        if (piece > FIXED).any():
            merged = ledger.relations.merge(*np.broadcast_arrays(merged, piece))
    return [widen(np.where(narrow(x) >= FIRST, merged, narrow(x)), x.shape) for x in labels]
