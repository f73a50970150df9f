"""Switches that make PyTorch take layers apart, so that every step of them is seen."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def decompose(model: nn.Module) -> Iterator[None]:
    """As `unfuse`, and attention in its mathematical form, so that every step is seen."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), unfuse(model):
        yield


@contextlib.contextmanager
def unfuse(model: nn.Module) -> Iterator[None]:
    """Attention layers and recurrent ones step by step, so that every product with a weight of theirs is seen."""
    with unfuse_attention(), _unfuse_recurrence(any(isinstance(m, nn.RNNBase) for m in model.modules())):
        yield


@contextlib.contextmanager
def unfuse_attention() -> Iterator[None]:
    """Attention layers step by step."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def _unfuse_recurrence(active: bool) -> Iterator[None]:
    """Recurrent layers step by step instead of in one kernel."""
    if not active:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flags' own getters warn on builds without the other backend
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield
