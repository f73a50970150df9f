"""Reduction maps -> new weights -> a rebuilt network. Only this file and `restore/` write weights.

Every map runs along the positions of its group. The new channels take the places of the group's first m channels and
the other places are deleted, so whatever order the network's views and slices rely on survives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intrafusion.errors import PlanError
from intrafusion.graph import ChannelGraph, ChannelGroup, FoldableNorm, Member, Role, Slice
from intrafusion.norms import fold, unfold
from intrafusion.reduce.problem import ReductionMap


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def reduced_weights(
    weights: Mapping[str, Tensor], graph: ChannelGraph, maps: Mapping[str, ReductionMap]
) -> dict[str, Tensor]:
    """The tensors that change when groups are reduced, in their own dtype.

    Foldable batch norms are folded for the computation and get statistics back afterwards.

    Args:
        weights: the network's tensors by name; not modified.
        maps: a map for each group to reduce, by group name.
    Raises:
        PlanError: twins of a grouped convolution would end up with different sizes.
    """
    groups = [g for g in graph.groups if g.name in maps]
    names = {m.tensor for g in groups for m in g.members}
    norms = [n for n in graph.norms if names & set(tensors_of_norm(n))]
    names |= {t for n in norms for t in tensors_of_norm(n)}
    original = {name: weights[name] for name in names}
    centred = {m.tensor for g in groups for m in norm_biases(g)} - {n.bias for n in norms}
    folded = fold(original, norms)
    reduced = {name: remapped(name, folded[name], groups, maps, centred) for name in names}
    averages = {n.mean: averaging(n.mean, len(folded[n.mean]), groups, maps, folded[n.mean].device) for n in norms}
    final = unfold(reduced, original, norms, averages, folded)
    return {name: tensor.to(original[name].dtype) for name, tensor in final.items()}


def tensors_of_norm(norm: FoldableNorm) -> list[str]:
    names = (norm.producer_weight, norm.producer_bias, norm.weight, norm.bias, norm.mean, norm.variance)
    return [n for n in names if n is not None]


def norm_biases(group: ChannelGroup) -> list[Member]:
    """Biases behind a norm's own scale: the norm resets the scale of what it normalises, so they are averaged."""
    norms = {m.module for m in group.with_role(Role.MEAN, Role.VARIANCE)}
    norms |= {m.module for m in group.with_role(Role.SCALES) if m.tensor.endswith("weight") and m.dim == 0}
    kernels = {m.module for m in group.with_role(Role.PRODUCES, Role.CONSUMES)}
    return [m for m in group.with_role(Role.SHIFTS) if m.module in norms - kernels]


def remapped(
    name: str, tensor: Tensor, groups: list[ChannelGroup], maps: Mapping[str, ReductionMap], centred: set[str]
) -> Tensor:
    """One tensor after all maps that run through it."""
    touching = [(g, m) for g in groups for m in g.members if m.tensor == name]
    if not touching:
        return tensor
    tensor = tensor.clone()
    for group, member in touching:
        tensor = mixed(tensor, member, maps[group.name], average=name in centred)
    return shortened(tensor, [(m, len(maps[g.name].merge)) for g, m in touching], name)


def mixed(tensor: Tensor, member: Member, reduction: ReductionMap, *, average: bool = False) -> Tensor:
    """Write the m new channels over the group's first m places (in place)."""
    matrix = matrix_for(member, reduction, average=average).to(tensor.device)
    part = tensor if member.within is None else inside(tensor, member.within)
    positions = torch.from_numpy(member.positions).to(tensor.device)
    places, variance = positions[: len(matrix)].flatten(), Role.VARIANCE in member.roles
    chosen = copied(matrix)
    if chosen is not None:
        part.index_copy_(member.dim, places, part.index_select(member.dim, positions[chosen].flatten()))
        return tensor
    rows = part.index_select(member.dim, positions.flatten()).movedim(member.dim, 0)
    new = combined(matrix, (rows.sqrt() if variance else rows).reshape(len(positions), -1))
    new = new.reshape(len(places), *rows.shape[1:])
    part.index_copy_(member.dim, places, (new.square() if variance else new).movedim(0, member.dim))
    return tensor


def copied(matrix: Tensor) -> Tensor | None:
    """Which row each row of matrix @ rows is, for a matrix that only picks rows."""
    entries = matrix != 0
    picks = bool((entries.sum(1) == 1).all()) and bool((matrix[entries] == 1).all())
    return entries.long().argmax(1) if picks else None


