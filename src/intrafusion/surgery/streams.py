"""Norms of a stream folded into what reads them, so that the channels between may be rotated.

Behind a fold every norm is bare: x -> x / rms(x), of the centred x for a LayerNorm. Such a norm commutes with every
orthogonal matrix (that leaves the vector of ones alone, where it centres).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from intrafusion.graph import ChannelGroup, Member, StreamNorm, StreamScale
from intrafusion.reduce.pivot import Pivot
from intrafusion.reduce.problem import Moments, ReductionMap
from intrafusion.reduce.select import selection_map


def fold_streams_(weights: dict[str, Tensor], groups: Iterable[ChannelGroup]) -> None:
    r"""Put the gain g and the shift b of every norm of these groups into the columns of its readers (in place).

    Without a shift, W <- W diag(g) and g <- 1. A shift stays in the norm as what no rotation changes, the vector of
    ones, which nothing else that a LayerNorm gives has a part of:

        W  <-  W diag(g) (I - 1 1^T / n) + W b 1^T / n,     g <- 1,     b <- 1,

    so a reader needs no bias. A gain that is stored as w, and is 1 + w, becomes 0. A scale s of a branch goes into what
    writes the branch: W <- diag(s) W, its bias likewise, and s <- 1.

    Args:
        weights: tensors of the groups by name, float64; entries are replaced, not written into.
    """
    for group in groups:
        places = {(m.tensor, m.dim): m for m in group.members}
        norms, scales = (group.rotation.norms, group.rotation.scales) if group.rotation is not None else ((), ())
        for norm in norms:
            _fold(weights, norm, places)
        for scale in scales:
            _fold_into_writer(weights, scale, places)
        for norm in norms:
            if norm.scale is not None:
                weights[norm.scale] = torch.full_like(weights[norm.scale], 1 - norm.offset)
            if norm.shift is not None:
                weights[norm.shift] = torch.ones_like(weights[norm.shift])
        for scale in scales:
            weights[scale.scale] = torch.ones_like(weights[scale.scale])


def _fold(weights: dict[str, Tensor], norm: StreamNorm, places: dict[tuple[str, int], Member]) -> None:
    for tensor, dim in norm.readers:
        member, weight = places[tensor, dim], weights[tensor].clone()
        rows = weight.movedim(dim, 0)
        index = torch.as_tensor(member.positions, device=weight.device)
        columns = rows[index]  # (n, slots, ...)
        new = columns
        if norm.scale:
            new = columns * _along(norm.offset + take_entries(weights[norm.scale], norm.scale, places), columns)
        if norm.shift:
            constant = (columns * _along(take_entries(weights[norm.shift], norm.shift, places), columns)).mean(0)
            new = new - new.mean(0) + constant
        rows[index] = new
        weights[tensor] = weight


def _fold_into_writer(weights: dict[str, Tensor], scale: StreamScale, places: dict[tuple[str, int], Member]) -> None:
    factors = take_entries(weights[scale.scale], scale.scale, places)
    for name, dim in ((scale.weight, scale.dim), (scale.bias, 0)):
        if name is not None:
            tensor = weights[name].clone()
            rows = tensor.movedim(dim, 0)
            index = torch.as_tensor(places[name, dim].positions, device=tensor.device)
            rows[index] = rows[index] * _along(factors, rows[index])
            weights[name] = tensor


def take_entries(tensor: Tensor, name: str, places: dict[tuple[str, int], Member]) -> Tensor:
    """The entries of a vector with one for each channel, in the order of the channels, (n,)."""
    member = next(m for (tensor_name, _), m in places.items() if tensor_name == name)
    vector = tensor.movedim(member.dim, 0).flatten()
    return vector[torch.as_tensor(member.positions[:, 0], device=vector.device)]


def _along(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.dim() - 1))


def random_turn(group: ChannelGroup, generator: np.random.Generator) -> ReductionMap:
    """A random orthogonal matrix, which leaves the vector of ones alone where the rotation must."""
    n = group.size
    free = n - 1 if group.rotation is not None and group.rotation.centred else n
    turn, _ = np.linalg.qr(generator.standard_normal((free, free)))
    if free < n:
        basis = np.linalg.svd(np.ones((1, n)))[2][1:]
        turn = basis.T @ turn @ basis + 1 / n
    matrix = torch.from_numpy(turn)
    return ReductionMap(matrix, matrix.T.contiguous())


def select_instead(reduction: ReductionMap) -> ReductionMap:
    """As many channels as a rotation keeps directions: those of which most lies in these directions."""
    merge = reduction.merge
    m, n = merge.shape
    inside = Moments(merge.new_zeros(1, n), (merge.T @ merge)[None], torch.eye(n).to(merge))
    return selection_map(Pivot().choose(inside, m), n)


def widen_turn(reduction: ReductionMap) -> ReductionMap:
    r"""What a rotation to m of n directions does at the full width: for its proof.

    With V the m kept directions, orthonormal, M = c V and U = V^T / c; then norms over n channels see what those over m
    see, if M <- a V^T M and U <- U V / a with a^2 = n / m.
    """
    m, n = reduction.merge.shape
    kept, a = reduction.merge / _find_length(reduction.merge), (n / m) ** 0.5
    return ReductionMap(a * kept.T @ reduction.merge, reduction.unmerge @ kept / a)


def _find_length(merge: Tensor) -> Tensor:
    return (merge.square().sum() / len(merge)).sqrt()


def find_turned(groups: Iterable[ChannelGroup], maps: Mapping[str, ReductionMap]) -> list[ChannelGroup]:
    """Those groups that maps rotate."""
    return [g for g in groups if g.name in maps and is_turned(g, maps[g.name])]


def is_turned(group: ChannelGroup, reduction: ReductionMap) -> bool:
    """Whether a map rotates the channels of a group, so that its norms are folded first; one that picks does not."""
    merge = reduction.merge
    if group.rotation is None or bool(((merge != 0).sum(1) == 1).all()):
        return False
    square = merge @ merge.T / _find_length(merge) ** 2
    return torch.allclose(square, torch.eye(len(merge)).to(square), atol=1e-6)
