"""Torch-Pruning as its authors run it in their examples.

By magnitude, one ratio for all layers, the output layers ignored, the number of heads of every attention given, and the
attributes of attention set right afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .family import Call, Family, call

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_PROJECTIONS = (
    ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"), ("qkv",), ("query_key_value",), ("qkv_proj",), ("Wqkv",),
)  # fmt: skip
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "num_attn_heads", "n_head")


def prune(model: nn.Module, inputs: Call, family: Family, ratio: float = 0.5) -> nn.Module:
    """The network pruned by Torch-Pruning, in place."""
    import torch_pruning as tp

    attentions = find_attentions(model)
    example: Any = inputs
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=find_output_layers(model, inputs, family),
        num_heads={layer: heads for _, layers in attentions for layer, heads in layers},
        prune_num_heads=family.whole_heads,
        prune_head_dims=not family.whole_heads,
        head_pruning_ratio=ratio if family.whole_heads else 0.0,
        in_channel_groups={},
        out_channel_groups={},
        output_transform=lambda out: sum(t.sum() for t in family.wanted(out) if t.is_floating_point()),
    )
    for group in pruner.step(interactive=True) or ():
        group.prune()
    for module, layers in attentions:
        _set_sizes(module, [layer for layer, _ in layers], pruner.num_heads)
    return model


def find_output_layers(model: nn.Module, inputs: Call, family: Family) -> list[nn.Module]:
    """The layers whose outputs are, as they are or as views, outputs of the network."""
    made: dict[int, nn.Module] = {}
    kept: list[Tensor] = []

    def note(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            kept.append(out)  # so that its memory is not used again
            made[out.untyped_storage().data_ptr()] = module

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, _LAYERS)]
    with torch.no_grad():
        found = [made.get(t.untyped_storage().data_ptr()) for t in family.wanted(call(model, inputs))]
    for handle in handles:
        handle.remove()
    return [m for m in dict.fromkeys(found) if m is not None]


def find_attentions(model: nn.Module) -> list[tuple[nn.Module, list[tuple[nn.Module, int]]]]:
    """Modules with layers for queries, keys and values, and how many heads each of these layers has."""
    found = []
    for module in model.modules():
        names = next((p for p in _PROJECTIONS if all(isinstance(getattr(module, n, None), nn.Linear) for n in p)), ())
        config = getattr(module, "config", None)
        heads = next((h for o in (module, config) for a in _HEADS if isinstance(h := getattr(o, a, None), int)), None)
        if names and heads:
            keys = getattr(config, "num_key_value_heads", None) or getattr(module, "num_key_value_heads", None) or heads
            layers = [getattr(module, n) for n in names]
            found.append((module, [(x, heads if i == 0 else keys) for i, x in enumerate(layers)]))
    return found


def _set_sizes(module: nn.Module, layers: list[Any], heads_of: dict[nn.Module, int]) -> None:
    """The attributes from which attention takes its sizes, as in their examples."""
    width, heads = layers[0].out_features // (3 if len(layers) == 1 else 1), heads_of[layers[0]]
    sizes = dict.fromkeys(_HEADS, heads) | {
        "attention_head_size": width // heads,
        "head_dim": width // heads,
        "key_value_proj_dim": width // heads,
        "all_head_size": width,
        "inner_dim": width,
        "attn_dim": width,
    }
    if len(layers) > 1:
        sizes |= {"num_key_value_heads": heads_of[layers[1]], "num_key_value_groups": heads // heads_of[layers[1]]}
    for name, value in sizes.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
