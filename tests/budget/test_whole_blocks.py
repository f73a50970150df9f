"""A target cuts whole heads too, where that costs least, beside what is inside of them."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.budget.allocate import allocate
from intrafusion.budget.cost import Cost
from intrafusion.budget.target import build_with_sizes, find_believed_cost
from intrafusion.graph import ChannelGroup, families_of
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import Inputs
from intrafusion.planning import is_offered
from intrafusion.recipe import Recipe
from intrafusion.reduce.select import selection_map
from intrafusion.surgery.operate import operate

HEADS, DIM, WIDTH = 4, 6, 10
X = torch.randn(48, 7, 5, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Heads whose number and width are attributes; key/value heads that `shared` query heads have in common."""

    def __init__(self, shared: int = 1, heads: int = HEADS, dim: int = DIM) -> None:
        super().__init__()
        self.heads, self.keys, self.dim = heads, heads // shared, dim
        self.stem = nn.Linear(5, WIDTH)
        self.q = nn.Linear(WIDTH, heads * dim)
        self.k, self.v = (nn.Linear(WIDTH, heads // shared * dim) for _ in range(2))
        self.o, self.head = nn.Linear(heads * dim, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, shape = self.stem(x).tanh(), x.shape[:2]
        q = self.q(x).view(*shape, self.heads, self.dim).transpose(1, 2)
        k, v = (layer(x).view(*shape, self.keys, self.dim).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.keys, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(x + self.o(y.reshape(*shape, self.heads * self.dim)))


def make(*, shared: int = 1, heads: int = HEADS, dim: int = DIM, idle: tuple[int, ...] = ()) -> Attention:
    """With key/value heads of which nothing is read."""
    torch.manual_seed(0)
    model = Attention(shared, heads, dim).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        model.o.weight.unflatten(1, (-1, shared * dim))[:, list(idle)] *= 1e-3
    return model


@pytest.mark.parametrize(("shared", "kind", "most"), [(1, "params", 0.55), (1, "macs", 0.57), (2, "params", 0.57)])
@pytest.mark.parametrize("images", [X, None])
def test_heads_of_which_nothing_is_read_go_whole(shared: int, kind: str, most: float, images: Tensor | None) -> None:
    """Against the original whose output layer finds zeros where those heads come in; keys go with their queries."""
    idle = (1, 3) if shared == 1 else (1,)
    model = make(shared=shared, idle=idle)
    small = intrafusion.compress(model, X[:2], target={kind: most}, inputs=images, restore=None)
    count = HEADS // shared
    assert small.plan.sizes == {"q:blocks": count - len(idle)}
    (decision,) = [d for d in small.plan.decisions if d.reduced]
    assert (decision.kind, decision.proof) == ("block", "function")
    reference = copy.deepcopy(model)
    reference.o.weight.data.unflatten(1, (-1, shared * DIM))[:, list(idle)] = 0
    torch.testing.assert_close(small.model(X), reference(X))
    assert (small.model.heads, small.model.keys, small.model.dim) == (HEADS // 2, count - len(idle), DIM)


def test_heads_and_what_is_inside_of_them_are_cut_by_one_budget() -> None:
    """One head gives nothing, and half of the dimensions of the others: both go, and nothing is lost."""
    model = make(idle=(2,))
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            for parameter in layer.parameters():
                parameter[1::2] = 0
    most = size_of(Attention(1, HEADS - 1, DIM // 2), Inputs.of(X[:2])).params
    small = intrafusion.compress(model, X[:2], target={"params": most}, inputs=X, restore=None)
    assert (small.model.heads, small.model.keys, small.model.dim) == (HEADS - 1, HEADS - 1, DIM // 2)
    assert "stem" not in small.plan.sizes
    model.o.weight.data.unflatten(1, (-1, DIM))[:, 2] = 0
    torch.testing.assert_close(small.model(X), model(X))


def test_heads_are_offered_to_targets_that_need_not_be_uniform() -> None:
    graph = intrafusion.inspect(make(shared=2), X[:2])
    offered = lambda **options: {g.name for g in graph.groups if is_offered(g, Recipe.of(**options))}  # noqa: E731
    assert offered(target={"params": 0.5}) == {"q:blocks"}
    assert offered(target={"params": 0.5}, uniform=True) == set()
    assert offered(keep={"*:blocks": 0.5}) == set()


def test_heads_that_stay_are_not_listed() -> None:
    small = intrafusion.compress(make(), X[:2], target={"params": 0.99}, inputs=X, restore=None)
    assert not any(d.kind == "block" for d in small.plan.decisions)


def test_heads_stay_where_their_layers_are_excluded() -> None:
    small = intrafusion.compress(make(idle=(1, 3)), X[:2], target={"params": 0.6}, exclude="k", inputs=X, restore=None)
    assert not any(d.kind == "block" for d in small.plan.decisions)
    assert small.model.heads == HEADS


def test_rounding_and_the_least_size_are_not_about_heads() -> None:
    options = {"target": {"params": 0.55}, "round_to": 4, "min_channels": 6}
    small = intrafusion.compress(make(idle=(1, 3)), X[:2], inputs=X, restore=None, **options)
    assert small.plan.sizes == {"q:blocks": 2}


class Packed(nn.Module):
    """`nn.MultiheadAttention` takes the number of heads from the width of the stream: no head can go alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(self.up(x).relu()))


def test_no_channel_stays_for_the_sake_of_heads() -> None:
    """Stream and dimensions are cut in step as they are where heads are not offered."""
    torch.manual_seed(0)
    model = Packed().eval()
    small = intrafusion.compress(model, X[:2], target={"params": 0.3}, inputs=X, restore=None)
    assert not any(d.kind == "block" for d in small.plan.decisions)
    assert small.plan.sizes["stem"] < 16
    assert small.plan.sizes["attention#0"] < 4
    assert small.after.params / small.before.params == pytest.approx(0.3, abs=0.02)


# ---- cost, and numbers in attributes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize(("shared", "heads", "dim"), [(1, 4, 6), (1, 4, 8), (2, 4, 6), (1, 2, 8)])
def test_the_cost_of_heads_and_their_dimensions_is_that_of_networks_cut_by_hand(
    kind: str, shared: int, heads: int, dim: int
) -> None:
    """Against a network that is built with so many heads of that width; attributes follow in each that is tried."""
    model, inputs = make(shared=shared, heads=heads, dim=dim), Inputs.of(X[:2])
    graph = intrafusion.inspect(model, inputs)
    groups = [g for g in graph.reducible if ":sharing" not in g.name]
    blocks, inner = [g for g in groups if not g.is_channel], [g for g in groups if "#" in g.name and g.is_channel]
    fewer = {g.name: g.size - max(1, g.size // 4) for g in blocks} | {g.name: (g.size + 1) // 2 for g in inner}
    maps = {g.name: selection_map(torch.arange(fewer[g.name]), g.size) for g in (*blocks, *inner)}
    literals = operate(model, graph, maps, inputs).literals
    cost, doubt = find_believed_cost(model, graph, groups, inputs, kind, literals)
    assert doubt is None
    for left, width in product({heads // shared, heads // shared // 2}, {dim, dim // 2}):
        sizes = {g.name: left for g in blocks} | {g.name: width for g in inner}
        by_hand = size_of(Attention(shared, left * shared, width), inputs)
        assert cost(sizes) == pytest.approx(getattr(by_hand, kind))
        built = build_with_sizes(model, graph, sizes, literals)
        assert (built.heads, built.keys, built.dim) == (left * shared, left, width)


def test_what_is_spent_on_nested_groups_is_counted_once() -> None:
    """Of all choices of heads and widths within the budget, the greedy one has the least error but for one piece."""
    heads = ChannelGroup("heads", 4, (), kind="block", family=1)
    inside = [ChannelGroup(f"inside#{k}", 8, (), family=2) for k in range(4)]
    along = tuple(((g.name, "heads"), 8.0) for g in inside)
    sizes = {"heads": 4, **{g.name: 8 for g in inside}}
    cost = Cost(sizes, ((1.0, (32, 10), (along, ())),), 5.0)
    curves = {"heads": torch.tensor([9.0, 4.0, 1.0, 0.2, 0.0])}
    curves |= {g.name: torch.tensor([8 - k for k in range(9)]).double() ** 2 / 100 for g in inside}
    groups = [heads, *inside]
    assert len(families_of(groups)) == 2

    def error(left: int, width: int) -> float:
        return float(curves["heads"][left]) + 4 * float(curves["inside#0"][width])

    for budget in (260.0, 200.0, 125.0, 65.0):
        found = allocate(groups, curves, cost, budget)
        left, width = found["heads"], found["inside#0"]
        assert 5 + 10 * left * width == pytest.approx(cost(found))
        assert cost(found) <= budget
        best = min(error(a, b) for a in range(1, 5) for b in range(1, 9) if 5 + 10 * a * b <= budget)
        larger = [(left + 1, width), (left, width + 1)]
        assert best >= min([error(left, width), *(error(a, b) for a, b in larger if a <= 4 and b <= 8)]) - 1e-9
