"""A convolution or linear layer as two thinner ones, and a network rebuilt with such from their ranks alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intrafusion.errors import ModelError, PlanError
from intrafusion.graph import ChannelGraph
from intrafusion.network.double import TOLERANCE, copy_as_double, output_difference, run_in_double
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import copy_model

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRank(nn.Sequential):
    """`reduce`, with the kernel of the layer it stands for, then `expand`, 1 x 1, with its bias.

    A convolution with groups has `rank` channels between the two for each of its groups.
    """

    reduce: nn.Module
    expand: nn.Module

    def __init__(self, reduce: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.add_module("reduce", reduce)
        self.add_module("expand", expand)

    @property
    def rank(self) -> int:
        weight = self.reduce.weight
        assert isinstance(weight, Tensor)
        return len(weight) // int(getattr(self.reduce, "groups", 1))


def is_splittable(module: nn.Module) -> bool:
    """Whether a layer is of a type that can be split: exactly a linear layer or a convolution, no subclass of one."""
    return type(module) in (nn.Linear, *_CONVOLUTIONS)


def make_low_rank(layer: nn.Module, rank: int) -> LowRank:
    """Two layers, on the device and in the dtype of the one they stand for, with weights of zeros.

    The first has its stride, padding, padding mode and dilation; both have its groups.

    Raises:
        PlanError: not a layer that can be split.
    """
    if not is_splittable(layer):
        raise PlanError(f"a {type(layer).__name__} cannot be split into two layers of lower rank.")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    place: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}  # where nothing is drawn to begin with
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        pair = nn.Linear(layer.in_features, rank, False, **place), nn.Linear(rank, layer.out_features, bias, **place)
    else:
        assert isinstance(layer, _CONVOLUTIONS)
        kind: Any = type(layer)
        same = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(layer, name) for name in same}
        between = rank * layer.groups
        pair = (
            kind(layer.in_channels, between, bias=False, **options, **place),
            kind(between, layer.out_channels, 1, groups=layer.groups, bias=bias, **place),
        )
    split = LowRank(*pair).train(layer.training).to_empty(device=weight.device)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.zero_()
            parameter.requires_grad_(weight.requires_grad)
    return split


def split_layers_(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put a `LowRank` with weights of zeros in the place of each of these layers (in place).

    Raises:
        PlanError: a name or a rank that is none of this network.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        _check_splittable(modules, name)
        if type(rank) is not int or rank < 1:
            raise PlanError(f"{name}: expected a rank of at least 1, got {rank!r}.")
    for name, rank in ranks.items():
        replace_module_(model, name, make_low_rank(modules[name], rank))


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module, also where several names lead to it (in place)."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = module
                if parent.__dict__.get(key) is old:
                    parent.__dict__[key] = module


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Rank of every `LowRank` of a network, by name."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRank)}


# ---- which layers ---------------------------------------------------------------------------------------------------


def explain_unsplit(model: nn.Module) -> dict[str, str | None]:
    """Why layers cannot become two thinner ones that save weights, by name; None for those that can.

    Told of every module with a weight that maps channels to others: convolutions, linear layers, embeddings, attention.
    """
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    pairs = ranks_of(model)
    return {
        name: _explain_unsplit(model, name, module, owners, pairs)
        for name, module in model.named_modules()
        if any(t.dim() > 1 for t in module.parameters(recurse=False))
    }


def _explain_unsplit(
    model: nn.Module, name: str, layer: nn.Module, owners: Mapping[int, int], pairs: Mapping[str, int]
) -> str | None:
    if why := explain_unreadable(model, name, layer, owners):
        return why
    if name.rpartition(".")[0] in pairs:
        return "it is one of the two that a layer was split into already"
    if getattr(layer, "groups", 1) > 1:
        return "its groups read few channels each, so that two layers save little"
    if not find_largest_rank(*count_sides(layer)):
        return "even rank 1 saves no weights"
    return None


def explain_unreadable(model: nn.Module, name: str, layer: nn.Module, owners: Mapping[int, int]) -> str | None:
    """Why a layer's weight is not its own to be replaced; None where it is.

    Args:
        owners: how many modules hold a parameter, by its id.
    """
    weight = layer._parameters.get("weight")
    if parametrize.is_parametrized(layer) or (weight is None and is_splittable(layer)):
        return "its weight is computed from others (weight or spectral norm)"
    if not name or not is_splittable(layer) or weight is None:
        return f"a {type(layer).__name__} is no plain convolution or linear layer"
    if owners[id(weight)] > 1:
        return "another layer shares its weight"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return "the module around it reads its weight itself"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "hooks hang on it"
    return None


def count_sides(layer: nn.Module) -> tuple[int, int]:
    """Outputs c and inputs d of one output: the shape of the matrix that a layer without groups multiplies by."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return len(weight), weight[:1].numel()


