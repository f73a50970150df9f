"""Along which dimension images run in the rows of products with parameters, where sizes alone do not tell."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import cast_like, pick_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.observe.bare import BareLayer, BareWatcher
from intrafusion.trace.decomposition import unfuse

_COUNTS = (2, 3)


def find_image_dims(model: nn.Module, graph: ChannelGraph, call: Inputs, owned: Collection[str] = ()) -> dict[str, int]:
    """Of `BareLayer.lead`, the dimension that grows with the number of images, by layer.

    The first image goes through twice and three times at once: a batch may have as many images as texts have tokens.
    Nothing of a network that does not run on them.

    Args:
        owned: weights that are those of layers; without others nothing runs.
    """
    if not any(t.dim() > 1 for name, t in named_tensors(model).items() if name not in owned):
        return {}
    try:
        leads = [_list_leads(model, graph, pick_images(call, torch.zeros(n, dtype=torch.long))) for n in _COUNTS]
    except ModelError:
        return {}
    found = {name: _find_changed(lead, leads[1].get(name, ())) for name, lead in leads[0].items()}
    return {name: dim for name, dim in found.items() if dim is not None}


def _list_leads(model: nn.Module, graph: ChannelGraph, call: Inputs) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def called(layer: BareLayer, *_: object) -> None:
        found.setdefault(layer.name, layer.lead)

    watcher = BareWatcher(model, graph, (), called=called)
    watcher.begin()
    with preserve_state(model), unfuse(model), watcher:
        replace(cast_like(call, model), weights=None).call(model)
    return found


def _find_changed(lead: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """The one dimension in which two shapes differ.

    >>> _find_changed((7, 2), (7, 3)), _find_changed((2, 4), (3, 6)), _find_changed((2, 7), (3,))
    (1, None, None)
    """
    changed = [d for d, (a, b) in enumerate(zip(lead, other, strict=False)) if a != b]
    return changed[0] if len(lead) == len(other) and len(changed) == 1 else None
