"""Closed-form statistics: against formulas written down once more, against sampling, and against real images."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import IntraFusion, Recipe
from intrafusion.compressed import Compressed
from intrafusion.graph import ChannelGraph
from intrafusion.network.tensors import named_tensors
from intrafusion.restore import ClosedForm
from intrafusion.restore.statistics import correlations, likeness, merge_variances

D = torch.float64


def made(*layers: nn.Module) -> nn.Module:
    return randomise_(nn.Sequential(*layers)).eval()


def plain() -> nn.Module:
    return made(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))


def shrunk(model: nn.Module, **options: object) -> tuple[Compressed, ChannelGraph]:
    example = torch.zeros(1, 4 if isinstance(model, Joined) else next(model.parameters()).shape[1], 9, 9)
    graph = intrafusion.inspect(model, example)
    plan = intrafusion.decide(model, graph, Recipe.of(**options))
    return intrafusion.apply(model, plan, example, graph=graph), graph


def patches(reach: float, kernel: int, inputs: int, samples: int, seed: int = 0) -> Tensor:
    """Gaussian patches (samples, inputs, kernel, kernel) of the prior, drawn by NumPy."""
    at = np.array([(i, j) for i in range(kernel) for j in range(kernel)], float)
    apart = np.sqrt(((at[:, None] - at[None]) ** 2).sum(-1))
    k = np.exp(-apart / reach) if reach else np.eye(len(at))
    draws = np.random.default_rng(seed).multivariate_normal(np.zeros(len(at)), k, size=(samples, inputs))
    return torch.from_numpy(draws.reshape(samples, inputs, kernel, kernel))


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [0.0, 1.0, 3.0])
def test_correlations_and_variances_are_those_of_samples(reach: float) -> None:
    rows, merge = torch.randn(5, 2, 3, 3, dtype=D), torch.randn(3, 5, dtype=D)
    rows[3] = rows[1] * 2 + 0.1 * rows[3]
    y = torch.einsum("scij,ncij->sn", patches(reach, 3, 2, 100_000), rows)
    found = correlations(rows, reach)
    torch.testing.assert_close(found, torch.corrcoef(y.T), atol=0.02, rtol=0)
    predicted = merge_variances(merge, y.std(0), found, 1e-3)
    torch.testing.assert_close(predicted, (y @ merge.T).var(0), atol=0, rtol=0.04)


def test_for_cluster_means_it_is_the_formula_of_the_paper() -> None:
    """gamma N / sqrt(N + (N^2 - N) E), E the mean cosine over pairs: the factor undoes what averaging takes away."""
    rows = torch.randn(4, 6, dtype=D)
    cosine = F.cosine_similarity(rows[:, None], rows[None], dim=2)
    e, n, gamma = float((cosine.sum() - 4) / 12), 4, 1.7
    mean = torch.full((1, 4), 1 / 4, dtype=D)
    variance = merge_variances(mean, torch.full((4,), gamma, dtype=D), correlations(rows[..., None, None], 0.0), 1e-3)
    assert float(gamma / variance.sqrt()) == pytest.approx(n / (n + (n**2 - n) * e) ** 0.5)


def test_opposite_channels_meet_the_floor_and_zero_rows_do_not_give_nan() -> None:
    rows = torch.tensor([[1.0], [-1.0], [0.0]], dtype=D)
    alike = correlations(rows, 1.0)
    assert alike.tolist() == [[1, -1, 0], [-1, 1, 0], [0, 0, 1]]
    mean = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=D)
    assert merge_variances(mean, torch.ones(3, dtype=D), alike, 1e-3).tolist() == [0.0005, 1.0]


def test_likeness_of_a_kernel() -> None:
    assert torch.equal(likeness((2, 2), 0.0), torch.eye(4, dtype=D))
    assert likeness((), 1.0).tolist() == [[1.0]]
    expected = [[1, np.exp(-0.5), np.exp(-1)], [np.exp(-0.5), 1, np.exp(-0.5)], [np.exp(-1), np.exp(-0.5), 1]]
    torch.testing.assert_close(likeness((3,), 2.0), torch.tensor(expected, dtype=D))


# ---- in a network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["source", "target", "function"])
@pytest.mark.parametrize(("affine", "inputs"), [(True, 2), (False, 2), (True, 1)])
def test_outputs_get_the_mean_and_variance_of_their_parts(normalization: str, affine: bool, inputs: int) -> None:
    """On the inputs that the formula assumes, with the statistics that the norm remembers true of them."""
    model = made(nn.Conv2d(inputs, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = patches(1.0, 3, inputs, 40_000).float()
    conv, norm = model[0], model[1]
    with torch.no_grad():
        u = conv(x)
        norm.running_mean, norm.running_var = u.mean((0, 2, 3)), u.var((0, 2, 3))
        y = norm(u).flatten(1).double()
    graph = intrafusion.inspect(model, x[:1])
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.4, reducer=IntraFusion(normalization), include="0"))
    small = intrafusion.apply(model, plan, x[:1], graph=graph)
    ClosedForm()(small, model, graph)
    merge = small.plan.maps["0"].merge
    mean = merge / merge.sum(1, keepdim=True)
    with torch.no_grad():
        found = small.model[1](small.model[0](x)).flatten(1).double()  # type: ignore[index]
    torch.testing.assert_close(found.mean(0), mean @ y.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(found.var(0), mean @ y.var(0), atol=0, rtol=0.05)
    remembered = small.model[1]  # type: ignore[index]
    with torch.no_grad():
        u = small.model[0](x)  # type: ignore[index]
    torch.testing.assert_close(remembered.running_var, u.var((0, 2, 3)), atol=0, rtol=0.05)


def test_source_and_function_become_one_network() -> None:
    """The two differ by a factor per channel, which is what the closed form decides; they share the unmerge."""
    model, x = plain(), torch.randn(5, 3, 9, 9)
    outputs = []
    for normalization in ("source", "function"):
        small, graph = shrunk(model, keep=0.5, reducer=IntraFusion(normalization))
        ClosedForm()(small, model, graph)
        outputs.append(small.model(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_selected_channels_keep_every_bit() -> None:
    model = plain()
    small, graph = shrunk(model, keep=0.5, reducer="select")
    before = copy.deepcopy(small.model.state_dict())
    ClosedForm()(small, model, graph)
    assert all(torch.equal(t, before[n]) for n, t in small.model.state_dict().items())


def test_exact_duplicates_stay_exact() -> None:
    model, x = plain(), torch.randn(4, 3, 9, 9)
    for name, tensor in named_tensors(model).items():
        if name.startswith(("0.", "1.")) and tensor.dim():
            tensor.data[4:] = tensor.data[:4]
    model[3].weight.data[:, 4:] = model[3].weight.data[:, :4]  # type: ignore[index, union-attr]
    first = lambda group, weights, observations: -torch.arange(group.size).double()  # noqa: E731
    small, graph = shrunk(model, keep=0.5, reducer=IntraFusion("function"), importance=first, include="0")
    ClosedForm()(small, model, graph)
    torch.testing.assert_close(small.model(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_second_time_and_after_others_it_changes_nothing() -> None:
    model = plain()
    small, graph = shrunk(model, keep=0.5, reducer=IntraFusion("function"))
    fresh = copy.deepcopy(small.model.state_dict())
    ClosedForm()(small, model, graph)
    once = copy.deepcopy(small.model.state_dict())
    assert not torch.equal(once["1.running_var"], fresh["1.running_var"])
    ClosedForm()(small, model, graph)
    assert all(torch.equal(t, once[n]) for n, t in small.model.state_dict().items())
    small.model.load_state_dict(fresh)
    small.model[1].running_mean += 0.5  # type: ignore[index, operator]
    touched = copy.deepcopy(small.model.state_dict())
    ClosedForm()(small, model, graph)
    assert all(torch.equal(t, touched[n]) for n, t in small.model.state_dict().items())


@pytest.mark.parametrize("normalization", ["source", "function"])
def test_depthwise_kernels(normalization: str) -> None:
    """Where all inputs are alike in mean and variance, a merged depthwise channel is as its parts were."""
    layers = (nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    model = made(*layers, nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = patches(1.0, 3, 2, 40_000).float()
    with torch.no_grad():
        model[1].weight.fill_(1.0), model[1].bias.fill_(0.4)  # type: ignore[index, union-attr, operator]
        for conv, norm in ((0, 1), (2, 3)):
            u = model[: conv + 1](x)  # type: ignore[index]
            model[norm].running_mean, model[norm].running_var = u.mean((0, 2, 3)), u.var((0, 2, 3))  # type: ignore[index]
        y = model[:4](x).flatten(1).double()  # type: ignore[index]
    small, graph = shrunk(model, keep=0.5, reducer=IntraFusion(normalization), include="0")
    mean = small.plan.maps["0"].merge
    mean = mean / mean.sum(1, keepdim=True)
    ClosedForm()(small, model, graph)
    with torch.no_grad():
        found = small.model[:4](x).flatten(1).double()  # type: ignore[index]
    torch.testing.assert_close(found.mean(0), mean @ y.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(found.var(0), mean @ y.var(0), atol=0, rtol=0.06)


class Joined(nn.Module):
    """Two layers side by side (or summed) before one norm."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.summed = summed
        self.a, self.b = nn.Conv2d(2, 8, 3), nn.Conv2d(2, 8, 3)
        self.norm = nn.BatchNorm2d(8 if summed else 16)
        self.last = nn.Conv2d(8 if summed else 16, 2, 1)

    def normed(self, x: Tensor) -> Tensor:
        a, b = self.a(x[:, :2]), self.b(x[:, 2:])
        return self.norm(a + b if self.summed else torch.cat([a, b], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.normed(x)))


