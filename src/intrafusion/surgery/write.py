"""New tensors into a network: its parameters keep their identity, its attributes follow the new shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intrafusion.errors import PlanError
from intrafusion.graph import Member, Role, Slice
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.maps import mix_channels, narrow_to, shorten

T = TypeVar("T")


def map_rows(matrix: Tensor, rows: Tensor, member: Member) -> Tensor:
    """matrix @ rows, of variances by way of deviations; most maps are nearly empty (a plan has n + m - 1 entries)."""
    variance, filled = Role.VARIANCE in member.roles, int(matrix.count_nonzero())
    rows = rows.sqrt() if variance else rows
    new = torch.sparse.mm(matrix.to_sparse(), rows) if 4 * filled < matrix.numel() else matrix @ rows
    return new.square() if variance else new


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


@dataclass(frozen=True)
class Repair:
    """A module attribute that had to follow the new shapes, such as a convolution's out_channels."""

    module: str
    attribute: str
    old: int | tuple[int, ...]
    new: int | tuple[int, ...]


def write_weights_(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[Repair, ...]:
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


TensorShapes = Mapping[str, tuple[int, ...]]


SIZE_ATTRIBUTES = (
    *("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "num_parameters"),
    *("embedding_dim", "num_embeddings", "embed_dim", "input_size", "hidden_size", "hidden_dim"),
    *("nf", "nx", "channels", "dim", "width"),
)


KERNELS = ("weight", "weight_orig", "weight_v")  # plain; behind a pruning mask or spectral norm; behind weight norm


def expected_attributes(module: nn.Module, old: TensorShapes, new: TensorShapes) -> dict[str, int | tuple[int, ...]]:
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
    for attribute in SIZE_ATTRIBUTES:
        stated = getattr(module, attribute, None)
        if not isinstance(stated, int):  # a parameter, or a layer, may have such a name too
            continue
        targets = {n for o, n in changes if o == stated}
        if len(targets) == 1 and stated not in still:
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
