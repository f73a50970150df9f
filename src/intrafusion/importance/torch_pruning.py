"""Criteria of Torch-Pruning, on our groups. The package is imported only when such a criterion is called."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.arguments import Seed, checked
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGroup, Member, Role
from intrafusion.importance.observation import get_observed
from intrafusion.network.apart import forked_random_numbers

_ON_MODULES = ("accumulate_grad", "MatGradHandler", "compute_importance")  # of criteria that keep what they saw


@checked
@dataclass(frozen=True, repr=False)
class TorchPruning:
    """An object of `torch_pruning.importance`, or of a class derived from one, as a criterion.

    It is shown a Torch-Pruning group of stand-in layers that hold the group's own tensors, norms not folded, and with
    `gradients` also their `.grad`: the network itself is neither needed nor touched. Convolutions, transposed or not,
    are shown as nn.ConvNd, linear maps as nn.Linear, norms with running statistics as nn.BatchNorm, others as
    nn.LayerNorm. Random numbers it draws depend on `seed` and the group's name alone.

    Attributes:
        importance: called with a `torch_pruning.Group`.
        gradients: whether it reads `.grad`; None: if it is a Taylor criterion of Torch-Pruning.
        seed: for criteria that draw random numbers.

    Raises:
        TypeError: a criterion that gathers data from the modules of a network by itself (Hessian, OBD-C, activation).

    Reference: Fang et al. 2023 (DepGraph), https://github.com/VainF/Torch-Pruning.
    """

    importance: Any
    gradients: bool | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if any(hasattr(self.importance, name) for name in _ON_MODULES):
            raise RecipeError(
                f"importance: {type(self.importance).__qualname__} gathers data from the modules of a network by "
                "itself, which cannot be done here; take a Taylor criterion, or write a callable "
                "(group, weights, observations) -> (n,)."
            )

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={_value_label(v)}" for name, v in sorted(vars(self.importance).items()))
        return f"TorchPruning({type(self.importance).__qualname__}({settings}))"

    @property
    def reads_gradients(self) -> bool:
        return "Taylor" in " ".join(_lineage(self.importance)) if self.gradients is None else self.gradients

    @property
    def random(self) -> bool:
        return "torch_pruning.pruner.importance.RandomImportance" in _lineage(self.importance)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tensors", "gradients"} if self.reads_gradients else {"tensors"})

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        tensors = get_observed(observations, "tensors", self, group)
        gradients = get_observed(observations, "gradients", self, group) if self.reads_gradients else None
        rank = _channel_ranks(group)
        theirs = _as_their_group(group, tensors, gradients, rank)
        with forked_random_numbers():
            torch.default_generator.manual_seed(zlib.crc32(f"{self.seed} {group.name}".encode()))
            scores = self.importance(theirs)
        if scores is None:
            raise ModelError(f"group {group.name!r}: {self} finds no layer to score it by; exclude the group.")
        return scores.double()[: group.size][rank]


def is_torch_pruning(importance: object) -> bool:
    """Whether an object is of a class of Torch-Pruning or of one derived from it; imports nothing."""
    return not isinstance(importance, type) and any(n.startswith("torch_pruning.") for n in _lineage(importance))


def _lineage(importance: object) -> list[str]:
    return [f"{c.__module__}.{c.__qualname__}" for c in type(importance).__mro__]


def _value_label(value: Any) -> str:
    """Without addresses: the same criterion has the same label in every run."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value_label, value))}]"
    return value.__qualname__ if hasattr(value, "__qualname__") else repr(value)


def _channel_ranks(group: ChannelGroup) -> np.ndarray:
    """(n,): which of their channels each of ours is. Theirs are in the order of the first layer's indices."""
    first = group.members[0].positions.min(axis=1) if group.members else np.arange(group.size)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")


