"""Images on a wrong scale are told of, before any work; right ones never are."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import compress as bare_compress
from safetensors.torch import load_file
from torch import Tensor, nn

from intrafusion import IntrafusionWarning, compress
from intrafusion.lab import zoo
from intrafusion.network.inputs import Inputs
from intrafusion.restore.implausible import find_implausible

DATA = os.environ.get("INTRAFUSION_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="needs INTRAFUSION_DATA")

TRAINED = {
    "cifar10_resnet20": "test",
    "cifar10_vgg11_bn": "test",
    "cifar100_resnet20": "test",
    "cifar10_densenet100": "test",
    "imagenet_mobilenetv1_025": "sample",
}


def build_trained(name: str) -> nn.Module:
    model = zoo.build(name).eval()
    model.load_state_dict(load_file(Path(DATA or "") / "models" / f"{name}.safetensors"))
    return model


def told(model: nn.Module, images: Tensor, like: Tensor | None = None) -> dict[str, str]:
    like = torch.randn(1, *images.shape[1:]) if like is None else like
    return find_implausible(model, [Inputs((images,))], Inputs((like,)))


@needs_data
@pytest.mark.parametrize("name", TRAINED)
def test_images_of_the_network_and_of_its_siblings_are_right(name: str) -> None:
    model = build_trained(name)
    images = zoo.load_data(name, TRAINED[name], 64).images
    grey = images.mean(1, keepdim=True).expand_as(images)
    sibling = zoo.load_data("cifar10" if name.startswith("cifar100") else "cifar100", "test", 64).images
    found = [images, images[:10], images / 2, 2 * images, -images, grey]
    found += [sibling] if name.startswith("cifar") else []
    assert [told(model, given) for given in found] == [{}] * len(found)


@needs_data
@pytest.mark.parametrize("name", TRAINED)
def test_images_on_another_scale_are_not(name: str) -> None:
    model, usual = build_trained(name), zoo.entry(name).normalisation
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (usual.mean, usual.std))
    pixels = (zoo.load_data(name, TRAINED[name], 64).images * std + mean).clamp(0, 1)
    wrong = [255 * pixels, (pixels / 255 - mean) / std] + ([pixels] if max(usual.std) < 0.3 else [])
    constant = torch.linspace(0, 1, 64).view(64, 1, 1, 1).expand_as(pixels) * 0.01
    assert [list(told(model, given)) for given in (*wrong, constant)] == [["scale"]] * (len(wrong) + 1)
    assert "values from 0 to 255; what reaches the first batch norm (" in told(model, 255 * pixels)["scale"]


PIXELS = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
USUAL = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def make_net(*, seen: Tensor | None) -> nn.Module:
    """Whose first norm, if it has one, has seen these images."""
    torch.manual_seed(0)
    norm = [] if seen is None else [nn.BatchNorm2d(16)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *norm, nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(1), nn.Linear(128, 4))
    for _ in range(50 if seen is not None else 0):
        model(seen)
    return model.eval()


def test_it_is_said_once_before_the_work_and_in_the_notes() -> None:
    events: list[str] = []

    def show(stage: str, done: int, total: int) -> None:
        events.append(stage)

    def note(message: Any, *_: Any, **__: Any) -> None:
        events.append(f"warning: {message}")

    model = make_net(seen=USUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        small = compress(model, torch.randn(1, 3, 8, 8), 0.5, images=PIXELS, progress=show)
    said = [e for e in events if e.startswith("warning")]
    assert len(said) == 1
    assert "values from 0 to 255; what reaches the first batch norm (1) spreads" in said[0]
    assert said[0].endswith("deviations off. Normalise images as the network was trained on them")
    assert not any("restoring" in e or "choosing" in e for e in events[: events.index(said[0])])
    assert any(note in said[0] for note in small.notes)


@pytest.mark.parametrize(
    ("seen", "example", "expected"),
    [
        (PIXELS, torch.randn(1, 3, 8, 8), False),  # its norm knows such values
        (None, torch.randn(1, 3, 8, 8), True),
        (None, PIXELS[:1], False),  # it takes pixels, says the example
    ],
)
def test_pixels_are_told_by_the_norm_and_else_by_the_example(
    seen: Tensor | None, example: Tensor, expected: bool
) -> None:
    assert bool(told(make_net(seen=seen), PIXELS, example)) == expected


def test_norms_that_never_saw_data_say_nothing() -> None:
    model = make_net(seen=USUAL)
    model[1].reset_running_stats()  # type: ignore[operator]
    assert told(model, 20 * torch.randn(60, 3, 8, 8)) == {}


def test_images_that_are_all_the_same() -> None:
    with pytest.warns(IntrafusionWarning, match="the first 60 are all the same; look at how they are read"):
        compress(make_net(seen=None), torch.randn(1, 3, 8, 8), 0.5, images=torch.ones(60, 3, 8, 8))


def test_a_stream_is_looked_at_too() -> None:
    with pytest.warns(IntrafusionWarning, match="values from 0 to 255"):
        bare_compress(make_net(seen=USUAL), torch.randn(1, 3, 8, 8), 0.5, images=[PIXELS[:30], PIXELS[30:]])


def test_the_network_is_as_it_was() -> None:
    model = make_net(seen=USUAL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    told(model, PIXELS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