def combined(matrix: Tensor, rows: Tensor) -> Tensor:
    """matrix @ rows; most maps are nearly empty (a transport plan has n + m - 1 entries)."""
    filled = int(matrix.count_nonzero())
    return torch.sparse.mm(matrix.to_sparse(), rows) if 4 * filled < matrix.numel() else matrix @ rows


def hollow_(weights: Mapping[str, Tensor], group: ChannelGroup, reduction: ReductionMap) -> None:
    """Reduce one group of folded weights without moving anything: the places given up become zero (in place).

    Scores and distances of other groups then see what they would see in the smaller network.
    """
    for member in group.members:
        tensor = mixed(weights[member.tensor], member, reduction)
        part = tensor if member.within is None else inside(tensor, member.within)
        part.movedim(member.dim, 0)[torch.from_numpy(member.positions[len(reduction.merge) :])] = 0


def matrix_for(member: Member, reduction: ReductionMap, *, average: bool) -> Tensor:
    """(m, n): merge for what comes in, unmerge transposed for what goes out, weighted means for what multiplies."""
    if Role.PRODUCES in member.roles:
        return reduction.merge
    if Role.CONSUMES in member.roles:
        return reduction.unmerge.T
    if member.roles & {Role.SHIFTS, Role.MEAN} and not average:
        return reduction.merge
    return reduction.merge if Role.VARIANCE in member.roles else row_means(reduction.merge)


def row_means(merge: Tensor) -> Tensor:
    """Weights of a mean: absolute values, rows summing to 1 (uniform for a zero row)."""
    size = merge.abs()
    total = size.sum(1, keepdim=True)
    return torch.where(total > 0, size / total.clamp(min=1e-300), 1 / merge.shape[1])


def inside(tensor: Tensor, within: Slice) -> Tensor:
    return tensor.narrow(within.dim, within.start, within.stop - within.start)


