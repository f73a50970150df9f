"""Watches a forward pass for what reads the output of a layer: its norm, a sum, an activation function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.network.layers import Layer
from intrafusion.restore.activation import Activation

Unread = Sequence[tuple[Tensor, str]]
"""Tensors that nothing has read yet, and the layers that computed them."""


class UseWatcher(TorchDispatchMode):
    """Watches outputs of layers, through their norm, to the first operation that reads them.

    `before_sum(found, a, b)` is called before, `after_sum(found, total)` after each sum a + b of two tensors of equal
    shape of which at least one is such an output that nothing has read before. What `after_sum` returns is the layer
    whose output the sum is from there on.
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
        self.read_once = WeakTensorKeyDictionary()  # what one operation has read
        self.read_again: set[str] = set()
        self.found: dict[str, Activation] = {}
        self.reads: Counter[str] = Counter()  # how often that activation function did

    @property
    def activations(self) -> dict[str, Activation]:
        """By layer, the activation function that alone reads its output, its norm's, or the sum."""
        return {name: activation for name, activation in self.found.items() if name not in self.read_again}

    def watch(self, output: Tensor, name: str) -> None:
        self.unread[output] = name

    def mark_read(self, outputs: Sequence[Tensor]) -> None:
        """What a network gives is read by whoever called it."""
        self.read_again.update(self.read_once[t] for t in outputs if t in self.read_once)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = dict.fromkeys(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        self.read_again.update(self.read_once[t] for t in tensors if t in self.read_once)
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
        elif (outputs or totals) and (activation := Activation.of(func, args, kwargs)) is not None:
            name = (outputs + totals)[0][1]
            self.reads[name] += self.found.setdefault(name, activation).is_same(activation)
        return out


def _is_sum(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """a + b of two different tensors of one shape, in place or not."""
    if func._schema.name.rstrip("_") != "aten::add" or kwargs.get("alpha", 1) != 1 or len(args) != 2:
        return False
    a, b = args
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a is not b
