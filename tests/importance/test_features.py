from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGroup, Member, Role, Slice
from intrafusion.importance.features import channel_biases, channel_features, channel_rows


def member(tensor: str, dim: int, positions: list[list[int]], *roles: Role, within: Slice | None = None) -> Member:
    return Member(tensor, dim, np.array(positions), frozenset(roles), within)


def count(*shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def test_rows_of_a_producer_are_its_flattened_kernels():
    rows = channel_rows({"w": count(2, 1, 2, 1)}, member("w", 0, [[1], [0]], Role.PRODUCES))
    assert rows.dtype == torch.float64
    assert rows.tolist() == [[3, 4], [1, 2]]


def test_rows_of_a_consumer_are_its_columns():
    rows = channel_rows({"w": count(2, 3)}, member("w", 1, [[0], [1], [2]], Role.CONSUMES))
    assert rows.tolist() == [[1, 4], [2, 5], [3, 6]]


def test_slots_of_a_flattened_channel_follow_each_other():
    rows = channel_rows({"w": count(1, 4)}, member("w", 1, [[0, 1], [2, 3]], Role.CONSUMES))
    assert rows.tolist() == [[1, 2], [3, 4]]


def test_within_another_dimension_shows_only_that_slice():
    seen = member("w", 1, [[1], [0]], Role.CONSUMES, within=Slice(dim=0, start=1, stop=3))
    assert channel_rows({"w": count(4, 2)}, seen).tolist() == [[4, 6], [3, 5]]


def test_within_the_same_dimension_positions_count_from_the_start_of_the_tensor():
    seen = member("w", 0, [[2], [3]], Role.PRODUCES, within=Slice(dim=0, start=2, stop=4))
    assert channel_rows({"w": count(4, 1)}, seen).tolist() == [[3], [4]]


def test_low_precision_and_trainable_weights_give_detached_float64():
    weight = torch.nn.Parameter(torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16))
    rows = channel_rows({"w": weight}, member("w", 0, [[0], [1]], Role.PRODUCES))
    assert rows.dtype == torch.float64
    assert not rows.requires_grad
    assert rows.tolist() == [[1.5], [2.5]]


@pytest.fixture
def group() -> ChannelGroup:
    each = [[0], [1]]
    return ChannelGroup(
        "conv",
        2,
        (
            member("conv.weight", 0, each, Role.PRODUCES),
            member("conv.bias", 0, each, Role.SHIFTS),
            member("bn.weight", 0, each, Role.SCALES),
            member("bn.running_mean", 0, each, Role.MEAN),
            member("bn.running_var", 0, each, Role.VARIANCE),
            member("depthwise.weight", 0, each, Role.SCALES),
            member("slope", 0, each, Role.FOLLOWS),
            member("fc.weight", 1, each, Role.CONSUMES),
        ),
    )


WEIGHTS = {
    "conv.weight": torch.tensor([[1.0], [2.0]]),
    "conv.bias": torch.tensor([3.0, 4.0]),
    "bn.weight": torch.tensor([50.0, 60.0]),
    "bn.running_mean": torch.tensor([70.0, 80.0]),
    "bn.running_var": torch.tensor([90.0, 99.0]),
    "depthwise.weight": torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]]]),
    "slope": torch.tensor([10.0, 20.0]),
    "fc.weight": torch.tensor([[9.0, 10.0], [11.0, 12.0]]),
}


def test_features_are_producers_kernels_and_consumers_in_order(group):
    assert channel_features(group, WEIGHTS).tolist() == [[1, 5, 6, 9, 11], [2, 7, 8, 10, 12]]


def test_raw_features_hold_scales_shifts_and_biases_of_the_network(group):
    raw = channel_features(group, WEIGHTS, raw=True)
    assert raw.tolist() == [[1, 3, 50, 5, 6, 9, 11], [2, 4, 60, 7, 8, 10, 12]]


def test_balanced_rows_of_every_member_have_the_same_length(group):
    balanced = channel_features(group, WEIGHTS, balanced=True)
    plain = channel_features(group, WEIGHTS)
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        own = plain[:, part]
        torch.testing.assert_close(balanced[:, part], own / own.square().sum(1).mean().sqrt())
    zero = {**WEIGHTS, "fc.weight": torch.zeros(2, 2)}
    assert channel_features(group, zero, balanced=True)[:, 3:].tolist() == [[0, 0], [0, 0]]


def test_biases_are_what_is_added_to_the_channels(group):
    rows = channel_biases(group, WEIGHTS)
    assert rows.dtype == torch.float64
    assert rows.tolist() == [[3], [4]]


def test_a_group_without_biases_has_none(group):
    bare = replace(group, members=tuple(m for m in group.members if m.tensor != "conv.bias"))
    assert channel_biases(bare, WEIGHTS).shape == (2, 0)


def test_a_group_without_weights_has_no_features(group):
    norms_only = replace(group, members=tuple(m for m in group.members if m.module == "bn"))
    with pytest.raises(ModelError, match="group 'conv': no weight describes its channels; exclude the group"):
        channel_features(norms_only, WEIGHTS)


def test_relabelling_channels_permutes_the_rows(group):
    swapped = {name: w.flip(1 if name == "fc.weight" else 0) for name, w in WEIGHTS.items()}
    assert torch.equal(channel_features(group, swapped), channel_features(group, WEIGHTS).flip(0))