def _as_their_group(
    group: ChannelGroup, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None, rank: np.ndarray
) -> Any:
    """A `torch_pruning.Group` with one item per layer and role, in execution order.

    Indices ascend within an item: some of their criteria sort them, and forget which channel each belongs to.
    """
    from torch_pruning.dependency import Dependency, Group, Node

    found, previous = Group(), None
    for member, layer, handler in _stand_ins(group, tensors, gradients):
        node = Node(layer, None, member.module)
        places = member.positions.ravel()
        order = np.argsort(places, kind="stable")
        found.add_dep(Dependency(handler, handler, previous or node, node), places[order].tolist())
        found[-1].root_idxs = np.repeat(rank, member.positions.shape[1])[order].tolist()
        previous = node
    return found


def _stand_ins(
    group: ChannelGroup, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None
) -> Iterator[tuple[Member, nn.Module, Any]]:
    """A layer for every member that Torch-Pruning knows, and its function for what would be pruned of the layer."""
    from torch_pruning.pruner import function

    biases = {m.module: m for m in group.with_role(Role.SHIFTS) if tensors[m.tensor].dim() == 1}
    batch_norms = {m.module for m in group.with_role(Role.MEAN, Role.VARIANCE)}
    for member in group.members:
        kind = _pruning_kind(member, tensors[member.tensor].dim(), batch_norms)
        if kind is not None:
            bias = biases.get(member.module) if kind.endswith("_out") else None
            layer = _empty_layer(kind, _lay_out(member, kind, tensors[member.tensor]).shape, bias is not None)
            _put_tensor_(layer, "weight", member, kind, tensors, gradients)
            if bias is not None:
                _put_tensor_(layer, "bias", bias, kind, tensors, gradients)
            yield member, layer, getattr(function, f"prune_{kind}_channels")


def _pruning_kind(member: Member, dims: int, batch_norms: set[str]) -> str | None:
    """The middle of the name of Torch-Pruning's function for a member; None for biases, statistics and the like."""
    if member.roles & {Role.PRODUCES, Role.CONSUMES} and dims > 1:
        return ("conv" if dims > 2 else "linear") + ("_out" if Role.PRODUCES in member.roles else "_in")
    if Role.SCALES in member.roles:
        return (
            "depthwise_conv_out" if dims > 2 else "batchnorm_out" if member.module in batch_norms else "layernorm_out"
        )
    return None


def _lay_out(member: Member, kind: str, tensor: Tensor) -> Tensor:
    """The part of a tensor that the group runs through, outputs first and inputs second."""
    if member.within is not None and member.within.dim != member.dim:
        tensor = tensor.narrow(member.within.dim, member.within.start, member.within.stop - member.within.start)
    tensor = tensor.movedim(member.dim, 1 if kind.endswith("_in") else 0)
    return tensor.flatten(4) if tensor.dim() > 5 else tensor


def _empty_layer(kind: str, shape: torch.Size, bias: bool) -> nn.Module:
    """A layer whose weight has this shape; without memory, and without drawing random numbers."""
    if kind.startswith("batchnorm"):
        return nn.BatchNorm2d(shape[0], device="meta")
    if kind.startswith("layernorm"):
        return nn.LayerNorm(shape[0], bias=bias, device="meta")
    if kind.startswith("linear"):
        return nn.Linear(shape[1], shape[0], bias=bias, device="meta")
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    groups = shape[0] if kind.startswith("depthwise") else 1
    return convolution(shape[1] * groups, shape[0], tuple(shape[2:]), groups=groups, bias=bias, device="meta")


def _put_tensor_(
    layer: nn.Module,
    name: str,
    member: Member,
    kind: str,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None,
) -> None:
    """Give a layer a copy of a tensor, and of its gradient, 0 for what is no parameter (in place)."""
    precise = lambda t: _lay_out(member, kind, t).detach().to(torch.promote_types(t.dtype, torch.float32), copy=True)  # noqa: E731
    parameter = nn.Parameter(precise(tensors[member.tensor]), requires_grad=False)
    if gradients is not None:
        gradient = gradients.get(member.tensor)
        parameter.grad = torch.zeros_like(parameter) if gradient is None else precise(gradient)
    setattr(layer, name, parameter)
