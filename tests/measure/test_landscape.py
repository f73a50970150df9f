"""Smaller networks put back at full width compute the same; the plane runs through its corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import intrafusion
from intrafusion.errors import ModelError
from intrafusion.lab import zoo
from intrafusion.measure.landscape import Plane, copy_with_tensors, embed_network, fold_tensors, match_places
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce import ReductionMap, selection_map


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, channels flattened into a linear layer, a batch norm in use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.head = nn.Linear(12 * 4, 3)
        with torch.no_grad():
            for t in (self.norm.running_mean, self.norm.bias, self.norm.weight):
                t.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.depthwise(self.norm(self.first(x)).relu()).relu()
        return self.head(self.grouped(x).relu().flatten(1))


def residual():
    model = zoo.build("digits_resnet").eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for t in (norm.running_mean, norm.bias, norm.weight):
                t.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


NETWORKS = {
    "residual": (residual, zoo.example_input("digits_resnet", batch=2)),
    "grouped": (lambda: Grouped().eval(), torch.randn(2, 2, 2, 2)),
}


def reduced(model, graph, example, reducer):
    recipe = intrafusion.Recipe.of(keep=0.5, reducer=reducer, restore=None)
    return intrafusion.apply(model, intrafusion.decide(model, graph, recipe), example, graph=graph)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("reducer", ["select", "intrafusion"])
def test_at_full_width_it_computes_what_the_smaller_network_computes(network, reducer):
    make, example = NETWORKS[network]
    model = make()
    graph = intrafusion.inspect(model, example)
    small = reduced(model, graph, example, reducer)
    assert small.plan.maps.keys() == {g.name for g in graph.reducible if g.is_channel} != set()
    wide = embed_network(model, small.model, graph, match_places(small.plan.maps), example)
    assert {n: tuple(t.shape) for n, t in wide.items()} == {n: tuple(t.shape) for n, t in named_tensors(model).items()}
    images = torch.randn(5, *example.shape[1:], dtype=torch.float64)
    found = copy_with_tensors(model.double(), wide)(images)
    torch.testing.assert_close(found, small.model.double()(images), rtol=1e-6, atol=1e-8)


def test_pruned_channels_lie_where_they_were_and_the_others_are_zero():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    with torch.no_grad():
        model[0].weight *= torch.tensor([1.0, 9, 1, 9, 9, 1])[:, None]
    example = torch.randn(2, 3, dtype=torch.float64)
    graph = intrafusion.inspect(model, example)
    small = reduced(model, graph, example, "select")
    wide = embed_network(model, small.model, graph, match_places(small.plan.maps), example)
    kept = wide["0.weight"].abs().sum(1) > 0
    assert kept.sum() == 3
    assert torch.equal(wide["0.weight"][kept], model[0].weight[kept])
    assert torch.equal(wide["2.weight"][:, kept], model[2].weight[:, kept])
    assert not wide["2.weight"][:, ~kept].any()
    assert not wide["0.bias"][~kept].any()


def test_the_original_of_a_network_with_batch_norms_is_itself_when_folded():
    model, example = NETWORKS["residual"][0](), NETWORKS["residual"][1]
    graph = intrafusion.inspect(model, example)
    folded = copy_with_tensors(model, fold_tensors(model, graph))
    torch.testing.assert_close(folded(example), model(example), rtol=1e-4, atol=1e-4)
    assert not torch.equal(folded.conv1.weight, model.conv1.weight)


def test_behind_a_layer_norm_it_says_that_zeros_change_the_function():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    example = torch.randn(2, 4)
    graph = intrafusion.inspect(model, example)
    small = reduced(model, graph, example, "select")
    assert small.plan.maps
    with pytest.raises(ModelError, match="normalised together"):
        embed_network(model, small.model, graph, match_places(small.plan.maps), example)


def test_each_old_channel_is_used_once_and_ties_follow_the_other_map():
    merge = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.float64)
    fused = {"g": ReductionMap(merge, merge.T)}
    assert sorted(match_places({"g": ReductionMap(torch.ones(3, 3), torch.ones(3, 3))})["g"]) == [0, 1, 2]
    for kept in ([0, 1], [0, 3], [1, 3]):
        assert match_places(fused, {"g": selection_map(torch.tensor(kept), 4)})["g"].tolist() == kept


def test_the_plane_runs_through_its_corners_at_their_distances():
    generator = np.random.default_rng(0)
    points = [{"a": torch.from_numpy(generator.normal(size=(3, 2))), "b": torch.ones(1).double() * i} for i in range(3)]
    plane = Plane.through(*points)
    flat = lambda w: np.concatenate([w["a"].numpy().ravel(), w["b"].numpy()])  # noqa: E731
    for (x, y), point in zip(plane.corners, points, strict=True):
        np.testing.assert_allclose(flat(plane.at(x, y)), flat(point), atol=1e-12)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        distance = np.linalg.norm(flat(points[i]) - flat(points[j]))
        assert np.linalg.norm(np.subtract(plane.corners[i], plane.corners[j])) == pytest.approx(distance)
    xs, ys = plane.axes(5, margin=0.5)
    corners = np.array(plane.corners)
    extent = np.ptp(corners, axis=0)
    np.testing.assert_allclose([xs[0], ys[0]], corners.min(0) - 0.5 * extent)
    np.testing.assert_allclose([xs[-1], ys[-1]], corners.max(0) + 0.5 * extent)
    assert len(xs) == len(ys) == 5


def test_three_points_on_a_line_are_refused():
    on_line = [{"a": torch.tensor([1.0, 2.0]).double() * k} for k in (1, 2, 5)]
    for points in (on_line, [on_line[0], on_line[0], on_line[1]]):
        with pytest.raises(ValueError, match="got two that are the same|got a line"):
            Plane.through(*points)
