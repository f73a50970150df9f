"""Watches a forward pass for its products: convolutions and matrix products, and the weights that enter them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.brief import show_briefly
from intrafusion.errors import watching
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.trace.dispatch import is_composite

Factors = tuple[int, ...]
"""Sizes of which the multiply-accumulates of one product are the product."""


@dataclass(frozen=True, eq=False)
class _Origins:
    """The parameters and buffers that a tensor was computed from, and from nothing that depends on the input.

    coordinates: for parameters that were asked for, the index along the dimension that was, of every element; as long
    as the tensor was only moved.
    """

    names: frozenset[str]
    coordinates: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Product:
    """One convolution or matrix product: how it was called, what it gave, what each of its two sides is made of.

    sides: activation or weight, in the order of the operation; a side that depends on the input has no origins.
    """

    func: Any
    args: Sequence[Any]
    out: Tensor
    factors: Factors
    sides: tuple[tuple[Tensor, _Origins | None], ...]

    __repr__ = show_briefly

    @property
    def contracted(self) -> tuple[int, int] | None:
        """The dimension of either side that is summed over; None where that is not just one, as in grouped layers."""
        name = self.func._schema.name
        if name in _MATRICES or name in _VECTORS:
            (a, _), (b, _) = self.sides
            return a.dim() - 1, max(0, b.dim() - 2)
        if name == "aten::convolution" and self.args[8] == 1:
            return 1, 0 if self.args[6] else 1
        return None

    @property
    def macs(self) -> int:
        return math.prod(self.factors)

    @property
    def weights(self) -> frozenset[str]:
        """The parameters and buffers on either side."""
        return frozenset().union(*(origins.names for _, origins in self.sides if origins is not None))


class Products(Mode):
    """Calls `seen(product)` for every convolution and matrix product of a forward pass that runs inside.

    Whole operations that are made of others (a linear layer in inference mode, an einsum) are taken apart. Enter it
    inside `decompose(model)` for attention and recurrent layers to come apart too.

    Args:
        tensors: parameters and buffers by name.
        inputs: what the network is called on.
        along: dimensions of parameters whose coordinates are to be followed, by name.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        inputs: Inputs,
        seen: Callable[[Product], None],
        along: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.seen, self.along = seen, along or {}
        self.names = {id(t): name for name, t in tensors.items()}
        self.origins = WeakTensorKeyDictionary()
        self.live = WeakTensorKeyDictionary()
        self.note_inputs(inputs)

    def note_inputs(self, inputs: Inputs) -> None:
        """The network is called on these: what depends on them is no weight."""
        self.live.update(dict.fromkeys(inputs.tensors(), True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        operands = dict.fromkeys(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        origins = {t: self._origins(t) for t in operands if t not in self.live}
        out = func(*args, **kwargs)
        factors = _factors_of(func, args, kwargs, out)
        if factors is not None:
            sides = tuple((t, origins.get(t)) for t in _sides_of(func, args))
            with watching():
                self.seen(Product(func, args, _first_of(out), factors, sides))
        made = {t: o for t, o in origins.items() if o is not None}
        with watching():
            self._follow((func, args, kwargs), out, operands, made)
        return out

    def _origins(self, tensor: Tensor) -> _Origins | None:
        known = self.origins.get(tensor)
        name = self.names.get(id(tensor))
        if known is None and name is not None:
            coordinates = {}
            if name in self.along and tensor.dim():
                dim = self.along[name]
                view = [-1 if d == dim else 1 for d in range(tensor.dim())]
                coordinates[name] = (
                    torch.arange(tensor.shape[dim], device=tensor.device).view(view).expand(tensor.shape)
                )
            known = self.origins[tensor] = _Origins(frozenset([name]), coordinates)
        return known

    def _follow(
        self, call: tuple[Any, Any, Any], out: Any, operands: Iterable[Tensor], made: Mapping[Tensor, _Origins]
    ) -> None:
        """Note of every output whether it depends on the input, or else what it was made from."""
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if any(t in self.live for t in operands):
            self.live.update(dict.fromkeys(outputs, True))
        elif made:
            names = frozenset().union(*(o.names for o in made.values()))
            coordinates = _moved_coordinates(call, outputs, made)
            for output, moved in zip(outputs, coordinates, strict=True):
                self.origins[output] = _Origins(names, moved)


def _moved_coordinates(
    call: tuple[Any, Any, Any], outputs: list[Tensor], made: Mapping[Tensor, _Origins]
) -> list[dict[str, Tensor]]:
    """The coordinates of each output, where weights were moved, or every element of one was changed for itself."""
    found: list[dict[str, Tensor]] = [{} for _ in outputs]
    name = call[0]._schema.name
    moves, changes = name in _MOVES, name in _CASTS or torch.Tag.pointwise in call[0].tags
    for tensor, origins in made.items() if moves or changes else ():
        for weight, own in origins.coordinates.items():
            moved = _move(call, tensor, own) if moves else [own] * len(outputs)
            for each, output, coordinates in zip(found, outputs, moved, strict=True):
                if output.shape == coordinates.shape:
                    each[weight] = coordinates
    return found


def _move(call: tuple[Any, Any, Any], tensor: Tensor, coordinates: Tensor) -> list[Tensor]:
    """The operation that moved a tensor, on its coordinates."""
    func, *given = call

    def run(by: Tensor) -> Any:
        args, kwargs = tree_map(lambda x: by if x is tensor else x, given)
        return func(*args, **kwargs)

    try:
        out = run(coordinates)
    except RuntimeError:  # a view that takes the memory layout of the weight
        out = run(coordinates.contiguous())
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


_CASTS = ("aten::_to_copy", "aten::clone", "aten::detach", "aten::alias", "aten::lift_fresh")
_MOVES = tuple(
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"),
        *("slice", "select", "split", "split_with_sizes", "unbind", "repeat", "flip", "index_select"),
    )
)


# ---- counting -------------------------------------------------------------------------------------------------------

_MATRICES = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addbmm")
_VECTORS = ("aten::mv", "aten::addmv", "aten::dot", "aten::vdot")


def _sides_of(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The tensors that are multiplied: two, of a bilinear layer three."""
    name, tensors = func._schema.name, [t for t in args if isinstance(t, Tensor)]
    if name in (*_MATRICES, *_VECTORS):
        return tensors[-2:]
    return tensors[: 3 if name == "aten::_trilinear" else 2]


def _factors_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Factors | None:
    """Sizes of which the multiply-accumulates are the product; None for an operation that is no product.

    Operations that PyTorch's flop counter knows count as there; those that it leaves out are counted here.
    """
    name, sides = func._schema.name, _sides_of(func, args)
    if name in _MATRICES:
        return (*sides[0].shape, sides[1].shape[-1])
    if name in _VECTORS:
        return tuple(sides[0].shape)
    if name == "aten::_trilinear":  # every output sums over both inputs
        return (_first_of(out).numel() // sides[1].shape[0], *sides[1].shape)
    if name == "aten::conv_tbc":
        return (*out.shape, *sides[1].shape[:2])
    formula = flop_registry.get(getattr(func, "_overloadpacket", None))
    if formula is None:
        return None
    macs = formula(*args, **kwargs, out_val=out) // 2
    factors = (*sides[0].shape, *sides[1].shape[1:]) if _is_transposed(name, args) else ()
    factors = factors or (*_first_of(out).shape, *sides[1].shape[1:])
    return factors if name == "aten::convolution" and math.prod(factors) == macs else (macs,)


def _is_transposed(name: str, args: Sequence[Any]) -> bool:
    return name == "aten::convolution" and bool(args[6])


def _first_of(out: Any) -> Tensor:
    return next(t for t in tree_leaves(out) if isinstance(t, Tensor))
