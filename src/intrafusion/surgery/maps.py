"""Reduction maps -> new weights.

Every map runs along the positions of its group. The new channels take the places of the group's first m channels and
the other places are deleted, so whatever order the network's views and slices rely on survives.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from intrafusion.errors import PlanError
from intrafusion.graph import READS, ChannelGraph, ChannelGroup, FoldableNorm, Member, Role, Slice, WeightNorm
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.norms import fold_norms, unfold_norms
from intrafusion.surgery.streams import find_turned, fold_streams_

T = TypeVar("T")


def reduce_weights(
    weights: Mapping[str, Tensor], graph: ChannelGraph, maps: Mapping[str, ReductionMap]
) -> dict[str, Tensor]:
    """The tensors that change when groups are reduced, in their own dtype.

    Foldable batch norms are folded for the computation and get statistics back afterwards. Norms of streams that are
    rotated stay folded into their readers.

    Args:
        weights: the network's tensors by name; not modified.
        maps: a map for each group to reduce, by group name.
    Raises:
        PlanError: twins of a grouped convolution would end up with different sizes.
    """
    groups = [g for g in graph.groups if g.name in maps]
    names = {m.tensor for g in groups for m in g.members}
    mixed = _find_mixed(groups, maps) | {t for w in graph.weight_norms for t in (w.direction, w.length)}
    norms = [n for n in graph.norms if names & set(norm_tensors(n)) and not _is_picked(n, groups, mixed, weights)]
    names |= {t for n in norms for t in norm_tensors(n)}
    lengths = [w for w in graph.weight_norms if w.direction in names]
    names |= {w.length for w in lengths}
    original = {name: weights[name] for name in names}
    turned = find_turned(groups, maps)
    centred = find_averaged_biases([g for g in groups if g not in turned], norms)
    folded = _fold_all(original, norms, turned, mixed)
    reduced = {name: _remap(name, folded[name], groups, maps, centred) for name in names}
    for pair in lengths:
        reduced |= _set_length(pair, folded, reduced, groups, maps)
    means = functools.cache(lambda name: mean_weights(maps[name].merge))
    averages = {n.mean: _find_averages(folded[n.mean], n.mean, groups, maps, means) for n in norms}
    final = unfold_norms(reduced, original, norms, averages, folded)
    return {name: tensor.to(original[name].dtype) for name, tensor in final.items()}


def _find_mixed(groups: Sequence[ChannelGroup], maps: Mapping[str, ReductionMap]) -> set[str]:
    """Tensors of which a map does more than pick entries: only those need more than their own precision."""
    return {m.tensor for g in groups for m in g.members if find_picks_of(m, maps[g.name]) is None}


def _is_picked(
    norm: FoldableNorm, groups: Sequence[ChannelGroup], mixed: set[str], weights: Mapping[str, Tensor]
) -> bool:
    """Whether every tensor of a norm keeps the same entries as they are, no gamma of 0 among them: nothing to fold."""
    names = norm_tensors(norm)
    if mixed & set(names) or (norm.weight is not None and not bool(weights[norm.weight].all())):
        return False
    sides = [
        {name: m.positions for m in g.members if (name := m.tensor) in names and _is_along(m, norm)} for g in groups
    ]
    return all(_are_alike(side.get(name), side.get(norm.mean)) for side in sides if side for name in names)


def _is_along(member: Member, norm: FoldableNorm) -> bool:
    return member.dim == (norm.producer_dim if member.tensor == norm.producer_weight else 0)


def _are_alike(positions: np.ndarray | None, others: np.ndarray | None) -> bool:
    return positions is not None and others is not None and np.array_equal(positions, others)


def _fold_all(
    original: Mapping[str, Tensor], norms: Sequence[FoldableNorm], turned: Sequence[ChannelGroup], mixed: set[str]
) -> dict[str, Tensor]:
    """Tensors with norms and rotated streams folded, in float64 where they are mixed; others are not copied."""
    changed = set(original) if turned else {t for n in norms for t in norm_tensors(n)}
    folded = fold_norms({name: tensor for name, tensor in original.items() if name in changed}, norms)
    fold_streams_(folded, turned)
    own = {name: tensor.detach() for name, tensor in original.items() if name not in changed}
    as_double = lambda name, t: t.double() if name in mixed and t.is_floating_point() else t  # noqa: E731
    return {**folded, **{name: as_double(name, tensor) for name, tensor in own.items()}}


def norm_tensors(norm: FoldableNorm) -> list[str]:
    names = (norm.producer_weight, norm.producer_bias, norm.weight, norm.bias, norm.mean, norm.variance)
    return [n for n in names if n is not None]


def find_norm_biases(group: ChannelGroup) -> list[Member]:
    """Biases behind a norm's own scale: the norm resets the scale of what it normalises, so they are averaged."""
    norms = {m.module for m in group.with_role(Role.MEAN, Role.VARIANCE)}
    norms |= {m.module for m in group.with_role(Role.SCALES) if m.tensor.endswith("weight") and m.dim == 0}
    kernels = {m.module for m in group.with_role(Role.PRODUCES, Role.CONSUMES)}
    return [m for m in group.with_role(Role.SHIFTS) if m.module in norms - kernels]


