"""Watches a forward pass for sums that the output of a layer enters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.restore.layers import Layer

Followed = Sequence[tuple[Tensor, str]]
"""Tensors and the layers that computed them."""


class Sums(TorchDispatchMode):
    """Follows outputs of layers, through their norm, to the first operation that reads them.

    `before(found, a, b)` is called before, `after(found, total)` after each sum a + b of two tensors of equal shape of
    which at least one is such an output that nothing has read before.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        *,
        before: Callable[[Followed, Tensor, Tensor], None] | None = None,
        after: Callable[[Followed, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.before, self.after = layers, before, after
        self.followed = WeakTensorKeyDictionary()

    def follow(self, output: Tensor, name: str) -> None:
        self.followed[output] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t in self.followed]
        if not read:
            return func(*args, **kwargs)
        found = [(t, self.followed.pop(t)) for t in dict.fromkeys(read)]
        if not is_sum(func, args, kwargs):
            out = func(*args, **kwargs)
            if "batch_norm" in func._schema.name and self.layers[found[0][1]].norm is not None:
                self.follow(out[0] if isinstance(out, (tuple, list)) else out, found[0][1])
            return out
        if self.before is not None:
            self.before(found, args[0], args[1])
        out = func(*args, **kwargs)
        if self.after is not None:
            self.after(found, out)
        return out


def is_sum(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """a + b of two different tensors of one shape, in place or not."""
    if func._schema.name.rstrip("_") != "aten::add" or kwargs.get("alpha", 1) != 1 or len(args) != 2:
        return False
    a, b = args
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a is not b
