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


# ---- queries and keys that functions compute ------------------------------------------------------------------------

HEADS, DIM = 2, 4


class Packed(nn.Module):
    """Attention of PyTorch to itself, or from one sequence to another of other widths."""

    def __init__(self, batch_first: bool = True, **widths: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=batch_first, **widths)
        self.head, self.batch_first = nn.Linear(HEADS * DIM, 3), batch_first

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x, memory = (t if self.batch_first or t is None else t.transpose(0, 1) for t in (x, memory))
        memory = x if memory is None else memory
        return self.head(torch.relu(self.attention(x, memory, memory, need_weights=False)[0]))

    def project(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys (images, tokens, channels), by plain matrix products."""
        own, memory = self.attention, x if memory is None else memory
        rows = own.in_proj_weight.chunk(3) if own.in_proj_weight is not None else (own.q_proj_weight, own.k_proj_weight)
        shifts = own.in_proj_bias.chunk(3)
        return x @ rows[0].T + shifts[0], memory @ rows[1].T + shifts[1]


class Products(nn.Module):
    """The weight of one layer, and parameters, the bias added to a product that does not lie in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, HEADS * DIM), nn.Parameter(torch.randn(8, HEADS * DIM))
        self.shift, self.v = nn.Parameter(torch.randn(HEADS * DIM)), nn.Linear(8, HEADS * DIM)
        self.head = nn.Linear(HEADS * DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        q = nn.functional.linear(turned, self.q.weight, self.q.bias).transpose(0, 1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, x @ self.k + self.shift, self.v(x)))
        return self.head(torch.relu(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.q.weight.T + self.q.bias, x @ self.k + self.shift


@pytest.mark.parametrize("batches", [(30,), (7, 23), (1,) * 30], ids=["one", "two", "many"])
@pytest.mark.parametrize(
    ("build", "widths"),
    [
        (Packed, (8,)), (lambda: Packed(False), (8,)), (Packed, (8, 8)), (lambda: Packed(kdim=5, vdim=5), (8, 5)),
        (lambda: Packed(False, kdim=5, vdim=5), (8, 5)), (Products, (8,)),
    ],
    ids=["packed", "tokens first", "to another sequence", "of other widths", "of other widths, tokens first", "bare"],
)  # fmt: skip
def test_queries_and_keys_of_functions_are_seen_as_those_of_layers(
    build: Any, widths: tuple[int, ...], batches: tuple[int, ...]
) -> None:
    """The second moment of a head's queries, and of its keys about each sequence's mean, by the formulas."""
    model = randomise_(build()).double().eval()
    generator = torch.Generator().manual_seed(1)
    lengths = (6, 9)
    inputs = [
        torch.randn(30, n, w, generator=generator, dtype=torch.float64) for n, w in zip(lengths, widths, strict=False)
    ]
    graph = intrafusion.inspect(model, Inputs(tuple(t[:2] for t in inputs)))
    calls = [Inputs(parts) for parts in zip(*(t.split(batches) for t in inputs), strict=True)]
    found = measure_moments(model, graph, Batches.of(*calls))
    queries, keys = (t.detach().unflatten(-1, (HEADS, DIM)).movedim(2, 0) for t in model.project(*inputs))
    groups = [g for g in graph.reducible if g.is_channel and g.with_role(intrafusion.Role.MATCHES)]
    assert len(groups) == HEADS
    for head, group in enumerate(groups):
        rows, others = queries[head].flatten(0, 1), keys[head] - keys[head].mean(1, keepdim=True)
        others = others.flatten(0, 1)
        torch.testing.assert_close(found[group.name].covariances[0], rows.T @ rows / len(rows))
        torch.testing.assert_close(found[group.name].reader, others.T @ others / len(others))