def _remap(
    name: str, tensor: Tensor, groups: list[ChannelGroup], maps: Mapping[str, ReductionMap], centred: set[str]
) -> Tensor:
    """One tensor after all maps that run through it."""
    touching = [(g, m) for g in groups for m in g.members if m.tensor == name]
    if not touching:
        return tensor
    picks = [(m, find_picks_of(m, maps[g.name], average=name in centred)) for g, m in touching]
    if all(chosen is not None and m.within is None for m, chosen in picks):
        return _pick(tensor, [(m, chosen.cpu().numpy()) for m, chosen in picks if chosen is not None])
    tensor = tensor.clone()
    for group, member in touching:
        tensor = mix_channels(tensor, member, maps[group.name], average=name in centred)
    return shorten(tensor, [(m, len(maps[g.name].merge)) for g, m in touching], name)


def _pick(tensor: Tensor, picks: Sequence[tuple[Member, np.ndarray]]) -> Tensor:
    """A tensor of which each member keeps the chosen channels, at its group's first places: one copy a dimension."""
    for dim in dict.fromkeys(m.dim for m, _ in picks):
        source, keep = np.arange(tensor.shape[dim]), np.ones(tensor.shape[dim], bool)
        for member, chosen in picks:
            if member.dim == dim:
                source[member.positions[: len(chosen)].ravel()] = source[member.positions[chosen].ravel()]
                keep[member.positions[len(chosen) :].ravel()] = False
        tensor = tensor.index_select(dim, torch.from_numpy(source[keep]).to(tensor.device))
    return tensor


def mix_channels(tensor: Tensor, member: Member, reduction: ReductionMap, *, average: bool = False) -> Tensor:
    """Write the m new channels over the group's first m places (in place)."""
    part = tensor if member.within is None else narrow_to(tensor, member.within)
    positions = torch.from_numpy(member.positions).to(tensor.device)
    places = positions[: len(reduction.merge)].flatten()
    chosen = find_picks_of(member, reduction, average=average)
    if chosen is not None:
        chosen = chosen.to(tensor.device)
        part.index_copy_(member.dim, places, part.index_select(member.dim, positions[chosen].flatten()))
        return tensor
    matrix = matrix_for(member, reduction, average=average).to(tensor.device)
    rows = part.index_select(member.dim, positions.flatten()).movedim(member.dim, 0)
    new = map_rows(matrix, rows.reshape(len(positions), -1), member).reshape(len(places), *rows.shape[1:])
    part.index_copy_(member.dim, places, new.movedim(0, member.dim))
    return tensor


def find_picks_of(member: Member, reduction: ReductionMap, *, average: bool = False) -> Tensor | None:
    """Which channel each new one is where `matrix_for` only picks; weighted means of one channel each are picks too."""
    into, out_of = (1.0, 1.0) if reduction.scale is None else reduction.scale.tolist()
    if member.roles & READS and Role.PRODUCES not in member.roles:
        return reduction.read if out_of == 1 else None
    scaled = Role.PRODUCES in member.roles or (member.roles & {Role.SHIFTS, Role.MEAN} and not average)
    return None if scaled and into != 1 else reduction.picked


