"""What is in no group is said: with the groups, every side of every layer is accounted for."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from gallery import CASES
from torch import Tensor, nn

import intrafusion
from intrafusion.graph import ChannelGraph, FixedSide, describe_fixed
from intrafusion.trace import trace

NAMES = ["vgg", "densenet", "selective_kernel", "split_attention", "vision_transformer", "attention_by_hand"]
NAMES += [
    "embedding_untied",
    "spatial_attention",
    "unused_layer",
    "concat_with_the_input",
    "bags_of_words",
    "one_channel",
]
NAMES += [
    "experts_by_einsum",
    "squeeze_excite_with_views",
    "through_numpy",
    "bilinear_layer",
    "film",
    "swiglu",
    "densenet",
]
LAYERS = (
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
)
LAYERS += (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)

several = [case for case in CASES if case.name in NAMES]


def test_enough_networks_are_looked_at() -> None:
    assert len(several) >= 12


@pytest.mark.parametrize("case", several, ids=str)
def test_every_side_of_every_layer_is_accounted_for(case) -> None:
    """Places in groups and places in none add up to what the layer has, along rows and along columns."""
    model, inputs = case.build()
    graph = trace(model, inputs)
    places = count_places(graph)
    for name, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False) if isinstance(module, LAYERS) else ():
            for dim in sides_of(module, tensor):
                found = places[f"{name}.{parameter}", dim]
                assert found == tensor.shape[dim], f"{name}.{parameter}[{dim}]: {found} of {tensor.shape[dim]}"


def sides_of(module: nn.Module, tensor: Tensor) -> list[int]:
    """Rows and columns; each kernel of a depthwise convolution has one input, which is no side of its own."""
    depthwise = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
    return [0] if tensor.dim() == 1 or depthwise else [0, 1]


def count_places(graph: ChannelGraph) -> dict[tuple[str, int], int]:
    inside: dict[tuple[str, int], set[int]] = defaultdict(set)
    for group in graph.groups:
        for member in group.members:
            inside[member.tensor, member.dim] |= set(member.positions.ravel().tolist())
    counts = defaultdict(int, {key: len(found) for key, found in inside.items()})
    for side in graph.fixed:
        counts[side.tensor, side.dim] += side.size
    return counts


def network() -> nn.Module:
    """Four columns that read the input, and one channel in the middle."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 3))


def test_why_each_is_in_no_group() -> None:
    input_columns = FixedSide("0.weight", 1, 4, "read from the input of the network, or from fixed data")
    one = [
        FixedSide(name, dim, 1, "one channel only") for name, dim in (("2.weight", 0), ("2.bias", 0), ("4.weight", 1))
    ]
    assert trace(network(), torch.randn(2, 4)).fixed == (input_columns, *one)


def test_a_sentence_for_each_reason() -> None:
    sides = tuple(FixedSide(f"blocks.{k}.weight", 1, 3, f"picked: index in blocks.{k}") for k in range(5))
    others = [FixedSide(f"{name}.bias", 0, 1, "one") for name in "abcde"]
    assert describe_fixed(ChannelGraph((), fixed=(*sides, *others))) == (
        "picked: index in blocks.*: blocks.{0-4}.weight[1] (3)",
        "one: a.bias[0] (1), b.bias[0] (1), c.bias[0] (1) and 2 more",
    )


def test_the_table_and_the_saved_plan_say_it() -> None:
    small = intrafusion.compress(network(), torch.randn(2, 4), 0.5, restore=None)
    line = "in no group, read from the input of the network, or from fixed data: 0.weight[1] (4)"
    assert line in " ".join(str(small).split())
    again = intrafusion.Plan.from_json(small.plan.to_json(), small.plan.maps)
    assert again.fixed == small.plan.fixed
    assert again == small.plan
