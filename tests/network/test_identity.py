"""What tells one network from another: layers and weights, not values of the moment or places in memory."""

from __future__ import annotations

import copy

import torch
from torch import nn

from intrafusion.network.identity import describe_layers, identify


class Told(nn.Module):
    """Says of itself what changes from run to run."""

    def __init__(self, told: object) -> None:
        super().__init__()
        self.told = told

    def extra_repr(self) -> str:
        return f"told={self.told}"


def test_layers_are_told_by_class_and_arguments() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.1))
    assert describe_layers(net)["0"] == "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))"
    assert "eps=0.1" in describe_layers(net)["1"]
    assert describe_layers(Told(lambda: 0)) == describe_layers(Told(lambda: 0))
    assert describe_layers(Told(torch.zeros(1))) == describe_layers(Told(torch.ones(1))) == {"": "Told()"}
    assert describe_layers(Told(1)) != describe_layers(Told(2))


def test_the_hash_is_of_every_tensor_with_name_kind_and_shape() -> None:
    net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    own = identify(net).sha256
    assert identify(copy.deepcopy(net)).sha256 == own
    others = [copy.deepcopy(net) for _ in range(4)]
    others[0][0].weight.data[0, 0] += 1
    others[1][1].running_var[0] = 7
    others[2].half()
    others[3].append(nn.PReLU())
    assert len({own, *(identify(other).sha256 for other in others)}) == 5
    assert identify(net.to("meta")).sha256 != own
    assert identify(net).name == "torch.nn.modules.container.Sequential"


def test_tensors_without_a_plain_memory_are_told_by_name_alone() -> None:
    net = nn.Module()
    net.register_buffer("sparse", torch.eye(2).to_sparse())
    net.register_buffer("wave", torch.zeros((), dtype=torch.complex64))
    assert len(identify(net).sha256) == 64
