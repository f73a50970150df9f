"""The tensors that a forward pass has made and still holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from intrafusion.network.modes import Mode

_SMALL = 2**14  # bytes: smaller ones are neither counted nor put away


class LiveTensors(Mode):
    """Sees the tensors that operations inside make: those with memory of their own, not views of what was there.

    Args:
        before: called with the tensors that each operation is about to read.
    """

    def __init__(self, before: Callable[[list[Tensor]], None]) -> None:
        super().__init__()
        self.before = before
        self.made: list[TensorWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.before(given)
        out = func(*args, **(kwargs or {}))
        read = {t.untyped_storage()._cdata for t in given if is_plain(t)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and is_plain(tensor) and tensor.untyped_storage()._cdata not in read:
                self.note(tensor)
        return out

    def note(self, tensor: Tensor) -> None:
        """One that was made out of sight."""
        if is_plain(tensor) and tensor.untyped_storage().nbytes() >= _SMALL:
            self.made.append(TensorWeakRef(tensor))

    def list_storages(self) -> list[torch.UntypedStorage]:
        """What is still there and can be emptied, each once; what NumPy looks at cannot."""
        alive = [(ref, t) for ref in self.made if (t := ref()) is not None]
        self.made = [ref for ref, _ in alive]
        storages = {s._cdata: s for _, t in alive if (s := t.untyped_storage()).resizable()}
        return list(storages.values())

    def count_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.list_storages())


def is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own kind, as fake, sparse and wrapped tensors have not."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
