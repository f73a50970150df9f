"""Accuracy over the plane through three networks of one shape; a smaller network is put back at full width first.

Reference: Theus et al. 2024, Figures 6 and 15 to 18; the plane as in Garipov et al. 2018 (Loss Surfaces, Mode
Connectivity), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from intrafusion.arguments import Count, NotNegative, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, ModelError, show
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.network.double import output_difference, run_in_double
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import check_graph, copy_model, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.maps import narrow_to, shorten
from intrafusion.surgery.norms import fold_norms

_EMBEDDING_TOLERANCE = 1e-6

WeightPoint = dict[str, Tensor]


@checked
def fold_tensors(model: nn.Module, graph: ChannelGraph) -> WeightPoint:
    """Every tensor by name, float64, batch norms folded: what a straight line between networks should run through."""
    check_graph(graph, model, smaller=True)
    return fold_norms({name: t.detach() for name, t in named_tensors(model).items()}, graph.norms)


@checked
def match_places(
    maps: Mapping[str, ReductionMap], alike: Mapping[str, ReductionMap] | None = None
) -> dict[str, np.ndarray]:
    """Which old channel each new one is put back as: the one that it takes most of, each used once.

    Args:
        maps: by group.
        alike: maps that settle ties, such as those of plain pruning to the same sizes.
    Returns:
        by group, (m,) indices of old channels.
    """
    found = {}
    for name, reduction in maps.items():
        share = reduction.merge.abs()
        share = share / share.sum(1, keepdim=True).clamp(min=1e-300)
        if alike is not None and name in alike:
            share = share + 2 * alike[name].merge.abs()
        found[name] = linear_sum_assignment(-share.cpu().numpy())[1]
    return found


def _embed_tensors(
    small: Mapping[str, Tensor], full: Mapping[str, Tensor], graph: ChannelGraph, where: Mapping[str, np.ndarray]
) -> WeightPoint:
    """The tensors of a smaller network at the shapes of the original; channels that are gone are zero.

    Statistics of norms stay those of the original there, as they scale nothing.

    Args:
        small: tensors by name, norms folded.
        full: those of the original, norms folded.
        where: the old channels (m,) of each reduced group that its new ones are put back as, see `places`.
    """
    groups = [g for g in graph.groups if g.name in where]
    scales = {t for n in graph.norms for t in (n.weight, n.variance) if t}
    scales |= {m.tensor for g in groups for m in g.members if Role.VARIANCE in m.roles}
    wide: WeightPoint = {}
    for name, tensor in full.items():
        index = _flat_indices(name, tensor.shape, groups, where)
        flat = tensor.clone().flatten() if name in scales else torch.zeros_like(tensor).flatten()
        if index.numel() != small[name].numel():
            raise ArgumentError(
                f"where: expected the old channels of every group that was made smaller, got {show(sorted(where))}: "
                f"{name!r} would have {index.numel()} entries, and has {small[name].numel()}; use `match_places`."
            )
        flat[index.flatten()] = small[name].flatten().to(flat)
        wide[name] = flat.reshape(tensor.shape)
    return wide


def _flat_indices(name: str, shape: torch.Size, groups: list[ChannelGroup], where: Mapping[str, np.ndarray]) -> Tensor:
    """Flat index in the full tensor of every entry of the smaller one, in the smaller one's shape."""
    index = torch.arange(shape.numel()).reshape(shape)
    touching = [(g, m) for g in groups for m in g.members if m.tensor == name]
    for group, member in touching:
        _move_back(index, member, where[group.name])
    return shorten(index, [(m, len(where[g.name])) for g, m in touching], name) if touching else index


def _move_back(index: Tensor, member: Member, old: np.ndarray) -> None:
    """Bring the entries of these old channels to the first places of the group, where `apply` left them (in place)."""
    part = (index if member.within is None else narrow_to(index, member.within)).movedim(member.dim, 0)
    positions = torch.from_numpy(member.positions)
    part[positions[: len(old)]] = part[positions[torch.from_numpy(old)]].clone()


