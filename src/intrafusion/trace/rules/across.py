"""Operations along other axes than the channels': rows that are summed, written, sampled, compared or transformed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from intrafusion.trace.call import Call
from intrafusion.trace.info import Axis, Info, LabelledTensor, Outcome, Weight
from intrafusion.trace.labels import compact, find_varying, lay_along, narrow, widen
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.relations import Cause
from intrafusion.trace.rules.elementwise import combine, find_extent
from intrafusion.trace.rules.reduction import fill_gaps, find_channel_dims, reduce_labels, summarise_weight
from intrafusion.trace.rules.refusal import refuse

WRITES = ("index_add", "index_copy", "index_fill", "index_reduce", "scatter", "scatter_add", "scatter_reduce")
TRANSFORMS = ("_fft_r2c", "_fft_c2r", "_fft_c2c")
SAMPLERS = ("grid_sampler_2d", "grid_sampler_3d")
BAGS = ("_embedding_bag", "_embedding_bag_forward_only")


def write_rows(ledger: Ledger, call: Call) -> Outcome:
    """Rows written or added to rows that an index names: channels lie across the rows and stay."""
    x, index = call["self"], call["index"]
    dim, scatters = call["dim"] % x.dim(), call.name.startswith("scatter")
    source = call["src" if scatters else "source"]
    parts = [x, *([source] if isinstance(source, Tensor) else [])]
    sizes = {t.shape[:dim] + t.shape[dim + 1 :] for t in [*parts, *([index] if scatters else [])]}
    if len(sizes) > 1 or ledger.look_up(call["value"] if isinstance(call["value"], Tensor) else None) is not None:
        return refuse(ledger, call, "rows of different lengths")
    row = lambda c: c.narrow(dim, 0, 1).expand(call.out.shape)  # noqa: E731
    return _write(ledger, call, [(part, {dim}, row) for part in parts], [index], aligned=scatters)


def put_rows(ledger: Ledger, call: Call) -> Outcome:
    """x[index] = values, along dimensions that follow one another."""
    x, indices = call["self"], call["indices"]
    picked = [d for d, index in enumerate(indices) if index is not None]
    first, count = picked[0], len(picked)
    tensors = [indices[d] for d in picked]
    if picked[-1] - first + 1 != count or any(i.dtype in (torch.bool, torch.uint8) and i.dim() != 1 for i in tensors):
        return refuse(ledger, call, "written at places that no index of rows names")
    shapes = [(int(i.sum()),) if i.dtype in (torch.bool, torch.uint8) else tuple(i.shape) for i in tensors]
    places = torch.broadcast_shapes(*shapes)
    region = (*x.shape[:first], *places, *x.shape[first + count :])
    whole = lambda c: c[(slice(None),) * first + (slice(0, 1),) * count].expand(call.out.shape)  # noqa: E731

    def row(c: Tensor) -> Tensor:
        one = c.broadcast_to(region)[(slice(None),) * first + (0,) * len(places)]
        return one[(slice(None),) * first + (None,) * count].expand(call.out.shape)

    offset = len(region) - call["values"].dim()  # values are broadcast from the right
    rows = {d - offset for d in range(first, first + len(places))}
    return _write(ledger, call, [(x, set(picked), whole), (call["values"], rows, row)], tensors, aligned=False)


_Part = tuple[Tensor, set[int], Callable[[Tensor], Tensor]]  # a tensor, the dimensions of its rows, one row laid out


def _write(ledger: Ledger, call: Call, parts: list[_Part], indices: list[Tensor], *, aligned: bool) -> Outcome:
    """The channels of what is written and of what it is written into meet; along the rows there must be none."""
    infos = [ledger.look_up(part) for part, *_ in parts]
    known = [(i, *part) for i, part in zip(infos, parts, strict=True) if isinstance(i, LabelledTensor)]
    if not known or any(isinstance(info, Weight) for info in infos):
        return refuse(ledger, call, "rows of a parameter are written")
    if any(find_channel_dims(ledger, info) & rows for info, _, rows, _ in known):
        return refuse(ledger, call, "written by index along channels")
    laid = [(LabelledTensor(compact(row(ledger.settle(info.labels)))), row(part)) for info, part, _, row in known]
    channels = set().union(*(find_varying(info.labels) for info, _ in laid))
    if not all(_names_rows(ledger, index, channels if aligned else set()) for index in indices):
        return refuse(ledger, call, "data-dependent index")
    constants = [part for info, (part, *_) in zip(infos, parts, strict=True) if info is None]
    if any(_find_extent_of_values(c, call.out.dim()) & channels for c in constants):
        return refuse(ledger, call, "meets a constant that varies along channels")
    return combine(ledger, call, laid, call.out.shape)


def _names_rows(ledger: Ledger, index: Tensor, channels: set[int]) -> bool:
    """Whether an index is the same for all channels."""
    info = ledger.look_up(index)
    if info is None:
        return not _find_extent_of_values(index, index.dim()) & channels
    own = isinstance(info, LabelledTensor) and find_channel_dims(ledger, info)
    return own == set() and not find_extent(index, index.dim()) & channels


def _find_extent_of_values(values: Tensor, rank: int) -> set[int]:
    """Dimensions, of a result of that rank, along which a constant does vary."""
    return find_extent(compact(values.detach().cpu()), rank)


def reduce_segments(ledger: Ledger, call: Call) -> Outcome:
    """Runs of rows, each summed, averaged or the like."""
    others = [call[name] for name in ("lengths", "indices", "offsets")]
    return _pass_across(ledger, call, call["data"], {call["axis"]}, [o for o in others if isinstance(o, Tensor)])


def transform(ledger: Ledger, call: Call) -> Outcome:
    """Fourier transforms along space or time; of a parameter too, as of the kernel of a long convolution."""
    x = call["self"]
    info, dims = ledger.look_up(x), {d % x.dim() for d in call["dim"]}
    if not isinstance(info, Weight):
        return _pass_across(ledger, call, x, dims, [])
    filled = info.map(lambda c: _fill_padding(c, dims))
    ledger.pin(filled, f"transformed along it: {call.where}", dims)
    along = [axis for axis in filled.axes if axis.varies & dims]
    if any(len(axis.varies) > 1 for axis in along):
        return refuse(ledger, call, "transformed along channels")
    passed = summarise_weight(filled, dims, call.where).map(lambda c: c.expand(call.out.shape))
    spectra = [_lay_spectrum(ledger, axis, call.out.shape) for axis in along]
    return Weight([*passed.axes, *spectra], nonlinear=call.where)


def _lay_spectrum(ledger: Ledger, axis: Axis, shape: torch.Size) -> Axis:
    """Every frequency depends on all entries, which are pinned; whatever lies along the frequencies is, with them."""
    (dim,) = axis.varies
    entries = np.arange(shape[dim]) % ledger.shapes[axis.tensor][axis.dim]
    return Axis(axis.tensor, axis.dim, lay_along(entries, dim, shape))


def _fill_padding(coordinates: Tensor, dims: set[int]) -> Tensor:
    """Beside the entries of a parameter zeros are its own; as they were, where several entries lie along these."""
    array = narrow(coordinates)
    highest = array.max(axis=tuple(dims), keepdims=True)
    alike = ((array == highest) | (array < 0)).all()
    return widen(highest, coordinates.shape) if alike else coordinates


def _pass_across(ledger: Ledger, call: Call, x: Tensor, dims: set[int], indices: list[Tensor]) -> Outcome:
    """Each channel is treated for itself, along dimensions that hold none."""
    info, dims = ledger.look_up(x), {d % x.dim() for d in dims}
    if not isinstance(info, LabelledTensor) or not all(_names_rows(ledger, i, set()) for i in indices):
        return refuse(ledger, call)
    filled = fill_gaps(ledger, info.labels, dims)  # a spectrum may have been padded
    if find_channel_dims(ledger, LabelledTensor(filled)) & dims:
        return refuse(ledger, call, "transformed along channels")
    first = filled[tuple(slice(0, 1) if d in dims else slice(None) for d in range(x.dim()))]
    return LabelledTensor(widen(narrow(first), call.out.shape))


def sample(ledger: Ledger, call: Call) -> Outcome:
    """Every channel is sampled at the same places; what computes the places may not move."""
    x, grid = call["input"], call["grid"]
    info = ledger.look_up(x)
    if not isinstance(info, LabelledTensor) or find_channel_dims(ledger, info) - {1}:
        return refuse(ledger, call, "sampled along channels" if info else "operation without a rule")
    ledger.forbid(ledger.look_up(grid), f"coordinates of a sampling: {call.where}")
    labels = ledger.settle(info.labels)
    one = labels[tuple(slice(None) if d == 1 else slice(0, 1) for d in range(x.dim()))]
    return LabelledTensor(compact(one.expand(call.out.shape)))


def embed_bags(ledger: Ledger, call: Call) -> Outcome:
    """Rows of a table, picked by token and summed, averaged or maximised: the width is channels, the rows stay."""
    table = ledger.look_up(call["weight"])
    others = [call[name] for name in ("indices", "offsets", "per_sample_weights")]
    if table is None or not all(_names_rows(ledger, o, set()) for o in others if isinstance(o, Tensor)):
        return refuse(ledger, call)
    if isinstance(table, Weight):
        ledger.pin(table, "rows are picked by data", {0})
        table = ledger.activate(table, {1})
    if 0 in find_channel_dims(ledger, table):
        return refuse(ledger, call, "rows are picked along channels")
    ledger.forbid(ledger.look_up(call["per_sample_weights"]), f"weights of rows: {call.where}")
    row = ledger.settle(table.labels)[:1]
    return [LabelledTensor(row.expand(o.shape)) if o.shape == call.outputs[0].shape else None for o in call.outputs]


def pack(ledger: Ledger, call: Call) -> Outcome:
    """Sequences of unequal length laid one into another: (time, batch, ...) -> (rows, ...) and how many rows a step."""
    x, lengths = call["input"], call["lengths"]
    info = ledger.look_up(x)
    if not isinstance(info, LabelledTensor) or not _names_rows(ledger, lengths, set()):
        return refuse(ledger, call)
    if find_channel_dims(ledger, info) & {0, 1}:
        return refuse(ledger, call, "packed along channels")
    row = ledger.settle(info.labels)[0, :1]
    return [LabelledTensor(compact(row.expand(call.outputs[0].shape))), None]


def compare_rows(ledger: Ledger, call: Call) -> Outcome:
    """Distances between rows: differences, element by element, of which each distance sees all."""
    x, y = call["x1"], call["x2"]
    infos: list[Info | None] = [ledger.look_up(x), ledger.look_up(y)]
    if not any(isinstance(info, LabelledTensor) for info in infos):
        return refuse(ledger, call)
    shape = torch.Size((*call.out.shape, x.shape[-1]))
    views = (lambda c: c.unsqueeze(-2), lambda c: c.unsqueeze(-3))
    laid = [(info and info.map(view), view(t)) for info, view, t in zip(infos, views, (x, y), strict=True)]
    laid = [(info and info.map(lambda c: c.broadcast_to(shape)), t) for info, t in laid]
    met = combine(ledger, call, laid, shape)
    assert isinstance(met, LabelledTensor)
    last = len(shape) - 1
    return LabelledTensor(reduce_labels(ledger, met.labels, {last}, Cause.REDUCTION, call.where).squeeze(last))