def hollow_(weights: dict[str, Tensor], group: ChannelGroup, reduction: ReductionMap) -> None:
    """Reduce one group of folded weights without moving anything: the places given up become zero (in place).

    Scores and distances of other groups then see what they would see in the smaller network.
    """
    fold_streams_(weights, find_turned([group], {group.name: reduction}))
    for member in group.members:
        tensor = mix_channels(weights[member.tensor], member, reduction)
        part = tensor if member.within is None else narrow_to(tensor, member.within)
        part.movedim(member.dim, 0)[torch.from_numpy(member.positions[len(reduction.merge) :])] = 0


def matrix_for(member: Member, reduction: ReductionMap, *, average: bool) -> Tensor:
    """(m, n): merge for what comes in, unmerge transposed for what goes out, weighted means for what multiplies."""
    into, out_of = (1.0, 1.0) if reduction.scale is None else reduction.scale.tolist()
    scale = lambda matrix, by: matrix if by == 1 else matrix * by  # noqa: E731
    if Role.PRODUCES in member.roles:
        return scale(reduction.merge, into)
    if member.roles & READS:
        return scale(reduction.unmerge.T, out_of)
    if member.roles & {Role.SHIFTS, Role.MEAN} and not average:
        return scale(reduction.merge, into)
    return reduction.merge if Role.VARIANCE in member.roles else mean_weights(reduction.merge)


def mean_weights(merge: Tensor) -> Tensor:
    """Weights of a mean: absolute values, rows summing to 1 (uniform for a zero row)."""
    size = merge.abs()
    total = size.sum(1, keepdim=True)
    return torch.where(total > 0, size / total.clamp(min=1e-300), 1 / merge.shape[1])


def narrow_to(tensor: Tensor, within: Slice) -> Tensor:
    return tensor.narrow(within.dim, within.start, within.stop - within.start)


def shorten(tensor: Tensor, members: list[tuple[Member, int]], name: str) -> Tensor:
    """Delete the places that the groups gave up."""
    return rewrite_along(
        tensor, [(m, m.positions[kept:].ravel()) for m, kept in members], _drop_places, name
    ).contiguous()


def _drop_places(tensor: Tensor, dim: int, dropped: Sequence[np.ndarray]) -> Tensor:
    keep = np.ones(tensor.shape[dim], bool)
    keep[np.concatenate(dropped)] = False
    return tensor if keep.all() else tensor.index_select(dim, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))


def _find_averages(
    vector: Tensor,
    name: str,
    groups: list[ChannelGroup],
    maps: Mapping[str, ReductionMap],
    means: Callable[[str], Tensor],
) -> Tensor | None:
    """What the maps do to a norm's vectors: one (m, n) matrix of weighted means, or what they pick (m,)."""
    touching = [(m, g.name) for g in groups for m in g.members if m.tensor == name]
    picks = [(m, chosen.cpu().numpy()) for m, g in touching if (chosen := maps[g].picked) is not None]
    if len(picks) == len(touching):
        return _pick(torch.arange(len(vector), device=vector.device), picks) if touching else None
    return compose_merges([(m, means(g)) for m, g in touching], len(vector), vector.device)


def map_rows(matrix: Tensor, rows: Tensor, member: Member) -> Tensor:
    """matrix @ rows, of variances by way of deviations."""
    variance = Role.VARIANCE in member.roles
    new = _multiply(matrix, rows.sqrt() if variance else rows)
    return new.square() if variance else new


def _multiply(matrix: Tensor, rows: Tensor) -> Tensor:
    """matrix @ rows; most maps are nearly empty (a plan has n + m - 1 entries), or half of them where channels stay."""
    columns = matrix.T
    counts = columns.count_nonzero(1)
    if 4 * int(counts.sum()) < matrix.numel():
        return torch.sparse.mm(matrix.to_sparse(), rows)
    if not bool((counts == 1).any()):
        return matrix @ rows
    alone, others = (where.nonzero()[:, 0] for where in (counts == 1, counts > 1))
    new = columns[others].T @ rows[others]
    single = columns[alone]
    target = (single != 0).byte().argmax(1)
    return new.index_add_(0, target, single.gather(1, target[:, None]) * rows[alone])


