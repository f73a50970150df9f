"""REPAIR: every layer's channels get the averaged mean and deviation of the original's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import IntraFusion, ModelError, Recipe
from intrafusion.compressed import Compressed
from intrafusion.graph import ChannelGraph
from intrafusion.restore import ActivationRepair, Reestimate

NORMLESS = (
    nn.Conv2d(3, 8, 3),
    nn.ReLU(),
    nn.Conv2d(8, 8, 3, groups=8),
    nn.ReLU(),
    nn.Conv2d(8, 6, 1),
    nn.Flatten(),
    nn.Linear(24, 3),
)


def made(*layers: nn.Module) -> nn.Sequential:
    return randomise_(nn.Sequential(*copy.deepcopy(layers))).eval()  # type: ignore[return-value]


def images(n: int = 60) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(2)) + 0.3


def shrunk(model: nn.Module, **options: object) -> tuple[Compressed, ChannelGraph]:
    graph = intrafusion.inspect(model, images(2))
    plan = intrafusion.decide(model, graph, Recipe.of(**options))
    return intrafusion.apply(model, plan, images(2), graph=graph), graph


def outputs(model: nn.Module, x: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Rows of what each of these layers gives."""
    found = {}
    with torch.no_grad():
        for index, layer in enumerate(model):  # type: ignore[arg-type]
            x = layer(x)
            if index in layers:
                found[index] = x.transpose(0, 1).flatten(1).double() if x.dim() > 2 else x.T.double()
    return found


@pytest.mark.parametrize("normalization", ["source", "function"])
@pytest.mark.parametrize("batch", [128, 20])
def test_means_and_deviations_are_set(normalization: str, batch: int) -> None:
    """Each layer in turn, so that what comes later is right although what came before has changed."""
    model, x = made(*NORMLESS), images()
    small, graph = shrunk(model, keep=0.5, reducer=IntraFusion(normalization))
    ActivationRepair(batch=batch)(small, model, graph, x)
    before, after = (outputs(m, x, [0, 2, 4, 6]) for m in (model, small.model))
    averages = {}
    for index, group in ((0, "0"), (2, "0"), (4, "4")):
        merge = small.plan.maps[group].merge
        averages[index] = merge / merge.sum(1, keepdim=True)
    close = {"atol": 1e-3, "rtol": 1e-3} if batch > len(x) else {"atol": 0.1, "rtol": 0.1}
    for index, rows in before.items():
        mean = averages.get(index, torch.eye(len(rows), dtype=torch.float64))
        torch.testing.assert_close(after[index].mean(1), mean @ rows.mean(1), **close)
        torch.testing.assert_close(after[index].std(1), mean @ rows.std(1), **close)


def test_with_batch_norms_it_does_what_reestimation_does() -> None:
    """With images that have the statistics the norms remember."""
    model, x = (
        made(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3, bias=False)),
        images(),
    )
    with torch.no_grad():
        model[1].weight.abs_()  # type: ignore[operator]
    fresh, graph = shrunk(model, keep=1.0)
    Reestimate()(fresh, model, graph, x)
    model = fresh.model
    results = []
    for restorer in (Reestimate(), ActivationRepair()):
        small, graph = shrunk(model, keep=0.5, reducer=IntraFusion("function"))
        restorer(small, model, graph, x)
        results.append(outputs(small.model, x, [1])[1])
    torch.testing.assert_close(results[0], results[1], atol=2e-2, rtol=1e-3)


def test_layers_without_a_place_for_a_constant_are_scaled() -> None:
    model, x = made(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1, bias=False)), images()
    small, graph = shrunk(model, keep=0.5, reducer=IntraFusion("function"))
    directions = torch.nn.functional.normalize(small.model[0].weight.detach().flatten(1), dim=1)  # type: ignore[index]
    ActivationRepair()(small, model, graph, x)
    before, after = outputs(model, x, [0, 2]), outputs(small.model, x, [0, 2])
    merge = small.plan.maps["0"].merge
    torch.testing.assert_close(after[0].std(1), merge @ before[0].std(1))
    torch.testing.assert_close(after[2].std(1), before[2].std(1))
    now = torch.nn.functional.normalize(small.model[0].weight.detach().flatten(1), dim=1)  # type: ignore[index]
    torch.testing.assert_close(now, directions)


def test_dead_channels_are_not_blown_up() -> None:
    model, x = made(*NORMLESS), images()
    small, graph = shrunk(model, keep=0.5)
    with torch.no_grad():
        small.model[0].weight[1] *= 1e-7  # type: ignore[index]
    ActivationRepair()(small, model, graph, x)
    assert all(bool(torch.isfinite(t).all()) for t in small.model.state_dict().values())
    assert float(small.model[0].weight[1].detach().abs().max()) < 1e-5  # type: ignore[index]


def test_nothing_to_correct_nothing_changes() -> None:
    model, x = made(*NORMLESS), images()
    small, graph = shrunk(model, keep=1.0)
    ActivationRepair()(small, model, graph, iter(x.split(7)))
    torch.testing.assert_close(small.model(x), model(x), atol=1e-5, rtol=1e-5)


def test_an_error_changes_nothing() -> None:
    model = made(*NORMLESS)
    small, graph = shrunk(model, keep=0.5)
    before = copy.deepcopy(small.model.state_dict())
    with pytest.raises(ModelError, match="0: the original network gives NaN"):
        ActivationRepair()(small, model, graph, images() * float("nan"))
    with pytest.raises(ValueError, match="batch: expected at least 2 images"):
        ActivationRepair(batch=1)
    assert all(torch.equal(t, before[n]) for n, t in small.model.state_dict().items())
    assert not any(m._forward_hooks for network in (model, small.model) for m in network.modules())


def test_a_real_network_without_batch_norms_profits(data_dir: Path) -> None:
    """ResNet-20 with its norms folded away."""
    from intrafusion.lab import zoo
    from intrafusion.measure.accuracy import accuracy

    name = "cifar10_resnet20"
    model, example, test = zoo.build(name, pretrained=True), zoo.example_input(name), zoo.load_data(name, "test", 250)
    for path, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            conv = path.replace("downsample.1", "downsample.0").replace("bn", "conv")
            fused = torch.nn.utils.fuse_conv_bn_eval(model.get_submodule(conv), norm)  # type: ignore[type-var]
            model.set_submodule(conv, fused)
            model.set_submodule(path, nn.Identity())
    graph = intrafusion.inspect(model, example)
    assert not graph.norms
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.8, reducer="intrafusion"))
    small = intrafusion.apply(model, plan, example, graph=graph)
    before = accuracy(small.model, test.images, test.labels)
    ActivationRepair()(small, model, graph, zoo.load_data(name, "train", 128).images)
    assert accuracy(small.model, test.images, test.labels) > before + 0.2
