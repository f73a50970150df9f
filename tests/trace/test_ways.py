"""Networks that go by the values of their tensors: all branches are cut alike, or what they share is left whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from breadth import EXHAUSTIVE
from gallery.core import Wired
from torch import Tensor, nn

import intrafusion
from intrafusion.trace import trace

Wiring = Callable[[Any, Tensor], Tensor]


def is_positive(x: Tensor) -> Tensor:
    return x.mean() > 0


def by_truth(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.stem(x))
    return net.head(F.relu(net.e[0](h) if is_positive(x) else net.e[1](h)))


def by_number(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.stem(x))
    return net.head(F.relu(net.e[0](h) if x.mean().item() > 3 else net.e[1](h)))


def by_number_of_expert(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.stem(x))
    return net.head(F.relu(net.e[int(net.gate(x).mean(0).argmax())](h)))


def nested(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.stem(x))
    if x.amax() < 50:
        return net.head(F.relu(net.e[0](h)))
    return net.head(F.relu(net.e[1](h) if is_positive(x) else net.e[2](h)))


def rows_by_mask(net: Any, x: Tensor) -> Tensor:
    h, to = F.relu(net.stem(x)), net.gate(x).argmax(1)
    y = h.new_zeros(len(h), net.head.in_features)
    for k, expert in enumerate(net.e):
        if (to == k).any():
            y[to == k] = expert(h[to == k])
    return net.head(F.relu(y))


def rows_by_place(net: Any, x: Tensor) -> Tensor:
    """As mixtures of experts of Hugging Face do it."""
    h, (weights, to) = F.relu(net.stem(x)), net.gate(x).softmax(1).topk(2)
    y = h.new_zeros(len(h), net.head.in_features)
    for k in (F.one_hot(to, 3).sum((0, 1)) > 0).nonzero():
        rows, slot = torch.where(to == k[0])
        y.index_add_(0, rows, net.e[k[0]](h[rows]) * weights[rows, slot, None])
    return net.head(F.relu(y))


def rows_by_list(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.stem(x))
    return net.head(
        F.relu(torch.stack([net.e[k](row) for row, k in zip(h, net.gate(x).argmax(1).tolist(), strict=True)]))
    )


def until_it_stays(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.stem(x))
    for _ in range(4):
        if h.amax() < 0.05:
            break
        h = F.relu(net.loop(h))
    return net.head(F.relu(net.e[0](h)))


WIRINGS = (by_truth, by_number, by_number_of_expert, nested, rows_by_mask, rows_by_place, rows_by_list, until_it_stays)


def build(wiring: Wiring, count: int = 3) -> nn.Module:
    """Every second channel of each hidden layer is dead, so that half of them are lost by nobody."""
    torch.manual_seed(3)
    experts = nn.ModuleList([nn.Linear(12, 8) for _ in range(count)])
    parts = {"stem": nn.Linear(5, 12), "e": experts, "loop": nn.Linear(12, 12)}
    net: Any = Wired(wiring, **parts, gate=nn.Linear(5, 3), head=nn.Linear(8, 4)).eval()
    for layer in (net.stem, net.loop, net.gate, *experts):
        layer.weight.data[::2], layer.bias.data[::2] = 0, 0
    return net


def all_branches() -> list[Tensor]:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    return [x, -x, x + 5, x - 5, 100 * x.abs(), 100 * x, -100 * x, *x[:12].split(1), 1e-3 * x]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(0, id="small"),
        *(pytest.param(k, id=i, marks=EXHAUSTIVE) for k, i in ((3, "below"), (4, "large"))),
    ],
)
def test_every_branch_is_cut_with_the_one_that_was_seen(wiring: Wiring, first: int) -> None:
    net = build(wiring)
    small = intrafusion.compress(net, all_branches()[first][:2], 0.5, restore=None)
    assert small.plan.sizes["stem"] == 6
    assert 4 in small.plan.sizes.values(), "the experts are cut too"
    for x in all_branches():
        torch.testing.assert_close(small.model(x), net(x), rtol=1e-4, atol=1e-5)


def test_channels_that_only_another_branch_reverses_are_told_apart() -> None:
    def wiring(net: Any, x: Tensor) -> Tensor:
        h = F.relu(net.stem(x))
        return net.head(F.relu(net.e[0](h.flip(1) if x.mean() > 1e3 else h)))

    graph = trace(build(wiring), torch.randn(2, 5))
    assert all(g.size < 12 for g in graph.groups if "stem" in g.producers), "no two of these channels may change places"


def test_a_branch_without_a_layer_ties_what_it_skips() -> None:
    def wiring(net: Any, x: Tensor) -> Tensor:
        h = F.relu(net.stem(x))
        return net.head(F.relu(net.e[0](F.relu(net.loop(h)) if x.mean() > 1e3 else h)))

    (group,) = [g for g in trace(build(wiring), torch.randn(2, 5)).groups if g.size == 12]
    assert set(group.producers) == {"stem", "loop"}


def by_array(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.stem(x))
    if x.numpy().mean() > 60:
        return net.head(F.relu(net.e[0](h)))
    return net.head(F.relu(net.e[1](F.relu(net.loop(h)) + F.pad(net.gate(x), (0, 9)))))


def test_what_an_unseen_branch_may_share_is_left_whole() -> None:
    graph = intrafusion.inspect(build(by_array, 2), torch.randn(2, 5))
    why = graph["stem"].reason or ""
    assert "test_ways.py" in why
    assert "e.0.weight, which was not used on any input that was tried, may share these channels" in why


def test_given_inputs_show_a_branch() -> None:
    net, x = build(by_array, 2), torch.randn(40, 5)
    assert "stem" not in intrafusion.compress(net, x[:2], 0.5, restore=None).plan.sizes
    both = [x, x.abs() + 80]
    small = intrafusion.compress(net, x[:2], 0.5, restore=None, inputs=both)
    assert small.plan.sizes["stem"] == 6
    for given in both:
        torch.testing.assert_close(small.model(given), net(given), rtol=1e-4, atol=1e-4)


def test_an_input_that_the_forward_refuses_is_no_branch() -> None:
    def wiring(net: Any, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("expected numbers")
        assert x.amax() < 1e6
        return net.head(F.relu(net.e[0](F.relu(net.stem(x)))))

    graph = intrafusion.inspect(build(wiring), torch.randn(2, 5))
    assert graph["stem"].reducible
    assert len(graph.ways) == 1


def test_what_was_followed_is_told() -> None:
    graph = trace(build(nested), torch.randn(2, 5))
    (said,) = [w for w in graph.warnings if "goes by the values" in w]
    assert "test_ways.py:" in said
    assert "3 ways through it were followed" in said
    assert trace(build(lambda net, x: net.head(net.e[0](net.stem(x)))), torch.randn(2, 5)).ways == ()


def test_a_smaller_network_that_decides_otherwise_is_no_other_network() -> None:
    """What it decides by has other values in it, and the way that was traced is followed all the same."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        h = F.relu(net.stem(x))
        return net.head(F.relu(net.e[0](h) if h.mean() > 0.3 else net.e[1](h)))

    for example in all_branches():
        small = intrafusion.compress(build(wiring), example, {"e.*": 0.5, "*": 1.0}, restore=None)
        assert list(small.plan.sizes.values()) == [4]