@pytest.mark.parametrize("summed", [True, False])
def test_norms_of_sums_and_concatenations(summed: bool) -> None:
    """What the norm remembers becomes what the merged channels have, so its outputs have unit variance times gamma."""
    model = randomise_(Joined(summed)).eval()
    x = patches(1.0, 3, 4, 40_000).float()
    with torch.no_grad():
        a, b = model.a(x[:, :2]), model.b(x[:, 2:])
        read = a + b if summed else torch.cat([a, b], 1)
        model.norm.running_mean, model.norm.running_var = read.mean((0, 2, 3)), read.var((0, 2, 3))
    small, graph = shrunk(model, keep=0.5, reducer=IntraFusion("function"))
    assert not graph.norms
    before = small.model.norm.running_var.clone()  # type: ignore[union-attr, operator]
    ClosedForm()(small, model, graph)
    assert not torch.allclose(before, small.model.norm.running_var, rtol=0.2)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        found = small.model.normed(x)  # type: ignore[operator]
    gamma = small.model.norm.weight.detach()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found.var((0, 2, 3)), gamma.square(), atol=1e-3, rtol=0.06)


def test_structure_dtype_and_flags_survive() -> None:
    model = plain().half()
    model.train()
    model.requires_grad_(False)
    small, graph = shrunk(model.float(), keep=0.5)
    small.model.half()
    parameters = dict(small.model.named_parameters())
    ClosedForm()(small, model, graph, torch.zeros(1))  # images are taken and not used
    assert {p.dtype for p in small.model.parameters()} == {torch.float16}
    assert all(parameters[n] is p and not p.requires_grad for n, p in small.model.named_parameters())
    assert small.model.training