def rewrite_along(
    tensor: Tensor, parts: Iterable[tuple[Member, T]], rewrite: Callable[[Tensor, int, Sequence[T]], Tensor], name: str
) -> Tensor:
    """A tensor rewritten along every dimension that members run through, in slices of grouped convolutions first.

    While slices are rewritten, each on its own, they still lie where they lay along the other dimension.

    Args:
        parts: members, and what `rewrite` is to know of each.
        rewrite: (tensor or slice, dim, what is to be known of all members there) -> one of another size along dim.
        name: what messages call the tensor.
    Raises:
        PlanError: the slices would get different sizes.
    """
    whole: dict[int, list[T]] = defaultdict(list)
    sliced: dict[int, dict[Slice, list[T]]] = defaultdict(lambda: defaultdict(list))
    for member, part in parts:
        (whole[member.dim] if member.within is None else sliced[member.dim][member.within]).append(part)
    for dim, by_slice in sliced.items():
        tensor = _rewrite_slices(tensor, dim, by_slice, rewrite, name)
    for dim, own in whole.items():
        tensor = rewrite(tensor, dim, own)
    return tensor


def _rewrite_slices(
    tensor: Tensor,
    dim: int,
    by_slice: Mapping[Slice, Sequence[T]],
    rewrite: Callable[[Tensor, int, Sequence[T]], Tensor],
    name: str,
) -> Tensor:
    across = next(iter(by_slice)).dim
    pieces, end = [], 0
    for within in sorted(by_slice, key=lambda s: s.start):
        pieces += [tensor.narrow(across, end, within.start - end)] if within.start > end else []
        pieces.append(rewrite(narrow_to(tensor, within), dim, by_slice[within]))
        end = within.stop
    if end < tensor.shape[across]:
        pieces.append(tensor.narrow(across, end, tensor.shape[across] - end))
    sizes = sorted({p.shape[dim] for p in pieces})
    if len(sizes) > 1:
        raise PlanError(f"{name}: its groups would get different sizes {sizes}; give them the same keep.")
    return torch.cat(pieces, across)


def compose_merges(touching: Sequence[tuple[Member, Tensor]], size: int, device: torch.device | None = None) -> Tensor:
    """What several merges do to `size` rows that their members run through, as one (m, size) float64 matrix."""
    matrix = torch.eye(size, dtype=torch.float64, device=device)
    rows = [Member(m.tensor, 0, m.positions, frozenset([Role.PRODUCES])) for m, _ in touching]
    for member, (_, merge) in zip(rows, touching, strict=True):
        matrix = mix_channels(matrix, member, ReductionMap(merge, merge.T))
    sizes = [(member, len(merge)) for member, (_, merge) in zip(rows, touching, strict=True)]
    return shorten(matrix, sizes, rows[0].tensor)


def _set_length(
    pair: WeightNorm,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    groups: list[ChannelGroup],
    maps: Mapping[str, ReductionMap],
) -> dict[str, Tensor]:
    r"""Direction v and length g that leave w = g v / ||v|| as it was where v has lost some of its entries.

    g <- g ||v'|| / ||v||, with v the rows that were kept, whole, and v' what is left of them; where nothing is left,
    w is zero: g <- 0, and v' <- 1, as 0 / 0 is no direction.
    """
    dims = [d for d in range(before[pair.direction].dim()) if d != pair.dim]
    length = lambda v: torch.linalg.vector_norm(v, dim=dims, keepdim=True)  # noqa: E731
    whole = length(before[pair.direction]).reshape(before[pair.length].shape)
    whole = _remap(pair.length, whole, groups, maps, set())
    left = length(after[pair.direction])
    direction = torch.where(left > 0, after[pair.direction], 1.0)
    return {
        pair.direction: direction,
        pair.length: after[pair.length] * left.reshape(whole.shape) / whole.clamp(min=1e-300),
    }


def find_averaged_biases(groups: list[ChannelGroup], norms: list[FoldableNorm]) -> set[str]:
    """Biases of norms that are not folded."""
    return {m.tensor for g in groups for m in find_norm_biases(g)} - {n.bias for n in norms if n.bias is not None}
