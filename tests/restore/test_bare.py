"""Weights that functions multiply with are solved as those of layers are: attention's projections, F.linear, x @ w."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion.network.batches import cut_call
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import find_layers, is_solvable
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.restore import LeastSquares
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.shelf import Shelf
from intrafusion.restore.statistics import find_merge
from intrafusion.restore.targets import record_targets

EXACT = LeastSquares(strength=0.0, scarcity=0.0, steps=0).solver


class Attention(nn.Module):
    """Self-attention, attention to the first tokens, and products with parameters of its own."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.own = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.across = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=False)
        self.rows, self.shift = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        self.columns = nn.Parameter(torch.randn(6, 5))
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.own(x, x, x, need_weights=False)[0]
        first = x[:, :3] if self.batch_first else x[:3]
        x = x + self.across(x, first, first)[0]
        return F.linear(x, self.rows, self.shift).tanh() @ self.columns


def solve(model: nn.Module, small: nn.Module, x: Tensor, left: tuple[str, ...] = ()) -> set[str]:
    """Which layers were changed."""
    graph = intrafusion.inspect(model, x[:1])
    return set(EXACT.solve_(small, {}, model, graph, [Inputs.of(x)], left=left).changes)


@pytest.mark.parametrize("batch_first", [True, False])
def test_spoilt_weights_are_solved_for(batch_first: bool) -> None:
    """With more rows than unknowns and no ridge, the original weights are the one solution."""
    model, x = randomise_(Attention(batch_first)).eval(), torch.randn(40, 30, 12)
    small = copy_model(model)
    spoilt = {name: t for name, t in named_tensors(small).items() if not name.startswith("embed")}
    for tensor in spoilt.values():
        tensor.data.add_(0.2 * torch.randn_like(tensor))
    found = solve(model, small, x)
    parts = {"own.in_proj_weight[0]", "own.out_proj.weight[0]", "rows[0]", "columns[0]", "across.out_proj.weight[0]"}
    assert found == parts | {"across.in_proj_weight[0]", "across.in_proj_weight[1]"}
    for name, tensor in spoilt.items():
        torch.testing.assert_close(tensor, named_tensors(model)[name], atol=2e-3, rtol=2e-3)


class Far(nn.Module):
    """Attention to something of another width: three weights share a bias, of which each has a third."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.far = nn.Linear(12, 8), nn.Linear(12, 5)
        self.across = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        far = self.far(x).tanh()
        return self.head(self.across(self.embed(x).tanh(), far, far, need_weights=False)[0].tanh())


@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_that_share_a_bias_in_parts_are_solved_for(batch_first: bool) -> None:
    model, x = randomise_(Far(batch_first)).eval(), torch.randn(40, 30, 12)
    small = copy_model(model)
    spoilt = {name: t for name, t in named_tensors(small).items() if name.startswith("across")}
    for tensor in spoilt.values():
        tensor.data.add_(0.2 * torch.randn_like(tensor))
    weights = {f"across.{name}_proj_weight[0]" for name in "qkv"}
    assert solve(model, small, x) == {*weights, "across.out_proj.weight[0]"}
    for name, tensor in spoilt.items():
        torch.testing.assert_close(tensor, named_tensors(model)[name], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("batch_first", [True, False])
def test_parts_of_a_bias_are_found_again_in_a_smaller_network(batch_first: bool) -> None:
    """The parts begin elsewhere in it: solved with the wrong ones, it would give something else."""
    model, x, unseen = randomise_(Far(batch_first)).eval(), torch.randn(60, 5, 12), torch.randn(60, 5, 12)
    graph, small = intrafusion.inspect(model, x[:1]), intrafusion.compress(model, x[:1], 0.75, restore=None)
    found = EXACT.solve_(small.model, small.plan.maps, model, graph, [Inputs.of(x)])
    assert small.model.across.in_proj_bias.shape == (18,)
    assert {f"across.{name}_proj_weight[0]" for name in "qkv"} <= found.changes.keys()
    inputs: dict[str, Tensor] = {}
    small.model.across.register_forward_pre_hook(lambda _, args: inputs.update(zip("qk", args, strict=False)))
    merge, bias = find_merge("across.q_proj_weight", 8, graph, small.plan.maps), small.model.across.in_proj_bias
    assert merge is not None
    with torch.no_grad():
        small.model(unseen)
        given = F.linear(inputs["q"], small.model.across.q_proj_weight, bias[:6])
        wanted = F.linear(model.embed(unseen).tanh(), model.across.q_proj_weight, model.across.in_proj_bias[:8])
    torch.testing.assert_close(given.mean((0, 1)), (wanted @ merge.T.float()).mean((0, 1)), atol=0.1, rtol=0.05)


def test_attention_in_a_smaller_network_comes_nearer_to_the_original_on_unseen_inputs() -> None:
    model, x, unseen = randomise_(Attention()).eval(), torch.randn(60, 5, 12), torch.randn(60, 5, 12)
    graph, errors = intrafusion.inspect(model, x[:1]), []
    for bare in (False, True):
        small = intrafusion.compress(model, x[:1], 0.75, restore=None)
        LeastSquares(strength=1e-3).solver.solve_(small.model, small.plan.maps, model, graph, [Inputs.of(x)], bare=bare)
        with torch.no_grad():
            errors.append(float((small.model(unseen) - model(unseen)).square().mean()))
    assert small.model.own.in_proj_weight.shape[1] < 8
    assert errors[1] < 0.9 * errors[0]


def test_what_was_solved_is_written_into_the_network_itself() -> None:
    model, x = randomise_(Attention()).eval(), torch.randn(60, 5, 12)
    small = intrafusion.compress(model, x[:1], 0.75, restore=None)
    before = {name: t.detach().clone() for name, t in named_tensors(small.model).items()}
    LeastSquares(strength=1e-3)(small, model, intrafusion.inspect(model, x[:1]), x)
    changed = {name for name, t in named_tensors(small.model).items() if not torch.equal(t, before[name])}
    assert {"own.in_proj_weight", "own.in_proj_bias", "own.out_proj.weight", "rows", "shift", "columns"} <= changed


class Padding(nn.Conv2d):
    """As timm's Conv2dSame, its forward pads by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_that_pads_in_a_forward_of_its_own_is_solved_by_what_it_computes(groups: int) -> None:
    layers = (nn.Conv2d(3, 6, 1), nn.ReLU(), Padding(6, 6, 3, stride=2, groups=groups, bias=False), nn.BatchNorm2d(6))
    model = randomise_(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(6, 4, 1))).eval()
    small, x = copy_model(model), torch.randn(40, 3, 10, 10)
    small[2].weight.data.add_(torch.randn_like(small[2].weight))
    small[3].running_mean.add_(1.0)
    assert solve(model, small, x) == {"2.weight[0]"}
    torch.testing.assert_close(small[2].weight, model[2].weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(small[3].running_mean, model[3].running_mean, atol=1e-3, rtol=1e-3)


class Sums(nn.Module):
    """A product with a parameter that enters a sum, and one whose output gets a bias along another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Linear(5, 6), nn.Parameter(torch.randn(6, 6))
        self.kernel, self.along = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = x + F.linear(x, self.branch)
        return F.conv1d(x[:, None], self.kernel) + self.along


def test_a_product_that_enters_a_sum_makes_up_for_the_other_branch() -> None:
    model, x = randomise_(Sums()).eval(), torch.randn(60, 5)
    small = copy_model(model)
    small.first.weight.data.mul_(0.7)
    assert solve(model, small, x, left=("first",)) == {"branch[0]", "kernel[0]"}
    with torch.no_grad():
        h, y = small.first(x).tanh(), model.first(x).tanh()
        wanted = y + F.linear(y, model.branch)
    expected = torch.linalg.lstsq(h.double(), (wanted - h).double()).solution.T
    torch.testing.assert_close(small.branch.double(), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(small.along, model.along)


class Residual(nn.Module):
    """Attention that enters a sum."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.own, self.batch_first = nn.MultiheadAttention(8, 2, batch_first=batch_first), batch_first

    def hidden(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return h if self.batch_first else h.transpose(0, 1)

    def read_heads(self, h: Tensor) -> Tensor:
        """What the output projection reads."""
        plain = copy_model(self.own)
        plain.out_proj.weight.data.copy_(torch.eye(8))
        plain.out_proj.bias.data.zero_()
        return plain(h, h, h, need_weights=False)[0].flatten(0, 1)

    def attend(self, h: Tensor) -> Tensor:
        return self.own(h, h, h, need_weights=False)[0].flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.head((h + self.own(h, h, h, need_weights=False)[0]).tanh())


class ResidualByHand(Residual):
    """A product of rows in which it stands for attention, whose rows are read as they were, too, where that is said."""

    def __init__(self, twice: bool) -> None:
        super().__init__(batch_first=True)
        self.twice = twice

    def read_heads(self, h: Tensor) -> Tensor:
        return h.square().flatten(0, 1)

    def attend(self, h: Tensor) -> Tensor:
        return F.linear(self.read_heads(h), self.own.out_proj.weight, self.own.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        rows = self.attend(h)
        moved = rows.view(h.shape)
        more = rows.square().view(h.shape) if self.twice else 0.0
        return self.head((h + moved).tanh() + more)


@pytest.mark.parametrize("parts", [1, 3], ids=["one call", "batches"])
@pytest.mark.parametrize(
    ("build", "summed"),
    [
        (lambda: Residual(True), True), (lambda: Residual(False), True),
        (lambda: ResidualByHand(twice=False), True), (lambda: ResidualByHand(twice=True), False),
    ],
    ids=["attention", "tokens first", "by hand", "read elsewhere too"],
)  # fmt: skip
def test_rows_that_are_moved_into_a_sum_make_up_for_the_other_branch(
    build: Callable[[], Residual], summed: bool, parts: int
) -> None:
    model, x = randomise_(build()).eval(), torch.randn(60, 7, 5)
    small, graph = copy_model(model), intrafusion.inspect(model, x[:2])
    small.first.weight.data.mul_(0.7)
    left = ("first", "own")  # keys, queries and values stay as they were
    EXACT.solve_(small, {}, model, graph, [Inputs.of(part) for part in x.chunk(parts)], left=left)
    with torch.no_grad():
        h, y = small.hidden(x), model.hidden(x)
        wanted = model.attend(y) + ((y - h).flatten(0, 1) if summed else 0.0)
        rows = small.read_heads(h)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).double()
    expected = torch.linalg.lstsq(rows, wanted.double()).solution.T
    torch.testing.assert_close(small.own.out_proj.weight.double(), expected[:, :8], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(small.own.out_proj.bias.double(), expected[:, 8], atol=2e-3, rtol=2e-3)


class Reading(nn.Module):
    """Weights that more is done with than one product."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_up, self.scaled = nn.Embedding(7, 5), Scaled(5, 5)
        self.twice, self.squared = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))
        self.left, self.right, self.shared = (nn.Parameter(torch.randn(*s)) for s in ((5, 5), (5, 5), (5,)))
        self.whole, self.good = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(x) + self.looked_up(torch.arange(5)).sum(0)
        x = (x @ self.twice).tanh() @ self.twice + F.linear(x, self.looked_up.weight[:5])
        x = x @ self.squared + self.squared.square().sum()
        x = F.linear(F.linear(x, self.left, self.shared), self.right, self.shared)
        x = F.linear(x, self.whole) + F.linear(x, self.whole[:2]).sum()
        return F.linear(x, self.good)


def test_weights_that_are_read_in_another_way_too_are_left_alone() -> None:
    model, x = randomise_(Reading()).eval(), torch.randn(50, 5)
    small = copy_model(model)
    for parameter in small.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert solve(model, small, x) == {"good[0]"}


def test_layers_that_are_to_be_left_are_not_solved_as_bare_weights() -> None:
    model, x = randomise_(Attention()).eval(), torch.randn(20, 5, 12)
    small = copy_model(model)
    for parameter in small.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    found = solve(model, small, x, left=("own", "own.out_proj", "across", "across.out_proj", ""))
    assert found == {"embed"}


def test_the_rows_of_a_bias_added_later_are_those_with_it() -> None:
    """A product with a bias is taken apart where its input does not lie in a row."""
    model, x = randomise_(Attention()).eval(), torch.randn(20, 5, 12)
    graph = intrafusion.inspect(model, x[:1])
    batches = [Inputs.of(x)]
    store = RowStore(PlaceSampler(batches, 20_000, 0), Shelf(2**30))
    record_targets(model, find_layers(model, graph, is_solvable), batches, store, graph=graph)
    with torch.no_grad():
        h = model.embed(x)  # in the order of the images, which attention turns
        wanted = F.linear(h, model.own.in_proj_weight, model.own.in_proj_bias).flatten(0, 1)
    torch.testing.assert_close(store.take("own.in_proj_weight[0]"), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [20_000, 150], ids=["all places", "sampled"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_batches_give_what_one_call_gives(batch_first: bool, rows: int) -> None:
    """Attention turns what it reads, so that the images of its rows do not lie one after another."""
    model, x = randomise_(Turned(batch_first)).eval(), torch.randn(24, 7, 12)
    graph = intrafusion.inspect(model, x[:1])
    made = intrafusion.compress(model, x[:1], 0.75, restore=None)
    found = []
    for batches in ([Inputs.of(x)], cut_call(Inputs.of(x), 16), cut_call(Inputs.of(x), 1)):
        small = copy_model(made.model)
        solved = LeastSquares(rows=rows).solver.solve_(small, made.plan.maps, model, graph, batches)
        found.append((solved.changes.keys(), named_tensors(small)))
    assert found[0][0] >= {"inner.own.in_proj_weight[0]", "inner.own.out_proj.weight[0]", "inner.columns[0]"}
    for names, tensors in found[1:]:
        assert names == found[0][0]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, found[0][1][name], atol=2e-5, rtol=2e-4)


class Turned(nn.Module):
    """Attention on images of which the first dimension is one of the images, whatever it wants."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner, self.batch_first = Attention(batch_first), batch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.batch_first else self.inner(x.transpose(0, 1)).transpose(0, 1)


class Spectral(nn.Module):
    """Complex weights, of a product and of a layer, between a Fourier transform and the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.cfloat))
        self.layer = nn.Linear(5, 5, dtype=torch.cfloat)
        self.lift, self.a, self.head = nn.Linear(3, 6), nn.Linear(5, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = self.layer(torch.fft.rfft(self.lift(x), dim=1) @ self.weight)
        return self.head(self.a(torch.fft.irfft(spectrum, n=x.shape[1], dim=1)).relu())


@pytest.mark.filterwarnings("error:Casting complex")
def test_complex_weights_are_left_alone() -> None:
    """Half of what they give was cast away before they were compared."""
    torch.manual_seed(0)
    model, x = Spectral(), torch.randn(64, 8, 3)
    small = intrafusion.compress(model, x[:2], keep=0.5, inputs=x)
    assert small.restored is not None
    assert {d.group: d.m for d in small.plan.decisions}["a"] == 8
    for name in ("weight", "layer.weight", "layer.bias"):
        assert torch.equal(small.model.get_parameter(name), model.get_parameter(name))


def test_weights_that_an_einsum_lays_out_anew() -> None:
    """What tells where each number of a weight went lies in memory otherwise than the weight, which views may mind."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.stem = nn.Linear(6, 4), nn.Linear(6, 16)
            self.into, self.back = nn.Parameter(torch.randn(4, 16, 10)), nn.Parameter(torch.randn(4, 10, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            shares, h = self.gate(x).softmax(-1), self.stem(x).tanh()
            h = torch.einsum("nte,ntd,edh->neth", shares, h, self.into).relu()
            return self.head(torch.einsum("neth,ehd->ntd", h, self.back).tanh())

    torch.manual_seed(0)
    x = torch.randn(64, 5, 6)
    (step,) = intrafusion.compress(Experts().eval(), x[:4], 0.5, inputs=x).restored
    assert step.error_after is not None
    assert step.error_before is not None
    assert step.error_after < step.error_before
