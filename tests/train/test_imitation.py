"""The loss against one by hand, what layers read, and that a smaller network without a loss has none."""

from __future__ import annotations

import pytest
import torch
from bare import compress
from torch import Tensor, nn

import intrafusion
from intrafusion.network.batches import read_batches
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import Inputs
from intrafusion.train.imitation import Imitation, Pool, find_read_merges

ROWS = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def pool_of(rows: Tensor, model: nn.Module) -> Pool:
    return Pool.of(read_input_batches(rows, model), 8)


def test_the_loss_is_the_one_by_hand() -> None:
    model = perceptron()
    small = compress(model, ROWS, 0.5, reducer="fold")
    merges = find_read_merges(model, intrafusion.inspect(model, ROWS), small.plan.maps)
    assert {name: tuple(merge.shape) for name, merge in merges.items()} == {"2": (4, 8), "4": (3, 6)}
    imitation = Imitation(model, intrafusion.inspect(model, ROWS), merges, pool_of(ROWS, model), blocks=2.0)
    imitation.look(small.model)
    imitation.known = {key: torch.tensor(1.0) for key in (("2", 0), ("4", 0))}
    imitation.scales = {0: torch.tensor(0.25)}
    places = torch.tensor([3, 1, 20])
    found = imitation(small.model, places, None)
    x, off = ROWS[places], []
    read, own = x, x
    for k in (0, 2):
        read, own = model[k + 1](model[k](read)), small.model[k + 1](small.model[k](own))
        off.append((own - read @ merges[str(k + 2)].T.float()).square().mean())
    outputs = (small.model[4](own) - model[4](read)).square().mean() / 0.25
    torch.testing.assert_close(found, outputs + 2 * (off[0] + off[1]) / 2)
    assert found.requires_grad


def test_variances_are_those_of_the_original_and_far_reads_are_left_out() -> None:
    model = perceptron()
    small = compress(model, ROWS, 0.5, reducer="select")
    graph = intrafusion.inspect(model, ROWS)
    imitation = Imitation(
        model, graph, find_read_merges(model, graph, small.plan.maps), Pool.of(Batches.of(Inputs((ROWS,))), 8)
    )
    with torch.no_grad():
        small.model[2].bias += 100
    imitation.look(small.model)
    expected = model(ROWS).detach()
    torch.testing.assert_close(imitation.scales[0], (expected - expected.mean(0)).square().mean())
    assert imitation.known.keys() == {("2", 0)}


def test_the_original_itself_has_no_loss_also_where_it_masks_outputs() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu())
            return y.masked_fill(torch.tensor([False, True, False]), -torch.inf)

    torch.manual_seed(0)
    model = Masked()
    imitation = Imitation(model, intrafusion.inspect(model, ROWS), {}, pool_of(ROWS, model))
    imitation.look(model)
    assert float(imitation(model, torch.arange(4), None).detach()) == 0
    with torch.no_grad():
        other = Masked()
        other.b.weight.fill_(float("nan"))
    assert not bool(imitation(other, torch.arange(4), None).isfinite())


def test_calls_that_cannot_be_one_are_drawn_whole() -> None:
    calls = read_batches([torch.zeros(2, 5), torch.ones(3, 5)])
    pool = Pool.of(Batches.of(*calls), 8)  # of which nothing says that the rows are answered one by one
    assert (pool.count, pool.joined) == (2, False)
    assert torch.equal(pool.pick(torch.tensor([1])).args[0], torch.ones(3, 5))


@pytest.mark.parametrize("count", [1, 7])
def test_of_one_call_its_images_are_drawn(count: int) -> None:
    pool = pool_of(ROWS[: count + 1], perceptron())
    assert (pool.count, pool.joined) == (count + 1, True)
    assert torch.equal(pool.pick(torch.tensor([count, 0])).args[0], ROWS[[count, 0]])
