"""Weights that stay on disk until a layer runs, by Accelerate's empty weights and hooks."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from intrafusion.errors import IntrafusionError
from intrafusion.io.shards import Stored


def _import_accelerate(part: str = "") -> Any:
    try:
        return importlib.import_module(f"accelerate{part}")
    except ImportError as error:
        raise IntrafusionError(
            "a network block by block needs Accelerate: pip install 'intrafusion[transformers,train]'."
        ) from error


def make_skeleton(architecture: type, config: Any) -> nn.Module:
    """A network of transformers in evaluation mode whose parameters are float32 and hold nothing; buffers do."""
    with _import_accelerate().init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        skeleton: Any = architecture(config)
    skeleton.tie_weights()  # empty parameters were made one by one
    return skeleton.float().eval()


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