@checked
def copy_with_tensors(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with these values, in the precision of the network."""
    copied = copy_model(model)
    _check_points({name: t.detach() for name, t in named_tensors(model).items()}, weights)
    for name, tensor in named_tensors(copied).items():
        tensor.data = weights[name].to(tensor)
    return copied


def _check_points(first: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ArgumentError: weights that do not belong to one network.
    """
    for name, tensor in first.items():
        for other in others:
            if name not in other or other[name].shape != tensor.shape:
                has = list(other[name].shape) if name in other else "none"
                raise ArgumentError(
                    f"landscape: expected weights of one network, with {name!r} of shape {list(tensor.shape)}, got "
                    f"{has}; `fold_tensors` takes them from a network."
                )


@checked
def embed_network(
    model: nn.Module,
    small: nn.Module,
    graph: ChannelGraph,
    where: Mapping[str, np.ndarray],
    example_inputs: ExampleInputs,
) -> WeightPoint:
    """The smaller network as weights of the original, checked to compute the same in float64.

    Raises:
        ModelError: it does not, as behind a layer norm, which averages over channels that are gone.
    """
    inputs = Inputs.of(example_inputs)
    for name, old in where.items():
        group = next((g for g in graph.groups if g.name == name), None)
        if group is None or old.ndim != 1 or not set(old.tolist()) <= set(range(group.size)):
            raise ArgumentError(
                f"where[{show(name)}]: expected the old channels of a group of the graph, got {show(old)}; "
                "`match_places` finds them."
            )
    wide = _embed_tensors(fold_tensors(small, graph), fold_tensors(model, graph), graph, where)
    found = run_in_double(copy_with_tensors(copy_model(model).double(), wide), inputs)
    error = output_difference(found, run_in_double(copy_model(small).double(), inputs))
    if error > _EMBEDDING_TOLERANCE:
        raise ModelError(
            f"landscape: put back at full width with zeros, the smaller network computes something else "
            f"({error:.1e} relative); this is so where channels are normalised together, as by a layer norm."
        )
    return wide


@checked
@dataclass(frozen=True, eq=False)
class Plane:
    """The plane through three points of weight space, with `origin` at (0, 0) and the first other point at (length, 0).

    Attributes:
        right, up: unit directions, orthogonal.
        corners: (x, y) of the three points.
    """

    origin: WeightPoint
    right: WeightPoint
    up: WeightPoint
    corners: tuple[tuple[float, float], ...]

    __repr__ = show_briefly

    @classmethod
    @checked
    def through(cls, origin: WeightPoint, first: WeightPoint, second: WeightPoint) -> Plane:
        """Raises ArgumentError if the three points lie on one line."""
        _check_points(origin, first, second)
        a, b = ({n: w[n] - origin[n] for n in origin} for w in (first, second))
        length = _vector_length(a)
        if length == 0:
            raise ArgumentError("landscape: expected three different networks, got two that are the same; take others.")
        right = {n: t / length for n, t in a.items()}
        along = _dot_product(b, right)
        rest = {n: b[n] - along * right[n] for n in b}
        height = _vector_length(rest)
        if height <= 1e-12 * max(length, abs(along)):
            raise ArgumentError("landscape: expected three points that span a plane, got a line; take other networks.")
        up = {n: t / height for n, t in rest.items()}
        return cls(origin, right, up, ((0.0, 0.0), (length, 0.0), (along, height)))

    @checked
    def at(self, x: float, y: float) -> WeightPoint:
        return {n: t + x * self.right[n] + y * self.up[n] for n, t in self.origin.items()}

    @checked
    def axes(self, points: Count, margin: NotNegative = 0.25) -> tuple[list[float], list[float]]:
        """Evenly spaced coordinates around the corners, with a margin as a share of their extent."""
        found = []
        for values in zip(*self.corners, strict=True):
            pad = margin * (max(values) - min(values))
            found.append(np.linspace(min(values) - pad, max(values) + pad, points).tolist())
        return found[0], found[1]


def _dot_product(a: WeightPoint, b: WeightPoint) -> float:
    return sum(float((a[n].double() * b[n].double()).sum()) for n in a)


def _vector_length(a: WeightPoint) -> float:
    return _dot_product(a, a) ** 0.5
