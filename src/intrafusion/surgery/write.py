"""New tensors into a network: its parameters keep their identity, its attributes follow the new shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intrafusion.network.computed import compute_anew_
from intrafusion.network.tensors import named_tensors
from intrafusion.surgery.numbers import write_number_


@dataclass(frozen=True)
class Repair:
    """A module attribute that had to follow the new shapes, such as a convolution's out_channels.

    attribute: its name, or the place of a number in it, such as "sizes.1" or "cfg.dim"; see `numbers`.
    """

    module: str
    attribute: str
    old: int | tuple[int, ...]
    new: int | tuple[int, ...]


def write_weights_(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[Repair, ...]:
    """Put new tensors into a network, in place, and let the attributes of their modules follow.

    Parameters keep their identity: ties, requires_grad, hooks and optimizer references survive; gradients of another
    shape are dropped. A forward pass from before can no longer be differentiated, the next one can.
    """
    tensors = named_tensors(model)
    shapes = {name: tuple(tensors[name].shape) for name in weights}
    for name, value in weights.items():
        target = tensors[name]
        put_data_(target, value)
        if target.grad is not None and target.grad.shape != value.shape:
            target.grad = None
    changed = {name for name, shape in shapes.items() if shape != tuple(weights[name].shape)}
    repairs = find_repairs(model, {id(tensors[name]): shapes[name] for name in changed})
    make_repairs_(model, repairs)
    compute_anew_(model)
    return repairs


@contextlib.contextmanager
def weights_written(
    model: nn.Module, weights: Mapping[str, Tensor], numbers: tuple[Repair, ...] = ()
) -> Iterator[None]:
    """As `write_weights_`, and these repairs, as long as this lasts; afterwards the network is as it was."""
    tensors = named_tensors(model)
    own = {name: tensors[name].data for name in weights}
    repairs = (*write_weights_(model, weights), *numbers)
    make_repairs_(model, numbers)
    try:
        yield
    finally:
        for name, value in own.items():
            put_data_(tensors[name], value)
        make_repairs_(model, tuple(replace(repair, new=repair.old) for repair in repairs))


def put_data_(target: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer other values, which may have another shape.

    While a graph of an old forward pass is alive, autograd goes on with the node that gathers the gradients of the old
    shape; only a change of the dtype makes it forget that node.
    """
    if target.shape != value.shape and target.is_leaf and target.requires_grad:
        other = torch.float32 if target.dtype == torch.float64 else torch.float64
        target.data = torch.empty(0, dtype=other, device=value.device)
    target.data = value


def make_repairs_(model: nn.Module, repairs: tuple[Repair, ...]) -> None:
    modules = dict(model.named_modules())
    for repair in repairs:
        write_number_(modules[repair.module], repair.attribute, repair.new)


def find_repairs(model: nn.Module, old_shapes: Mapping[int, tuple[int, ...]]) -> tuple[Repair, ...]:
    """Attributes that disagree with the new shapes of their own module's tensors."""
    repairs = []
    for name, module in model.named_modules():
        own = find_own_tensors(module)
        old = {k: old_shapes.get(id(t), tuple(t.shape)) for k, t in own.items()}
        if not any(id(t) in old_shapes for t in own.values()):
            continue
        for attribute, value in find_attributes(module, old, {k: tuple(t.shape) for k, t in own.items()}).items():
            present = getattr(module, attribute)
            if present != value:
                repairs.append(Repair(name, attribute, present, value))
    return tuple(repairs)


def find_own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module itself, and those that a parametrization computes them from."""
    own = {k: t for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if parametrize.is_parametrized(module):
        sources = module.get_submodule("parametrizations")
        own.update(sources.named_parameters())
        own.update({name: getattr(module, name) for name, _ in sources.named_children()})
    return own


_TensorShapes = Mapping[str, tuple[int, ...]]


_SIZE_ATTRIBUTES = (
    *("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "num_parameters"),
    *("embedding_dim", "num_embeddings", "embed_dim", "input_size", "hidden_size", "hidden_dim"),
    *("nf", "nx", "channels", "dim", "width"),
)


_KERNELS = ("weight", "weight_orig", "weight_v")  # plain; behind a pruning mask or spectral norm; behind weight norm


def find_attributes(module: nn.Module, old: _TensorShapes, new: _TensorShapes) -> dict[str, int | tuple[int, ...]]:
    """What the size attributes of a module must be, from the shapes of its tensors."""
    kernel = next((k for k in _KERNELS if k in new), "weight")
    if isinstance(module, nn.modules.conv._ConvNd):
        return _find_convolution_attributes(module, old[kernel], new[kernel])
    if isinstance(module, nn.Linear):
        return {"in_features": new[kernel][1], "out_features": new[kernel][0]}
    if isinstance(module, nn.RNNBase):
        return {"input_size": new["weight_ih_l0"][1], "hidden_size": new["weight_hh_l0"][1]}
    if isinstance(module, nn.MultiheadAttention):
        return _find_attention_attributes(module, new)
    if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels and "weight" in new:
        return dict.fromkeys(("num_groups", "num_channels"), new["weight"][0])  # one channel to each group stays so
    found: dict[str, int | tuple[int, ...]] = {}
    if "weight" in old and getattr(module, "normalized_shape", None) == old["weight"]:
        found["normalized_shape"] = new["weight"]
    changes = {(o, n) for k in old for o, n in zip(old[k], new[k], strict=True) if o != n}
    still = {o for k in old for o, n in zip(old[k], new[k], strict=True) if o == n}
    for attribute in _SIZE_ATTRIBUTES:
        stated = getattr(module, attribute, None)
        if not isinstance(stated, int):  # a parameter, or a layer, may have such a name too
            continue
        targets = {n for o, n in changes if o == stated}
        if len(targets) == 1 and stated not in still:
            found[attribute] = targets.pop()
    return found


def _find_convolution_attributes(
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


def _find_attention_attributes(module: nn.MultiheadAttention, new: _TensorShapes) -> dict[str, int | tuple[int, ...]]:
    shared = "in_proj_weight" in new
    width, keys, values = (new["in_proj_weight" if shared else f"{x}_proj_weight"][1] for x in "qkv")
    return {"embed_dim": width, "kdim": keys, "vdim": values, "head_dim": width // module.num_heads}
