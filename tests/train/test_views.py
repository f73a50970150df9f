"""Views of images: what they are made of, and which inputs have none."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intrafusion.network.inputs import Inputs
from intrafusion.train import views
from intrafusion.train.views import draw_view, find_plain_images, shift_images


def test_shifted_images_are_windows_of_what_was_extended_at_the_edges() -> None:
    images = torch.randn(40, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    found = shift_images(images)
    wide = F.pad(images, (1, 1, 2, 2), mode="replicate")
    places = []
    for image, own in zip(found, wide, strict=True):
        fits = [(i, j) for i in range(5) for j in range(3) if torch.equal(image, own[:, i : i + 16, j : j + 8])]
        assert len(fits) == 1
        places += fits
    assert {i for i, _ in places} == set(range(5))
    assert {j for _, j in places} == set(range(3))


def test_images_that_are_too_small_to_be_shifted_stay() -> None:
    images = torch.randn(3, 1, 4, 4).bfloat16()
    assert torch.equal(shift_images(images), images)


def test_a_view_lies_between_two_images_each_mirrored_or_not(monkeypatch) -> None:
    monkeypatch.setattr(views, "shift_images", lambda images: images)
    images = torch.arange(6.0)[:, None, None, None] * 10 + torch.arange(4.0).expand(6, 1, 4, 4)
    torch.manual_seed(0)
    found = draw_view(images)
    assert found.shape == images.shape
    slopes = found.diff(dim=-1)
    assert bool((slopes.abs() <= 1 + 1e-5).all())
    assert len(slopes.flatten().mul(1e3).round().unique()) > 2
    centres = found.mean((1, 2, 3)) - 1.5
    assert bool(((centres >= -1e-5) & (centres <= 50 + 1e-5)).all())
    torch.manual_seed(0)
    assert torch.equal(draw_view(images), found)


def test_only_calls_of_images_alone_have_views() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert find_plain_images(Inputs.of(images)) is images
    for other in (torch.randn(2, 3), torch.randn(2, 3, 4), torch.zeros(2, 3, 4, 4).long(), (images, torch.ones(2))):
        assert find_plain_images(Inputs.of(other)) is None