def test_nothing_reduced_nothing_written() -> None:
    model = plain()
    graph = intrafusion.inspect(model, torch.zeros(1, 3, 9, 9))
    same = SimpleNamespace(model=copy.deepcopy(model), plan=SimpleNamespace(maps={}), inputs=None)
    ClosedForm()(same, model, graph)  # type: ignore[arg-type]
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in same.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reach": -1.0}, "reach: expected pixels >= 0"), ({"floor": 0.0}, "floor: expected a fraction")],
)
def test_hyper_parameters_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClosedForm(**options)


def test_function_with_closed_form_beats_source_inside_the_blocks_of_a_real_network(data_dir: Path) -> None:
    from intrafusion.lab import zoo
    from intrafusion.measure.accuracy import accuracy

    name = "cifar10_resnet20"
    model, example, test = zoo.build(name, pretrained=True), zoo.example_input(name), zoo.load_data(name, "test", 400)
    graph = intrafusion.inspect(model, example)
    inner = [g.producers[0] for g in graph.reducible if len(g.producers) == 1]
    scores = {}
    for normalization in ("source", "function"):
        recipe = Recipe.of(keep=0.5, reducer=IntraFusion(normalization), include=inner)
        small = intrafusion.apply(model, intrafusion.decide(model, graph, recipe), example, graph=graph)
        scores[normalization] = accuracy(small.model, test.images, test.labels)
        ClosedForm()(small, model, graph)
        scores[normalization, "restored"] = accuracy(small.model, test.images, test.labels)
    assert scores["function", "restored"] > scores["source"] + 0.05 > scores["function"]
