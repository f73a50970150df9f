"""Leaves a network as it was found: modes, buffers, and random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags, buffers and random state are restored afterwards, also on errors."""
    flags = [(m, m.training) for m in model.modules()]
    buffers = [(m, dict(m._buffers), {n: b.clone() for n, b in m._buffers.items() if b is not None}) for m, _ in flags]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for module, found, values in buffers:
                for name in set(module._buffers) - set(found):
                    del module._buffers[name]
                for name, buffer in found.items():
                    module._buffers[name] = buffer
                    if buffer is not None and not _same_bits(buffer, values[name]):
                        _put_back_(buffer, values[name])


def _put_back_(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """In the same memory where it still has the shape."""
    if buffer.shape == value.shape:
        buffer.data.copy_(value)
    else:
        buffer.data = value


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
