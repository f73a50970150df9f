from __future__ import annotations

import torch

from intrafusion.graph import ChannelGroup
from intrafusion.importance import Random, get_importance


def scores(seed: int, name: str, size: int = 50) -> list[float]:
    return Random(seed)(ChannelGroup(name, size, ()), {}).tolist()


def test_same_seed_and_group_give_the_same_scores():
    assert scores(3, "layer1.conv1") == scores(3, "layer1.conv1")


def test_seeds_and_groups_are_independent():
    draws = {tuple(scores(seed, name)) for seed in (0, 1) for name in ("a", "b", "ab", "")}
    assert len(draws) == 8


def test_scores_are_uniform_and_leave_the_global_generators_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    values = torch.tensor(scores(0, "wide", 10_000))
    assert torch.equal(torch.get_rng_state(), state)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.02
    assert get_importance("random") == Random(0)
