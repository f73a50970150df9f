"""Watches a forward pass for what reads the output of a layer: its norm, a sum, an activation function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from intrafusion.network.layers import Layer, unseen_by_modes
from intrafusion.network.modes import Mode
from intrafusion.restore.activation import Activation

Unread = Sequence[tuple[Tensor, str]]
"""Tensors that nothing has read yet, and the layers that computed them."""


class UseWatcher(Mode):
    """Watches outputs of layers, through their norm, to the first operation that reads them.

    `before_sum(found, a, b)` is called before, `after_sum(found, total)` after each sum a + b of two tensors of equal
    shape of which at least one is such an output that nothing has read before. What `after_sum` returns is the layer
    whose output the sum is from there on.

    What functions computed with parameters is a matrix of rows, which is brought into the shape of a summand by moving
    it (`moves`): attention's output projection. Such a tensor stands for the output.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        *,
        before_sum: Callable[[Unread, Tensor, Tensor], None] | None = None,
        after_sum: Callable[[Unread, Tensor], str] | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.before_sum, self.after_sum = layers, before_sum, after_sum
        self.unread = WeakTensorKeyDictionary()  # outputs that nothing has read
        self.unread_sums = WeakTensorKeyDictionary()
        self.moves = WeakTensorKeyDictionary()  # of what is followed through moves, those that made it
        self.moved = WeakTensorKeyDictionary()  # of what was moved, what it became
        self.read_once = WeakTensorKeyDictionary()  # what one operation has read
        self.read_again: set[str] = set()
        self.found: dict[str, Activation] = {}
        self.reads: Counter[str] = Counter()  # how often that activation function did

    @property
    def activations(self) -> dict[str, Activation]:
        """By layer, the activation function that alone reads its output, its norm's, or the sum."""
        return {name: activation for name, activation in self.found.items() if name not in self.read_again}

    def watch(self, output: Tensor, name: str, *, moves: bool = False) -> None:
        """
        Args:
            moves: whether it is a matrix of rows, to be followed where it is moved.
        """
        self.unread[output] = name
        if moves and output.dim() == 2:
            self.moves[output] = _Moves(tuple(output.shape))

    def take_back(self, output: Tensor, total: Tensor) -> Tensor:
        """What has the shape of an output as it enters a sum, in the order of what the layer gave."""
        return self.moves[output].take_back(total) if output in self.moves else total

    def take_along(self, output: Tensor, given: Tensor) -> Tensor:
        """What a layer gives, moved as its output was before it enters a sum."""
        return self.moves[output].take_along(given) if output in self.moves else given

    def mark_read(self, outputs: Sequence[Tensor]) -> None:
        """What a network gives is read by whoever called it."""
        self.read_again.update(self.read_once[t] for t in outputs if t in self.read_once)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = dict.fromkeys(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        self.read_again.update(self.read_once[t] for t in tensors if t in self.read_once)
        for tensor in tensors:  # what was moved is read as it was, too
            if tensor in self.moved and (after := self.moved.pop(tensor)()) is not None:
                self.unread.pop(after, None)
        outputs = [(t, self.unread.pop(t)) for t in tensors if t in self.unread]
        totals = [(t, self.unread_sums.pop(t)) for t in tensors if t in self.unread_sums]
        added = bool(outputs) and _is_sum(func, args, kwargs)
        if added and self.before_sum is not None:
            self.before_sum(outputs, args[0], args[1])
        out = func(*args, **kwargs)
        for tensor, name in outputs + totals:
            if tensor is not out:  # else it was overwritten
                self.read_once[tensor] = name
        if added:
            if self.after_sum is not None:
                self.unread_sums[out] = self.after_sum(outputs, out)
        elif outputs and "batch_norm" in func._schema.name and self.layers[outputs[0][1]].norm is not None:
            self.watch(out[0] if isinstance(out, (tuple, list)) else out, outputs[0][1])
        elif outputs and func._schema.name in _MOVES and args[0] in self.moves:
            self.follow(args[0], outputs[0][1], out, self.moves[args[0]].then(func, args[1:], kwargs))
        elif (outputs or totals) and (activation := Activation.of(func, args, kwargs)) is not None:
            name = (outputs + totals)[0][1]
            self.reads[name] += self.found.setdefault(name, activation).is_same(activation)
        return out

    def follow(self, before: Tensor, name: str, out: Any, moves: _Moves) -> None:
        """An output was moved."""
        if isinstance(out, Tensor) and out is not before and moves.order is not None:
            self.unread[out], self.moves[out], self.moved[before] = name, moves, TensorWeakRef(out)


@dataclass(frozen=True, eq=False)
class _Moves:
    """What was done to a matrix of rows (k, c) that moves them and leaves channels last.

    Attributes:
        shape: (k, c).
        steps: function, arguments behind the tensor, and keyword arguments, one after another.
    """

    shape: tuple[int, ...]
    steps: tuple[tuple[Any, Sequence[Any], Mapping[str, Any]], ...] = ()

    def then(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Moves:
        return _Moves(self.shape, (*self.steps, (func, args, kwargs)))

    def take_along(self, rows: Tensor) -> Tensor:
        for func, args, kwargs in self.steps:
            rows = func(rows, *args, **kwargs)
        return rows

    @cached_property
    def order(self) -> Tensor | None:
        """Where each row is then, of all rows one after another; None where something else was done to them."""
        count, channels = self.shape
        with unseen_by_modes():
            try:
                rows = self.take_along(torch.arange(count)[:, None].expand(self.shape))
                own = self.take_along(torch.arange(channels).expand(self.shape))
            except RuntimeError:  # a view that an expanded tensor does not have
                return None
            if rows.shape[-1:] != (channels,) or not bool((own == torch.arange(channels)).all()):
                return None
            found, order = rows[..., 0].flatten().sort()
            return order if torch.equal(found, torch.arange(count)) else None

    def take_back(self, total: Tensor) -> Tensor:
        assert self.order is not None
        return total.flatten(0, -2)[self.order.to(total.device)]


_MOVES = tuple(
    f"aten::{name}"
    for name in ("view", "_unsafe_view", "transpose", "permute", "squeeze", "unsqueeze", "alias", "clone")
)


def _is_sum(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """a + b of two different tensors of one shape, in place or not."""
    if func._schema.name.rstrip("_") != "aten::add" or kwargs.get("alpha", 1) != 1 or len(args) != 2:
        return False
    a, b = args
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a is not b
