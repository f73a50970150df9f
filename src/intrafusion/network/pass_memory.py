"""What a forward pass holds at a time, and so how many images go through at once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from intrafusion.errors import RecipeError
from intrafusion.network.batches import cast_like, count_images, name_inputs, take_images
from intrafusion.network.free_memory import describe_bytes
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import preserve_state

PASS = 2**28
"""Bytes that one pass holds, about: more at once is no faster, see `docs/restore.md`."""

_MOST = 256  # images at a time
_SHARE = 4  # of the memory for one pass: two networks, what is kept of each layer, and the work on it


def measure_pass(model: nn.Module, call: Inputs) -> int:
    """Bytes that the inputs and what is computed of them take at most, at one time, in a forward pass.

    Raises:
        ModelError: the network does not run on it.
    """
    call = cast_like(call, model)
    live = LiveBytes([*model.parameters(), *model.buffers(), *call.tensors()])
    with preserve_state(model), live:
        call.call(model)
    return max(1, live.peak + count_bytes(call))


def count_bytes(call: Inputs) -> int:
    """Of the arguments of a call; sparse ones, which are small, do not count."""
    return sum(t.nbytes for t in call.tensors() if t.layout is torch.strided)


def choose_size(model: nn.Module, call: Inputs, memory: int | None = None) -> int:
    """How many images go through the network at a time, a power of two.

    It depends on the network and the size of an image; on memory only where that was said.

    Args:
        call: some images, of which the first is tried.
        memory: bytes that may be taken; None: nothing was said.
    Raises:
        RecipeError: that is too little for one image.
        ModelError: the network does not run on one image.
    """
    one = take_images(call, 0, 1)
    each = measure_pass(model, one) if memory is None else check_memory(model, one, memory)
    room = PASS if memory is None else min(PASS, memory // _SHARE)
    return 2 ** int(math.log2(min(_MOST, max(1, room // each))))


def check_memory(model: nn.Module, call: Inputs, memory: int) -> int:
    """What `measure_pass` gives of a call that cannot be made smaller.

    Raises:
        RecipeError: the memory is too little for it.
        ModelError: the network does not run on it.
    """
    taken, count = measure_pass(model, call), count_images(call)
    if memory < _SHARE * taken:
        what = (
            f"one of the {name_inputs(call)} takes" if count == 1 else f"a batch of {count}, which cannot be cut, takes"
        )
        raise RecipeError(
            f"memory: expected at least {describe_bytes(_round_up(_SHARE * taken))}, as {what} "
            f"{describe_bytes(taken)} in a forward pass of this network, got {describe_bytes(memory)}."
        )
    return taken


def take_fitting(model: nn.Module, call: Inputs, memory: int) -> Inputs:
    """As many of the images, at least two, as can go through at once.

    Raises:
        RecipeError: the memory is too little for two.
        ModelError: the network does not run on two.
    """
    each = check_memory(model, take_images(call, 0, 2), memory) / 2
    return take_images(call, 0, max(2, int(memory / _SHARE / each)))


def _round_up(count: int) -> int:
    """To three digits, so that it is enough also as it is shown."""
    step = 10 ** max(0, len(str(count)) - 3)
    return -(-count // step) * step


class LiveBytes(Mode):
    """Counts the bytes of what tensors lie in that are made inside and alive.

    Args:
        before: tensors that were there already.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = weakref.WeakSet[torch.UntypedStorage](filter(None, map(_find_storage, before)))
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = _find_storage(tensor)
        if storage is None or storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


def _find_storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """None of tensors that lie nowhere, or not in one piece."""
    try:
        return None if tensor.is_meta else tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
