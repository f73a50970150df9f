"""The blocks of a network: found, seen to run one after another, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.large.chain import find_blocks, follow_blocks
from intrafusion.network.inputs import Inputs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, None]:
        return x + scale * self.down(self.up(x).relu()), None


def once(net: Net, x: Tensor) -> Tensor:
    for index, block in enumerate(net.blocks):
        x, _ = block(x, float(index))
    return x


def twice(net: Net, x: Tensor) -> Tensor:
    x, _ = net.blocks[0](x, 1.0)
    return once(net, x)


def changed(net: Net, x: Tensor) -> Tensor:
    x, _ = net.blocks[0](x, 1.0)
    x, _ = net.blocks[1](2 * x, 1.0)
    return net.blocks[2](x, 1.0)[0]


def skipped(net: Net, x: Tensor) -> Tensor:
    return net.blocks[0](x, 1.0)[0]


class Net(nn.Module):
    def __init__(self, run: Callable[[Net, Tensor], Tensor] = once) -> None:
        super().__init__()
        self.enter, self.blocks, self.run = nn.Linear(3, 4), nn.ModuleList([Block() for _ in range(3)]), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.enter(x))


X = torch.linspace(-1, 1, 15).sin().reshape(5, 3)


def test_every_block_gets_its_own_call_on_the_stream() -> None:
    net = Net()
    blocks = find_blocks(net)
    assert blocks == ("blocks.0", "blocks.1", "blocks.2")
    stream, calls = follow_blocks(net, blocks, Inputs((X,)), copy.deepcopy(net.blocks[0]))
    assert torch.equal(stream, net.enter(X))
    for index, (name, call) in enumerate(zip(blocks, calls, strict=True)):
        given = call.on(stream)
        assert given.args[1] == float(index)
        stream = given.call(net.get_submodule(name))[0]
    assert torch.equal(stream, net(X))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (twice, r"blocks\.0 ran as number 2"),
        (changed, r"blocks\.1 reads something else"),
        (skipped, "1 of the 3 ran"),
    ],
)
def test_blocks_that_do_not_run_one_after_another_are_refused(run: Callable[[Net, Tensor], Tensor], why: str) -> None:
    net = Net(run)
    with pytest.raises(ModelError, match=f"each once and on what the one before gives: {why}"):
        follow_blocks(net, find_blocks(net), Inputs((X,)), copy.deepcopy(net.blocks[0]))
    assert torch.equal(Net.forward(net, X), net(X)), "the network is as it was"


def test_networks_without_one_row_of_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="expected one list of blocks of one class, got none"):
        find_blocks(nn.Linear(3, 4))
    with pytest.raises(ModelError, match=r"expected one list of blocks of one class, got 2 \(\{0,1\}.blocks\)"):
        find_blocks(nn.ModuleDict({"0": Net(), "1": Net()}))


def test_tensors_that_blocks_share_are_refused() -> None:
    net = Net()
    first, last = net.blocks[0], net.blocks[2]
    assert isinstance(first, Block)
    assert isinstance(last, Block)
    last.up.weight = first.up.weight
    with pytest.raises(ModelError, match=r"blocks.\{0,2\}.up.weight, which stand in several places"):
        find_blocks(net)
