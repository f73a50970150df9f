"""Moments of what is read of channels, on rows that are few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery.core import Wired
from oracle import randomise_
from sklearn.covariance import oas
from torch import Tensor, nn

import intrafusion
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.observe.moments import measure_moments, shrink
from intrafusion.reduce.pivot import pivot_order


def covariance_of(rows: torch.Tensor) -> torch.Tensor:
    return torch.cov(rows.T, correction=0)


@pytest.mark.parametrize("k", [60, 150, 2000])
def test_correlations_shrink_as_the_oracle_approximation_says(k: int) -> None:
    """scikit-learn leaves out 2 / n, which is small here."""
    rows = torch.randn(k, 20, dtype=torch.float64) @ torch.randn(20, 100, dtype=torch.float64)
    rows = rows + 3 * torch.randn(k, 100, dtype=torch.float64)
    standard = (rows - rows.mean(0)) / rows.std(0, correction=0)
    _, intensity = oas(standard.numpy())
    sample = covariance_of(rows)
    found = shrink(sample, k)
    torch.testing.assert_close(found.diagonal(), sample.diagonal())
    off = ~torch.eye(100, dtype=torch.bool)
    assert 1 - float((found / sample)[off].mean()) == pytest.approx(intensity, rel=0.05)


def test_channels_that_do_not_vary_change_nothing() -> None:
    rows = torch.randn(40, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    sample = covariance_of(rows)
    more = torch.zeros(10, 10, dtype=torch.float64)
    more[:8, :8] = sample
    torch.testing.assert_close(shrink(more, 40)[:8, :8], shrink(sample, 40))
    assert torch.equal(shrink(torch.zeros(3, 3, dtype=torch.float64), 5), torch.zeros(3, 3, dtype=torch.float64))
    one = torch.ones(1, 1, dtype=torch.float64)
    assert torch.equal(shrink(one, 5), one)


def test_few_rows_do_not_tell_independent_channels_from_one_another() -> None:
    sample = covariance_of(torch.randn(30, 60, dtype=torch.float64))
    identity, shares = torch.eye(60, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    lacks = [
        float(pivot_order(c[None], identity, shares / c.trace(), 30).missing[-1]) for c in (sample, shrink(sample, 30))
    ]
    assert lacks[0] < 1e-3
    assert lacks[1] > 0.4


@pytest.mark.parametrize("width", [8, 40])
def test_a_bottleneck_of_low_rank_loses_nothing_once_more_rows_than_channels_were_seen(width: int) -> None:
    """Shrinking gives something to every direction, also to those in which nothing varies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 6))
    with torch.no_grad():
        rank_three = torch.randn(width, 3) @ torch.randn(3, width) / width
        model[0].weight.copy_(rank_three @ model[0].weight)
    images, unseen = torch.randn(60, 6), torch.randn(9, 6)
    small = intrafusion.compress(model, images[:2], keep=4 / width, restore=None, inputs=images).model
    assert small.get_submodule("0").out_features == 4
    torch.testing.assert_close(small(unseen), model(unseen), atol=1e-5, rtol=1e-4)


# ---- batch by batch -------------------------------------------------------------------------------------------------

X = torch.randn(90, 3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100


class Tied(nn.Module):
    """Reads with layers, with a weight that no layer owns, twice with one layer, and what is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.bare, self.head = nn.Parameter(torch.randn(5, 6)), nn.Linear(5 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(torch.relu(self.second(x))))
        return self.head(torch.relu(x.movedim(1, -1) @ self.bare.T).flatten(1))


@pytest.mark.parametrize("rows", [20_000, 700])
def test_moments_do_not_depend_on_the_batches(rows: int) -> None:
    model = randomise_(Tied()).double().eval()
    graph = intrafusion.inspect(model, X[:1])
    whole = measure_moments(model, graph, Batches.of(Inputs((X,))), rows=rows)
    assert whole
    for sizes in ([1] * 90, [7, 80, 3], [45, 45]):
        found = measure_moments(model, graph, Batches.of(*(Inputs((part,)) for part in X.split(sizes))), rows=rows)
        assert found.keys() == whole.keys()
        for name, moments in found.items():
            torch.testing.assert_close(moments.means, whole[name].means, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(moments.covariances, whole[name].covariances, rtol=1e-8, atol=1e-8)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.query, self.key, self.value = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        scores = (self.query(x) @ self.key(x).mT).masked_fill(attention_mask[:, None] == 0, -1e9)
        return self.out(torch.relu(scores.softmax(-1) @ self.value(x)))


def test_masked_sequences_of_other_lengths_in_each_batch_count_as_if_padded_together() -> None:
    model = randomise_(Masked()).double().eval()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(30, (n,), generator=generator) for n in (3, 5, 2, 9, 8, 9, 4, 4)]

    def pad(some: list[Tensor], length: int) -> dict[str, Tensor]:
        ids = torch.stack([torch.cat([t, torch.zeros(length - len(t), dtype=torch.long)]) for t in some])
        return {"input_ids": ids, "attention_mask": torch.stack([torch.arange(length) < len(t) for t in some]).long()}

    whole = pad(texts, 12)
    graph = intrafusion.inspect(model, {name: t[:2] for name, t in whole.items()})
    expected = measure_moments(model, graph, whole)
    found = measure_moments(model, graph, [pad(texts[:3], 5), pad(texts[3:6], 9), pad(texts[6:], 4)])
    assert expected.keys() == found.keys()
    assert any(graph[name].with_role(intrafusion.Role.MATCHES) for name in found)
    for name, moments in found.items():
        torch.testing.assert_close(moments.means, expected[name].means, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.covariances, expected[name].covariances, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.reader, expected[name].reader, rtol=1e-9, atol=1e-12)


def test_a_stream_of_low_rank_becomes_the_same_however_inputs_are_cut() -> None:
    """Its norm sees eight directions of 24, the readers behind the residual branches see more without a norm."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        h = net.stem(x)
        h = h + net.b(torch.tanh(net.a(net.norm(h))))
        return net.head(h)

    torch.manual_seed(0)
    layers = {"stem": nn.Linear(8, 24), "a": nn.Linear(24, 20), "b": nn.Linear(20, 24), "head": nn.Linear(24, 4)}
    net = Wired(wiring, **layers, norm=nn.LayerNorm(24)).eval()
    x = torch.randn(300, 8)
    keep = {"stem": 0.5, "*": 1.0}
    one, many = (intrafusion.compress(net, x[:2], keep, inputs=x, restore=None, memory=m) for m in (None, "60KB"))
    assert "rotated" in str(one)
    assert (moments := measure_moments(net, intrafusion.inspect(net, x[:2]), x)["stem"].bare) is not None
    assert (len(moments.means), moments.plain) == (2, 1)
    torch.testing.assert_close(one.model(x), many.model(x), rtol=1e-4, atol=1e-4)
