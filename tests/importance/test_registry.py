"""Every criterion through the whole pipeline."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import intrafusion
from intrafusion.importance import IMPORTANCES, NEEDS, ObservationError, needs_of
from intrafusion.lab import zoo

ON_IMAGES = [name for name, criterion in IMPORTANCES.items() if any(NEEDS[n] for n in needs_of(criterion))]


@functools.cache
def network() -> tuple[nn.Module, intrafusion.ChannelGraph, Tensor]:
    model, x = zoo.build("digits_resnet"), zoo.example_input("digits_resnet", batch=12)
    return model, intrafusion.inspect(model, x[:1]), x


def selected(importance: object, images: object) -> dict[str, list[list[float]]]:
    """Which channels plain pruning keeps."""
    model, graph, _ = network()
    recipe = intrafusion.Recipe.of(keep=0.5, reducer="select", importance=importance)
    plan = intrafusion.decide(model, graph, recipe, images=images)  # type: ignore[arg-type]
    return {name: m.merge.tolist() for name, m in plan.maps.items()}


@pytest.mark.parametrize("name", [n for n in IMPORTANCES if n != "bn_scale"])
def test_batches_in_any_form_give_the_same_channels(name: str) -> None:
    _, _, x = network()
    images = x if name in ON_IMAGES else None
    kept = selected(name, images)
    assert len(kept) > 3
    assert kept == selected(IMPORTANCES[name], images)
    if name in ON_IMAGES:
        assert kept == selected(name, DataLoader(TensorDataset(x), batch_size=5))
        assert kept == selected(name, ({"x": part} for part in x.split(4)))


def test_batch_norm_scale() -> None:
    _, graph, x = network()
    twin, group = zoo.build("digits_resnet"), graph.reducible[0]
    scale = next(m for m in group.members if m.tensor.endswith(".weight") and "scales" in m.roles)
    twin.get_parameter(scale.tensor).data.copy_(torch.arange(group.size) / group.size + 0.1)
    small = intrafusion.compress(
        twin, x[:1], keep=0.5, reducer="select", importance="bn_scale", include=group.producers, restore=None
    )
    kept = small.plan.maps[group.name].merge.argmax(1).tolist()
    others = [m for m in group.members if m is not scale and m.dim == 0 and "scales" in m.roles]
    assert all(torch.all(twin.get_parameter(m.tensor) == 1) for m in others)
    assert kept == list(range(group.size // 2, group.size))


@pytest.mark.parametrize("name", ON_IMAGES)
def test_without_images_the_pipeline_says_which_criterion_needs_them(name: str) -> None:
    with pytest.raises(ObservationError) as raised:
        selected(name, None)
    assert repr(IMPORTANCES[name]) in str(raised.value)
    assert "images=" in str(raised.value)


def test_a_criterion_of_torch_pruning_goes_in_as_it_is() -> None:
    tp = pytest.importorskip("torch_pruning")
    theirs = tp.importance.TaylorImportance()
    _, _, x = network()
    images = [(x, torch.arange(12) % 10)]
    assert selected(theirs, images) == selected("taylor", images)
    assert selected(tp.importance.MagnitudeImportance(p=1), None).keys() == selected("l1", None).keys()
    model, _, _ = network()
    small = intrafusion.compress(model, x[:1], 0.5, reducer="select", importance=theirs, images=images, restore=None)
    assert {name: m.merge.tolist() for name, m in small.plan.maps.items()} == selected("taylor", images)
