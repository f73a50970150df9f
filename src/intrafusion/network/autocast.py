"""Autocast is for what a network computes, not for what is solved of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType

import torch

_FORWARD: ContextVar[Mapping[str, torch.dtype]] = ContextVar("autocast", default=MappingProxyType({}))
"""By device, what numbers become in the forward inside of which something is computed apart."""


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """What is computed inside has the precision of its operands."""
    accelerator = torch.accelerator.current_accelerator()
    devices = [d for d in ("cpu", *([accelerator.type] if accelerator else [])) if torch.is_autocast_enabled(d)]
    token = _FORWARD.set({device: torch.get_autocast_dtype(device) for device in devices})
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)
        _FORWARD.reset(token)


@contextlib.contextmanager
def as_in_forward() -> Iterator[None]:
    """Around a layer that is run once more, directly inside of `without_autocast`: in autocast where the forward is.

    Its weight may be another by now, so that what autocast has kept of it is not used.
    """
    with contextlib.ExitStack() as stack:
        for device, dtype in _FORWARD.get().items():
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield
