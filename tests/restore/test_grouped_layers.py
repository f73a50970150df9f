"""Grouped, depthwise and transposed convolutions are solved: against plain least squares on an explicit design."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.graph import ChannelGraph
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.tensors import copy_model
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore import LeastSquares
from intrafusion.restore.statistics import find_output_merge

EXACT = LeastSquares(strength=0.0, scarcity=0.0, steps=0).solver
WHOLE: dict[str, ReductionMap] = {}


def design(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What each entry of the kernel is multiplied with, (outputs, places, entries): one forward pass for each entry."""
    probe, columns = copy_model(layer), []
    probe.bias = None
    weight = probe.weight.data
    own = weight.unflatten(0, (layer.groups, -1)) if layer.transposed else weight[None]  # (., ., ., *kernel)
    inputs = 1 if layer.transposed else 2
    taps = itertools.product(*map(range, layer.kernel_size))
    for tap, i in itertools.product(taps, range(own.shape[inputs])):
        weight.zero_()
        own.select(inputs, i)[..., *tap] = 1.0
        columns.append(probe(x).movedim(1, 0).flatten(1))
    return torch.stack(columns, 2)


def solve(x: Tensor, y: Tensor, weights: Tensor | None = None, constant: bool = True) -> tuple[Tensor, Tensor]:
    """Least squares for each output of (outputs, places, entries) and (outputs, places)."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], 2) if constant else x
    root = torch.ones_like(y[0]) if weights is None else weights.sqrt()
    found = torch.linalg.lstsq(
        x.double() * root[:, None].double(), (y * root)[..., None].double(), driver="gelsd"
    ).solution[..., 0]
    return (found[:, :-1], found[:, -1]) if constant else (found, torch.zeros(len(y), dtype=torch.float64))


def as_rows(layer: nn.Conv2d, weight: Tensor) -> Tensor:
    """(outputs, entries) in the order of `design`."""
    if layer.transposed:
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.movedim(1, -1).flatten(1)


class Behind(nn.Module):
    """A layer to be solved behind another one, and perhaps before a norm."""

    def __init__(self, layer: nn.Module, norm: bool, dims: int) -> None:
        super().__init__()
        self.stem = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 3, padding=1)
        self.layer = layer
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.stem(x).relu())).tanh()


CASES = [
    *((dims, g, t, {}) for dims in (1, 2, 3) for g in (1, 2, 4) for t in (False, True) if g > 1 or t),
    *((2, g, t, {"stride": 2, "padding": 1}) for g in (2, 4) for t in (False, True)),
    *((2, g, t, {"stride": 2, "padding": 2, "dilation": 2}) for g in (1, 4) for t in (False, True) if g > 1 or t),
    *((2, 4, False, {"padding": 1, "padding_mode": m}) for m in ("reflect", "circular", "replicate")),
    (2, 4, False, {"padding": "same", "dilation": 2}),
    (1, 2, True, {"stride": 3, "output_padding": 2}),
    (2, 1, True, {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)}),
]


@pytest.mark.parametrize("norm", [False, True], ids=["alone", "norm"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("dims", "groups", "transposed", "options"), CASES, ids=str)
def test_a_layer_is_what_least_squares_says(
    dims: int, groups: int, transposed: bool, options: dict[str, object], norm: bool, bias: bool
) -> None:
    takes = bias or (norm and not (transposed and groups > 1))  # the weight of these has no dimension of all outputs
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    model = randomise_(Behind(kind(4, 8, 3, groups=groups, bias=bias, **options), norm, dims)).eval()
    x = torch.randn(9, 3, *(6, 7, 5)[:dims])
    graph = intrafusion.inspect(model, x[:1])
    small = copy_model(model)
    small.stem.weight.data.add_(0.2 * torch.randn_like(small.stem.weight))
    with torch.no_grad():
        inputs, wanted = small.stem(x).relu(), model.norm(model.layer(model.stem(x).relu()))
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt() if norm else torch.ones(8)
        rest = small.norm(torch.zeros_like(wanted)) if norm else torch.zeros_like(wanted)
        per_output = lambda t: t.movedim(1, 0).flatten(1)  # noqa: E731
        columns = design(model.layer, inputs)
        weight, constant = solve(columns * scale[:, None, None], per_output(wanted - rest), constant=takes)
    EXACT.solve_(small, WHOLE, model, graph, [Inputs.of(x)], left=["stem"])
    torch.testing.assert_close(as_rows(small.layer, small.layer.weight.double()), weight, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        found = per_output(small.norm(small.layer(inputs)) - rest)
        expected = (columns * scale[:, None, None] @ weight.float()[..., None])[..., 0] + constant.float()[:, None]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_padded_places_count_nothing_in_a_depthwise_layer() -> None:
    model = randomise_(Behind(nn.Conv1d(4, 4, 3, groups=4), False, 1)).eval()
    x, graph = torch.randn(5, 3, 9), intrafusion.inspect(model, torch.randn(1, 3, 9))
    small = copy_model(model)
    small.stem.weight.data.mul_(0.5)
    counts = (torch.rand(5, 7) > 0.4).double() * torch.rand(5, 1)
    with torch.no_grad():
        inputs, wanted = small.stem(x).relu(), model.layer(model.stem(x).relu())
        weight, constant = solve(design(model.layer, inputs), wanted.movedim(1, 0).flatten(1), counts.flatten().float())
    call = Inputs.of(x)
    object.__setattr__(call, "weights", RowWeights((counts,)))
    EXACT.solve_(small, WHOLE, model, graph, [call], left=["stem"])
    torch.testing.assert_close(small.layer.weight.double().flatten(1), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small.layer.bias.double(), constant, atol=1e-4, rtol=1e-4)


class Groups(nn.Module):
    """Depthwise, depthwise with two outputs each, grouped, and both transposed, between dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth, self.norm = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.BatchNorm2d(8),
        )
        self.wide, self.point = nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, groups=4)
        self.up, self.deep = nn.ConvTranspose2d(8, 12, 3, groups=4, stride=2), nn.ConvTranspose2d(12, 12, 2, groups=12)
        self.dense, self.last = nn.ConvTranspose2d(12, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.norm(self.depth(self.first(x).relu())).relu()).relu()
        x = self.up(self.grouped(self.point(x).relu()).relu()).relu()
        return self.last(self.dense(self.deep(x).relu()).relu())


GROUPED = {"depth": 8, "wide": 16, "grouped": 8, "up": 12, "deep": 12, "dense": 6}


def given(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each layer reads, and gives."""
    read, gave = {}, {}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda _, args, out, n=n: (read.__setitem__(n, args[0]), gave.__setitem__(n, out))[1] and None
        )
        for n in GROUPED
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return read, gave


def merge_of(layer: str, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> Tensor:
    """What became of the outputs of a layer, told by its bias, or the norm behind it."""
    name = "norm.running_mean" if layer == "depth" else f"{layer}.bias"
    found = [(m, maps[g.name].merge) for g in graph.groups if g.name in maps for m in g.members if m.tensor == name]
    matrix = torch.zeros(sum(merge.shape[0] * m.positions.shape[1] for m, merge in found), GROUPED[layer])
    kept = sorted(p for m, merge in found for p in m.positions[: len(merge)].ravel().tolist())
    for m, merge in found:
        for new, old in itertools.product(range(merge.shape[0]), range(merge.shape[1])):
            for slot in range(m.positions.shape[1]):
                matrix[kept.index(int(m.positions[new, slot])), int(m.positions[old, slot])] = merge[new, old]
    return matrix


@pytest.mark.parametrize("how", ["select", "intrafusion", "pivot"])
def test_the_outputs_of_a_smaller_layer_are_those_of_the_merged_channels(how: str) -> None:
    model, x = randomise_(Groups()).eval(), torch.randn(12, 3, 9, 9)
    graph = intrafusion.inspect(model, x[:1])
    looked = intrafusion.restore.calibrate(model, x[:1], images=x)
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.5, reducer=how), x[:1], calibration=looked)
    small = intrafusion.apply(model, plan, x[:1], graph=graph)
    assert not small.rolled_back
    _, gave = given(model, x)
    maps = small.plan.maps
    for name in GROUPED:
        solved = copy_model(small.model)
        others = {n for n, m in model.named_modules() if n != name}
        EXACT.solve_(solved, maps, model, graph, [Inputs.of(x)], left=others)
        layer, before = solved.get_submodule(name), small.model.get_submodule(name)
        read, _ = given(small.model, x)
        with torch.no_grad():
            norm = name == "depth"
            wanted = torch.einsum(
                "mn,bn...->bm...", merge_of(name, graph, maps), model.norm(gave[name]) if norm else gave[name]
            )
            wanted = solve_norm(small.model.norm, wanted) if norm else wanted
            columns, rows = design(before, read[name]), wanted.movedim(1, 0).flatten(1)
            weight, constant = solve(columns, rows)
            expected = (columns.double() @ weight[..., None])[..., 0] + constant[:, None]
            found = layer(read[name])
            if norm:  # which took the constant
                found = solve_norm(small.model.norm, solved.norm(found))
        torch.testing.assert_close(found.movedim(1, 0).flatten(1), expected.float(), atol=2e-3, rtol=1e-3)


def test_the_outputs_of_groups_that_go_whole() -> None:
    """A transposed grouped convolution has no dimension of all its outputs: its bias tells the same."""
    model = randomise_(Groups()).eval()
    graph = intrafusion.inspect(model, torch.randn(1, 3, 9, 9))
    (blocks,) = (g for g in graph.groups if not g.is_channel and any(m.module == "up" for m in g.members))
    kept = torch.eye(4, dtype=torch.float64)[[1, 3]]
    maps = {blocks.name: ReductionMap(kept, kept.T)}
    for name in ("grouped", "up"):
        found = find_output_merge(Layer(name, model.get_submodule(name)), graph, maps)
        assert found is not None
        assert torch.equal(found.float(), merge_of(name, graph, maps))


def solve_norm(norm: nn.Module, y: Tensor) -> Tensor:
    """What a norm must read to give y."""
    view = lambda t: t.reshape(-1, 1, 1)  # noqa: E731
    return (y - view(norm.bias)) / view(norm.weight) * view(norm.running_var + norm.eps).sqrt() + view(
        norm.running_mean
    )
