"""How much memory one forward call needs: weights, and what is alive of results at the worst moment."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._pytree import tree_leaves

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.trace.dispatch import is_composite

_MB = 1e6

Result = tuple[int, ...]
"""The sizes of which the bytes of a result are the product: its shape, and the bytes of one entry."""


@checked
def memory_mb(model: nn.Module, example_inputs: ExampleInputs) -> float:
    """Megabytes (10^6 bytes) that a network and one forward call of it need, in evaluation mode without gradients.

    All parameters and buffers, and of the inputs and of what operations make the most that is alive at once: a result
    counts from the operation that makes it until nothing refers to it any more, its views and what is written into it
    count once. Counted, not timed or sampled, and the same on every device; what kernels use inside themselves, and
    what an allocator rounds up, is not in it, nor are sparse tensors.

    >>> import torch
    >>> memory_mb(nn.Linear(100, 50), torch.zeros(10, 100))  # 4 bytes of 100 * 50 + 50, 10 * 100 and 10 * 50 entries
    0.0262
    """
    return (weigh(model) + list_live_results(model, example_inputs).most) / _MB


def weigh(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = [s for t in named_tensors(model).values() if (s := _find_storage(t)) is not None]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


@dataclass(frozen=True, eq=False)
class Live:
    """What a forward call makes.

    Attributes:
        results: everything that was made, inputs first.
        moments: which of them are alive together, those sets that are part of no other.
    """

    results: Sequence[Result]
    moments: Sequence[frozenset[int]]

    __repr__ = show_briefly

    @property
    def most(self) -> int:
        """Bytes at the worst moment."""
        return max((self.bytes_at(moment) for moment in self.moments), default=0)

    def bytes_at(self, moment: frozenset[int]) -> int:
        return sum(math.prod(self.results[index]) for index in moment)


def list_live_results(model: nn.Module, example_inputs: ExampleInputs) -> Live:
    """The results of one forward call, and which are alive together.

    Raises:
        ModelError: the network does not run on these inputs.
    """
    inputs = Inputs.of(example_inputs)
    watch = _LiveResults((*named_tensors(model).values(), *inputs.tensors()))
    with preserve_state(model), watch:
        inputs.call(model)  # on a copy, which is what counts
    return Live(tuple(watch.results), _find_largest(watch.moments))


def _find_largest(moments: Sequence[frozenset[int]]) -> tuple[frozenset[int], ...]:
    """Those that are part of no other; each begins with the making of its last result, so neighbours tell."""
    return tuple(a for a, b in zip(moments, (*moments[1:], frozenset()), strict=True) if not a <= b)


class _LiveResults(Mode):
    """Follows every storage that is made inside, from the operation that makes it until it is freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.results: list[Result] = []
        self.moments: list[frozenset[int]] = []
        self._known = {s._cdata for t in known if (s := _find_storage(t)) is not None}
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        fresh = [self._note(t) for t in tree_leaves(out) if isinstance(t, Tensor)]  # each of them, not up to the first
        if any(fresh):
            self.moments.append(frozenset(index for index, _ in self._live.values()))
        return out

    def _note(self, tensor: Tensor) -> bool:
        """Whether it is something new."""
        storage = _find_storage(tensor)
        key = 0 if storage is None else storage._cdata
        if storage is None or not storage.nbytes() or key in self._known or key in self._live:
            return False
        self._live[key] = len(self.results), weakref.ref(storage, lambda _: self._live.pop(key, None))
        self.results.append(_describe(tensor, storage.nbytes()))
        return True


def _find_storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """None of a tensor that has none of its own, such as a sparse one."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else None


def _describe(tensor: Tensor, size: int) -> Result:
    entry = tensor.element_size()
    return (*tensor.shape, entry) if tensor.numel() * entry == size else (size // entry, entry)