def shortened(tensor: Tensor, members: list[tuple[Member, int]], name: str) -> Tensor:
    """Delete the places that the groups gave up, slices of grouped convolutions first."""
    whole: dict[int, list[np.ndarray]] = defaultdict(list)
    sliced: dict[int, dict[Slice, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for member, m in members:
        dropped = member.positions[m:].ravel()
        if member.within is None:
            whole[member.dim].append(dropped)
        else:
            sliced[member.dim][member.within].append(dropped)
    for dim, parts in sliced.items():
        tensor = shortened_slices(tensor, dim, parts, name)
    for dim, dropped in whole.items():
        tensor = without(tensor, dim, dropped)
    return tensor.contiguous()


def without(tensor: Tensor, dim: int, dropped: list[np.ndarray]) -> Tensor:
    keep = np.ones(tensor.shape[dim], bool)
    keep[np.concatenate(dropped)] = False
    return tensor if keep.all() else tensor.index_select(dim, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))


def shortened_slices(tensor: Tensor, dim: int, parts: dict[Slice, list[np.ndarray]], name: str) -> Tensor:
    pieces, end = [], 0
    for within in sorted(parts, key=lambda s: s.start):
        pieces += [tensor.narrow(within.dim, end, within.start - end)] if within.start > end else []
        pieces.append(without(inside(tensor, within), dim, parts[within]))
        end = within.stop
    across = next(iter(parts)).dim
    if end < tensor.shape[across]:
        pieces.append(tensor.narrow(across, end, tensor.shape[across] - end))
    if len({p.shape[dim] for p in pieces}) > 1:
        sizes = sorted({p.shape[dim] for p in pieces})
        raise PlanError(f"{name}: its groups would get different sizes {sizes}; give them the same keep.")
    return torch.cat(pieces, across)


def averaging(
    mean: str, size: int, groups: list[ChannelGroup], maps: Mapping[str, ReductionMap], device: torch.device
) -> Tensor | None:
    """What the maps do to a norm's vectors, as one (m, n) matrix of weighted means."""
    touching = [(g, m) for g in groups for m in g.members if m.tensor == mean]
    if not touching:
        return None
    matrix = torch.eye(size, dtype=torch.float64, device=device)
    for group, member in touching:
        means = row_means(maps[group.name].merge)
        matrix = mixed(matrix, member_of_rows(member), ReductionMap(means, means.T))
    return shortened(matrix, [(member_of_rows(m), len(maps[g.name].merge)) for g, m in touching], mean)


def member_of_rows(member: Member) -> Member:
    return Member(member.tensor, 0, member.positions, frozenset([Role.PRODUCES]))


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repair:
    """A module attribute that had to follow the new shapes, such as a convolution's out_channels."""

    module: str
    attribute: str
    old: int | tuple[int, ...]
    new: int | tuple[int, ...]


def write_(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[Repair, ...]:
    """Put new tensors into a network, in place, and let the attributes of their modules follow.

    Parameters keep their identity: ties, requires_grad, hooks and optimizer references survive; gradients of another
    shape are dropped.
    """
    tensors = named_tensors(model)
    shapes = {name: tuple(tensors[name].shape) for name in weights}
    for name, value in weights.items():
        target = tensors[name]
        target.data = value
        if target.grad is not None and target.grad.shape != value.shape:
            target.grad = None
    changed = {name for name, shape in shapes.items() if shape != tuple(weights[name].shape)}
    repairs = find_repairs(model, {id(tensors[name]): shapes[name] for name in changed})
    make_repairs_(model, repairs)
    return repairs


def make_repairs_(model: nn.Module, repairs: tuple[Repair, ...]) -> None:
    modules = dict(model.named_modules())
    for repair in repairs:
        setattr(modules[repair.module], repair.attribute, repair.new)


def find_repairs(model: nn.Module, old_shapes: Mapping[int, tuple[int, ...]]) -> tuple[Repair, ...]:
    """Attributes that disagree with the new shapes of their own module's tensors."""
    repairs = []
    for name, module in model.named_modules():
        own = own_tensors(module)
        old = {k: old_shapes.get(id(t), tuple(t.shape)) for k, t in own.items()}
        if not any(id(t) in old_shapes for t in own.values()):
            continue
        for attribute, value in expected_attributes(module, old, {k: tuple(t.shape) for k, t in own.items()}).items():
            present = getattr(module, attribute)
            if present != value:
                repairs.append(Repair(name, attribute, present, value))
    return tuple(repairs)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module itself, and those that a parametrization computes them from."""
    own = {k: t for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if parametrize.is_parametrized(module):
        sources = module.get_submodule("parametrizations")
        own.update(sources.named_parameters())
        own.update({name: getattr(module, name) for name, _ in sources.named_children()})
    return own


Shapes = Mapping[str, tuple[int, ...]]

SIZES = (
    *("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "num_parameters"),
    *("embedding_dim", "num_embeddings", "embed_dim", "input_size", "hidden_size", "hidden_dim"),
    *("nf", "nx", "channels", "dim", "width"),
)


KERNELS = ("weight", "weight_orig", "weight_v")  # plain; behind a pruning mask or spectral norm; behind weight norm


def expected_attributes(module: nn.Module, old: Shapes, new: Shapes) -> dict[str, int | tuple[int, ...]]:
    """What the size attributes of a module must be, from the shapes of its tensors."""
    kernel = next((k for k in KERNELS if k in new), "weight")
    if isinstance(module, nn.modules.conv._ConvNd):
        return convolution_attributes(module, old[kernel], new[kernel])
    if isinstance(module, nn.Linear):
        return {"in_features": new[kernel][1], "out_features": new[kernel][0]}
    if isinstance(module, nn.RNNBase):
        return {"input_size": new["weight_ih_l0"][1], "hidden_size": new["weight_hh_l0"][1]}
    if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels and "weight" in new:
        return dict.fromkeys(("num_groups", "num_channels"), new["weight"][0])  # one channel to each group stays so
    found: dict[str, int | tuple[int, ...]] = {}
    if "weight" in old and getattr(module, "normalized_shape", None) == old["weight"]:
        found["normalized_shape"] = new["weight"]
    changes = {(o, n) for k in old for o, n in zip(old[k], new[k], strict=True) if o != n}
    still = {o for k in old for o, n in zip(old[k], new[k], strict=True) if o == n}
    for attribute in SIZES:
        targets = {n for o, n in changes if o == getattr(module, attribute, None)}
        if len(targets) == 1 and getattr(module, attribute) not in still:
            found[attribute] = targets.pop()
    return found


def convolution_attributes(
    module: nn.modules.conv._ConvNd, old: tuple[int, ...], new: tuple[int, ...]
) -> dict[str, int | tuple[int, ...]]:
    whole, part = new[0], new[1]
    depthwise = module.groups > 1 and module.groups == module.in_channels
    groups = module.groups
    if depthwise:
        groups = whole if module.transposed else whole * module.groups // old[0]
    sides = (whole, part * groups)
    in_channels, out_channels = sides if module.transposed else (sides[1], sides[0])
    return {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
