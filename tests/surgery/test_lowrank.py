"""Layers as two of full rank give the same, and those that cannot be two say why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import intrafusion
from intrafusion import PlanError
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.surgery.lowrank import (
    LowRank,
    explain_unsplit,
    find_largest_rank,
    make_low_rank,
    shapes_when_split,
    split_exactly,
    split_provably,
)

LAYERS = [
    (nn.Linear(7, 5), (3, 7)),
    (nn.Linear(5, 9, bias=False), (2, 4, 5)),
    (nn.Conv1d(4, 30, 5, stride=3, padding=2), (2, 4, 17)),
    (nn.Conv2d(3, 40, 3, padding=1), (2, 3, 9, 9)),
    (nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", dilation=2, bias=False), (2, 4, 11, 11)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 7)),
    (nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate"), (1, 2, 4, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x)[:50])
def test_two_layers_of_full_rank_are_the_same_function(layer: nn.Module, shape: tuple[int, ...]) -> None:
    net, x = nn.Sequential(copy.deepcopy(layer)).double(), torch.randn(*shape, dtype=torch.float64)
    split = split_exactly(net, ["0"])
    pair, weight = split.get_submodule("0"), layer.get_parameter("weight")
    assert isinstance(pair, LowRank)
    assert pair.rank == min(len(weight), weight[0].numel())
    torch.testing.assert_close(split(x), net(x), rtol=1e-13, atol=1e-13)
    assert not isinstance(net[0], LowRank)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(net).items()}
    assert shapes_when_split(shapes, {"0": pair.rank}) == {n: tuple(t.shape) for n, t in named_tensors(split).items()}
    assert isinstance(split_exactly(split, ["0"]).get_submodule("0.reduce"), type(layer))  # stays as it is


def test_making_two_layers_draws_no_random_numbers() -> None:
    """What the user draws next is what would have come without."""
    layer = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    pair = make_low_rank(layer, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.dtype == torch.float64 and not p.any() for p in pair.parameters())


def test_a_name_that_is_no_layer_is_refused() -> None:
    with pytest.raises(PlanError, match="no convolution or linear layer '1'"):
        split_exactly(nn.Sequential(nn.Linear(3, 3)), ["1"])


class Awkward(nn.Module):
    """Layers that cannot become two, each for a reason of its own, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.table, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.table.weight
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.old = weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.one = nn.Linear(8, 1)
        self.split = make_low_rank(nn.Linear(8, 8), 2)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.turned = nn.ConvTranspose2d(8, 8, 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_layers_that_cannot_become_two_say_why() -> None:
    reasons = explain_unsplit(Awkward())
    assert reasons["plain"] is None
    wanted = {
        "grouped": "its groups read few channels",
        "depthwise": "its groups read few channels",
        "head": "another layer shares its weight",
        "table": "a Embedding is no plain convolution",
        "old": "computed from others",
        "attention.out_proj": "is no plain convolution or linear layer",
        "one": "even rank 1 saves no weights",
        "split.reduce": "split into already",
        "split.expand": "split into already",
        "hooked": "hooks hang on it",
        "turned": "a ConvTranspose2d is no plain",
    }
    for name, why in wanted.items():
        assert why in (reasons[name] or ""), name
    assert "normed" not in {name for name, why in reasons.items() if why is None}


def test_the_largest_rank_is_the_last_that_saves_weights() -> None:
    for c, d in ((5, 7), (64, 576), (1, 9), (2, 2), (300, 27)):
        saving = [r for r in range(1, min(c, d) + 1) if r * (c + d) < c * d]
        assert find_largest_rank(c, d) == max(saving, default=0)


class Reader(nn.Module):
    """Its forward reads the weight of one layer itself, and asks another what it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.asked, self.plain = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x @ self.read.weight.T + self.read.bias)
        x = self.asked(x) if isinstance(self.asked, nn.Linear) else x
        return self.plain(torch.relu(x))


def test_layers_that_code_around_them_needs_stay_one() -> None:
    model, x = Reader().eval(), torch.randn(2, 6)
    graph = intrafusion.inspect(model, x)
    split, names = split_provably(model, ["read", "asked", "plain"], Inputs.of(x), graph)
    assert names == ("plain",)
    torch.testing.assert_close(split(x), model(x))
    assert split_provably(model, ["read"], Inputs.of(x), graph) == (model, ())