def find_largest_rank(outputs: int, inputs: int) -> int:
    """The largest rank that saves weights, r (c + d) < c d; 0 if none does.

    >>> find_largest_rank(64, 576), find_largest_rank(10, 10), find_largest_rank(1, 100)
    (57, 4, 0)
    """
    return min(outputs, inputs, (outputs * inputs - 1) // (outputs + inputs))


# ---- two layers that give the same ----------------------------------------------------------------------------------


def split_exactly(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy with two layers of full rank, which give the same together, in the place of each of these.

    One of the two is the identity, so nothing is rounded. All other tensors are those of the network, not copies.
    Layers that are split already stay.

    Raises:
        PlanError: no layer of that name that can be split.
    """
    new = copy_model(model, share=True)
    modules = dict(new.named_modules())
    for name in names:
        if not isinstance(modules.get(name), LowRank):
            _check_splittable(modules, name)
            replace_module_(new, name, _make_exact(modules[name]))
    return new


def _check_splittable(modules: Mapping[str, nn.Module], name: str) -> None:
    if not name or name not in modules or not is_splittable(modules[name]):
        raise PlanError(f"the network has no convolution or linear layer {name!r} to split.")


@torch.no_grad()
def _make_exact(layer: nn.Module) -> LowRank:
    """The layer and an identity behind it, or before it where it has fewer inputs than outputs."""
    outputs, inputs = count_sides(layer)
    split = make_low_rank(layer, min(outputs, inputs))
    dense, first, last = (m.weight for m in (layer, split.reduce, split.expand))
    assert isinstance(dense, Tensor)
    assert isinstance(first, Tensor)
    assert isinstance(last, Tensor)
    unit = torch.eye(min(outputs, inputs)).to(dense)
    first.copy_((unit if outputs > inputs else dense).reshape(first.shape))
    last.copy_((dense if outputs > inputs else unit).reshape(last.shape))
    bias, own = layer.bias, split.expand.bias
    if isinstance(bias, Tensor) and isinstance(own, Tensor):
        own.copy_(bias)
    return split


def split_provably(
    model: nn.Module, names: Iterable[str], inputs: Inputs, graph: ChannelGraph
) -> tuple[nn.Module, tuple[str, ...]]:
    """`split_exactly`, of those layers for which the network then gives the same in float64, all ways through it.

    Args:
        graph: of the network.
    Returns:
        the network, and the layers that are split in it.
    """
    run = lambda m: run_in_double(copy_as_double(m), inputs, graph.calls, ways=graph.ways)  # noqa: E731
    names, expected = tuple(names), run(model)

    def holds(some: tuple[str, ...]) -> bool:
        try:
            found = run(split_exactly(model, some))
        except ModelError:  # code around the layer reads what it is
            return False
        return len(found) == len(expected) and output_difference(found, expected) <= TOLERANCE

    if not holds(names):
        names = tuple(name for name in names if holds((name,)))
        names = names if holds(names) else ()
    return (split_exactly(model, names) if names else model), names


def shapes_when_split(shapes: Mapping[str, tuple[int, ...]], split: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors once these layers are split at these ranks.

    >>> shapes_when_split({"a.weight": (6, 4, 3, 3), "a.bias": (6,)}, {"a": 6})
    {'a.reduce.weight': (6, 4, 3, 3), 'a.expand.weight': (6, 6, 1, 1), 'a.expand.bias': (6,)}
    """
    return {new: there for name, shape in shapes.items() for new, there in _list_shapes(name, shape, split)}


def _list_shapes(name: str, shape: tuple[int, ...], split: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    layer, _, part = name.rpartition(".")
    if layer not in split:
        yield name, shape
    elif part == "bias":
        yield f"{layer}.expand.bias", shape
    else:
        yield f"{layer}.reduce.weight", (split[layer], *shape[1:])
        yield f"{layer}.expand.weight", (shape[0], split[layer], *(1 for _ in shape[2:]))
