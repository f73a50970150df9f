"""Weights that stay on disk until a layer runs, by Accelerate's empty weights and hooks."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from intrafusion.errors import IntrafusionError
from intrafusion.io.shards import Stored
from intrafusion.network.apart import forked_random_numbers


def _import_accelerate(part: str = "") -> Any:
    try:
        return importlib.import_module(f"accelerate{part}")
    except ImportError as error:
        raise IntrafusionError(
            "a network block by block needs Accelerate: pip install 'intrafusion[transformers,train]'."
        ) from error


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` gives tensors on meta.

    Accelerate drops each parameter as soon as it is made, but the C library does not use such aligned holes again: the
    private memory of the process, not what is resident, would grow to the size of the network.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def make_skeleton(architecture: type, config: Any) -> nn.Module:
    """A network of transformers in evaluation mode whose parameters are float32 and hold nothing; buffers do."""
    skeleton = _build_empty(architecture, config, _EmptyOnMeta())
    if any(buffer.is_meta for buffer in skeleton.buffers()):  # one that was made empty and filled
        skeleton = _build_empty(architecture, config, contextlib.nullcontext())
    skeleton.tie_weights()  # empty parameters were made one by one
    return skeleton.float().eval()


def _build_empty(architecture: type, config: Any, mode: contextlib.AbstractContextManager[Any]) -> Any:
    empty = _import_accelerate().init_empty_weights(include_buffers=False)
    with forked_random_numbers(), empty, mode:  # one thread at a time: modules of all threads are made empty meanwhile
        return architecture(config)


@contextlib.contextmanager
def weights_from_disk(skeleton: Any, places: Mapping[str, tuple[str, Stored]]) -> Iterator[None]:
    """As long as this lasts, every layer reads its weights when it runs, and drops them behind itself.

    Args:
        places: by name in the network, the name in the file, and the file.
    """
    hooks, offload = _import_accelerate(".hooks"), _import_accelerate(".utils.offload")
    index = {n: {"safetensors_file": str(s.file), "weight_name": stored} for n, (stored, s) in places.items()}
    weights = offload.OffloadedWeightsLoader(index=index)
    hooks.attach_align_device_hook(skeleton, torch.device("cpu"), offload=True, weights_map=weights)
    try:
        yield
    finally:
        hooks.remove_hook_from_submodules(skeleton)
        skeleton.tie_weights()  # the hooks replace every parameter
