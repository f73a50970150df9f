"""What is read with weights that no layer owns: moments against rows by hand, and the maps that follow from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.observe.moments import measure_moments


class Bare(nn.Module):
    """Two layers; the second is a bare weight that is used as `how` says."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.how = nn.Linear(5, 8), how
        self.weight = nn.Parameter(torch.randn(*shape))

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.hidden(x), self.weight)


WAYS = {
    "F.linear": (F.linear, (3, 8)),
    "matmul": (torch.matmul, (8, 3)),
    "weight first": (lambda h, w: (w @ h.T).T, (3, 8)),
    "einsum": (lambda h, w: torch.einsum("bi,oi->bo", h, w), (3, 8)),
    "scaled": (lambda h, w: F.linear(h, 2 * w), (3, 8)),
    "convolution": (lambda h, w: F.conv1d(h[:, :, None], w[:, :, None])[:, :, 0], (3, 8)),
    "batched": (lambda h, w: torch.bmm(h[None], w[None])[0], (8, 3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_with_a_bare_weight_is_seen(way: str) -> None:
    how, shape = WAYS[way]
    model, x = Bare(how, *shape).eval(), torch.randn(400, 5, generator=torch.Generator().manual_seed(1))
    graph = intrafusion.inspect(model, x[:2])
    found = measure_moments(model, graph, x)["first"]
    rows = model.hidden(x).double().detach()
    assert found.means.shape == (1, 8)
    assert found.means.count_nonzero() == 0  # as there is no place for a constant, second moments
    variances = rows.square().mean(0)
    torch.testing.assert_close(found.covariances[0].diagonal(), variances, rtol=1e-5, atol=1e-6)
    mean = rows.mean(0)
    centred = (rows - mean).T @ (rows - mean) / len(rows)
    off = (found.covariances[0] - torch.outer(mean, mean)) / centred  # shrunk towards 0 by one factor off the diagonal
    factor = off[0, 1]
    assert 0.9 < float(factor) <= 1
    torch.testing.assert_close(off, torch.eye(8).double() * (1 - factor) + factor, rtol=1e-3, atol=1e-3)
    columns = model.weight.detach().double().movedim(1 if shape[1] == 8 else 0, 0)
    torch.testing.assert_close(found.reader, columns @ columns.T, rtol=1e-4, atol=1e-5)


def test_calls_of_one_weight_are_pooled() -> None:
    model = Bare(lambda h, w: torch.cat([F.linear(h[:100], w), F.linear(h[100:], w)]), 3, 8).eval()
    x = torch.randn(400, 5)
    graph = intrafusion.inspect(model, x[:200])
    found = measure_moments(model, graph, x)["first"]
    seconds = model.hidden(x).double().detach().square().mean(0)
    torch.testing.assert_close(found.covariances[0].diagonal(), seconds, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_channel_that_two_others_tell_is_told_with_a_bare_weight_too(way: str) -> None:
    """Of eight channels four are sums of positive ones: four are enough."""
    how, shape = WAYS[way]
    model, x = Bare(how, *shape).eval(), torch.randn(2000, 5)
    with torch.no_grad():
        model.first.weight.abs_()
        model.first.weight[4:] = 0.5 * model.first.weight[:4]
        model.first.bias[:4] = 1
        model.first.bias[4:] = 0.5
    small = intrafusion.compress(model, x[:2], 0.5, images=x, restore=None)
    assert small.plan.sizes == {"first": 4}
    assert "mixed" in " ".join(str(small).split())
    plain = intrafusion.compress(model, x[:2], 0.5, reducer="select", restore=None)
    with torch.no_grad():
        wanted = model(x)
        off = [float((s.model(x) - wanted).norm() / wanted.norm()) for s in (small, plain)]
    assert off[0] < 0.02  # of a ridge of a thousandth
    assert off[1] > 0.1


def test_groups_of_which_nothing_was_seen_are_selected_and_the_table_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(72, 4))
    x = torch.randn(2, 3, 5, 5)
    small = intrafusion.compress(model, x, {"0*": 0.5}, restore=None)
    plain = intrafusion.compress(model, x, {"0*": 0.5}, reducer="select", restore=None)
    assert small.plan.sizes
    assert "what is read of these channels was not seen" in " ".join(str(small).split())
    torch.testing.assert_close(small.model(x), plain.model(x))


@pytest.mark.parametrize("how", [lambda h, w: (h @ w)[:, None], lambda h, w: torch.stack([r @ w for r in h])[:, None]])
def test_a_weight_of_one_dimension(how: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A matrix, or each of its rows, times a vector: as in the cross layers of DCN."""
    net, x = Bare(how, 8).eval(), torch.randn(60, 5)
    small = intrafusion.compress(net, x[:2], 0.5, inputs=x)
    assert small.plan.sizes == {"first": 4}
    with torch.no_grad():
        error = (small.model(x) - net(x)).square().mean() / net(x).var()
    assert error < 0.5
