"""Which channels of one network play the part of which channels of another: one coupling per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.fusion.match import GroupPair
from intrafusion.fusion.move import Move, move_channels
from intrafusion.graph import READS, ChannelGraph, Member, Role
from intrafusion.importance.features import channel_rows, weighs
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce import ReductionMap
from intrafusion.reduce.fuse import NORMALIZATIONS
from intrafusion.surgery.maps import find_norm_biases, matrix_for, norm_tensors
from intrafusion.surgery.norms import fold_norms
from intrafusion.transport import direction_cost, optimal_coupling

GroupMaps = Mapping[str, ReductionMap]
Passages = Mapping[str, list[tuple[GroupPair, Member, Member]]]
"""By tensor, the groups that run through it, and their members of it in both networks."""


@checked
@dataclass(frozen=True)
class Alignment:
    """How channels are compared, and what becomes of the optimal transport plan between them.

    Attributes:
        cost: "distance" (Euclidean, between rows as they are) or "direction" (l1, between rows of unit length).
        sides: of weights: "inputs" compares what produces the channels, as Singh and Jaggi do, "both" also what reads
            them, as Ainsworth et al. do.
        rounds: passes over all groups. The first knows only the layers before; later ones compare all layers of a
            residual stream, in the coordinates that the pass before found. Stops when nothing moves any more.
        normalization: "function" (means in, sums out) or "target" (means in, means out, as Singh and Jaggi write); the
            same where the widths are.
    """

    cost: str = "distance"
    sides: str = "both"
    rounds: int = 10
    normalization: str = "function"

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        for kind, name, valid in (
            ("cost", self.cost, _COST_FUNCTIONS),
            ("sides", self.sides, _MEMBER_SIDES),
            ("normalization", self.normalization, NORMALIZATIONS),
        ):
            if name not in valid:
                raise ArgumentError(unknown_name(kind, name, valid))
        if self.rounds < 1:
            raise ArgumentError(f"rounds: expected at least 1, got {self.rounds!r}.")


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """One network: its folded tensors, and what its channels gave on images, if they are compared by that.

    betas: biases of the folded norms as they were, which are the means of what the norms give.
    """

    weights: Mapping[str, Tensor]
    graph: ChannelGraph
    outputs: Mapping[str, Tensor]
    betas: Mapping[str, Tensor]

    __repr__ = show_briefly

    @classmethod
    def of(cls, model: nn.Module, graph: ChannelGraph, outputs: Mapping[str, Tensor] | None = None) -> FoldedNetwork:
        tensors = named_tensors(model)
        names = {*graph.shapes, *(t for n in graph.norms for t in norm_tensors(n))}
        betas = {n.bias: tensors[n.bias].detach().double() for n in graph.norms if n.bias is not None}
        return cls(fold_norms({name: tensors[name] for name in names}, graph.norms), graph, outputs or {}, betas)


def align_groups(
    own: FoldedNetwork, anchor: FoldedNetwork, pairs: Sequence[GroupPair], how: Alignment
) -> dict[str, ReductionMap]:
    r"""A map onto the anchor's channels for every group, by the anchor's name of it.

    T = argmin <T, C>  subject to  T 1 = 1/n,  T^T 1 = 1/m, group after group, with C the distance between the rows that
    describe the channels. Rows of weights are compared with their inputs carried along the maps found so far.

    Reference: Singh and Jaggi 2020, Algorithm 1; passes after the first as in Ainsworth et al. 2023, Algorithm 1.
    """
    maps: dict[str, ReductionMap] = {}
    by_outputs = [p for p in pairs if p.name in anchor.outputs and p.own.name in own.outputs]
    for pair in by_outputs:
        maps[pair.name] = _couple(own.outputs[pair.own.name], anchor.outputs[pair.name], how)
    rest = [p for p in pairs if p.name not in maps]
    passages = find_passages(pairs)
    for _ in range(how.rounds):
        before = dict(maps)
        for pair in rest:
            maps[pair.name] = _couple(*_describe_channels(pair, own, anchor, passages, maps, how), how)
        if all(n in before and torch.equal(before[n].merge, maps[n].merge) for n in maps):
            break
    return maps


def _couple(x: Tensor, y: Tensor, how: Alignment) -> ReductionMap:
    a, b = (torch.full((len(rows),), 1 / len(rows), dtype=torch.float64, device=rows.device) for rows in (x, y))
    return NORMALIZATIONS[how.normalization](optimal_coupling(_COST_FUNCTIONS[how.cost](x, y), a, b), a, b)


def _describe_channels(
    pair: GroupPair, own: FoldedNetwork, anchor: FoldedNetwork, passages: Passages, maps: GroupMaps, how: Alignment
) -> tuple[Tensor, Tensor]:
    """The vectors that describe the channels of a group in both networks, of equal length."""
    columns: list[tuple[Tensor, Tensor]] = []
    for mine, theirs in pair.members:
        if _is_described_by(mine, own.weights, how) and (moves := find_moves(pair, mine, passages, maps)) is not None:
            shape = anchor.graph.shapes[theirs.tensor]
            moved = {**own.weights, mine.tensor: move_channels(own.weights[mine.tensor], moves, shape)}
            there = replace(mine, within=theirs.within)  # the slice lies along a dimension that was carried
            columns.append((channel_rows(moved, there), channel_rows(anchor.weights, theirs)))
    if not columns:
        n, m = pair.own.size, pair.anchor.size
        return torch.zeros(n, 1, dtype=torch.float64), torch.zeros(m, 1, dtype=torch.float64)
    mine, theirs = zip(*columns, strict=True)
    return torch.cat(mine, dim=1), torch.cat(theirs, dim=1)


def _is_described_by(member: Member, weights: Mapping[str, Tensor], how: Alignment) -> bool:
    if member.roles & READS and Role.PRODUCES not in member.roles:
        return how.sides == "both"
    return weighs(member, weights) or Role.SHIFTS in member.roles


def find_passages(pairs: Sequence[GroupPair]) -> Passages:
    """What runs through each tensor."""
    found: dict[str, list[tuple[GroupPair, Member, Member]]] = {}
    for pair in pairs:
        for mine, theirs in pair.members:
            found.setdefault(mine.tensor, []).append((pair, mine, theirs))
    return found


def find_moves(pair: GroupPair, member: Member, passages: Passages, maps: GroupMaps) -> list[Move] | None:
    """How the other dimensions of a member's tensor are carried; None while a map for them is not known yet."""
    moves = []
    for other, mine, theirs in passages[member.tensor]:
        if mine.dim == member.dim:
            continue
        if other.name not in maps:
            return None
        moves.append(_make_move(mine, theirs, maps[other.name]))
    return moves


def _make_move(mine: Member, theirs: Member, reduction: ReductionMap, *, average: bool = False) -> Move:
    return Move(mine, theirs, matrix_for(mine, reduction, average=average))


def move_tensors(
    tensors: Mapping[str, Tensor], own: ChannelGraph, anchor: ChannelGraph, pairs: Sequence[GroupPair], maps: GroupMaps
) -> dict[str, Tensor]:
    """Tensors of a network, norms folded, in the anchor's coordinates and shape."""
    passages = find_passages(pairs)
    centred = {m.tensor for p in pairs for m in find_norm_biases(p.own)} - {n.bias for n in own.norms}

    def moves(name: str) -> Iterator[Move]:
        for pair, mine, theirs in passages.get(name, []):
            yield _make_move(mine, theirs, maps[pair.name], average=name in centred)

    return {n: move_channels(t, list(moves(n)), anchor.shapes.get(n, tuple(t.shape))) for n, t in tensors.items()}


def _find_distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


_COST_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distance": _find_distances,
    "direction": direction_cost,
}
_MEMBER_SIDES = ("inputs", "both")
