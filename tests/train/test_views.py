"""Views of images: what they are made of, and which inputs have none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from intrafusion.network.inputs import Inputs
from intrafusion.train import views
from intrafusion.train.views import draw_view, find_plain_images, mix_images, put_boxes, shift_images


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


def flat(count: int, size: int = 20) -> torch.Tensor:
    """Images of one number each."""
    return 10.0 * torch.arange(count)[:, None, None, None].expand(count, 1, size, size)


def test_mixed_images_lie_between_two() -> None:
    torch.manual_seed(0)
    slope = torch.arange(20.0)
    found = mix_images(flat(40) + slope)
    torch.testing.assert_close(found.diff(dim=-1), torch.ones(40, 1, 20, 19), rtol=0, atol=1e-3)
    kept = (found - slope).mean((1, 2, 3))
    assert bool(((kept >= 0) & (kept <= 390)).all())
    assert len((kept - 10 * torch.arange(40)).round().unique()) > 20


def test_a_box_of_another_image_is_put_into_each() -> None:
    torch.manual_seed(0)
    images = flat(40)
    found, shares = put_boxes(images), []
    for image, own in zip(images, found, strict=True):
        other = own[0] != image[0]
        shares.append(other.float().mean().item())
        assert len(own.unique()) <= 2
        rows, columns = other.any(1), other.any(0)
        assert torch.equal(other, rows[:, None] & columns)
        for side in (rows, columns):
            places = side.nonzero()[:, 0]
            assert not len(places) or len(places) == places[-1] - places[0] + 1 <= 17
    assert max(shares) > 0.3
    assert 0.05 < sum(shares) / len(shares) < 0.35


def test_every_second_view_is_mirrored_cut_and_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "shift_images", lambda images: images)
    monkeypatch.setattr(views, "put_boxes", lambda images: images + 100)
    monkeypatch.setattr(views, "mix_images", lambda images: images + 1000)
    images = torch.arange(4.0).expand(400, 1, 4, 4)
    torch.manual_seed(0)
    found = draw_view(images)
    done = found.diff(dim=-1)[:, 0, 0, 0] < 0, found[:, 0, 0, 0] % 1000 >= 100, found[:, 0, 0, 0] >= 1000
    for i, one in enumerate(done):
        assert 0.4 < one.float().mean() < 0.6
        for other in done[:i]:
            assert 0.15 < (one & other).float().mean() < 0.35
    torch.manual_seed(0)
    assert torch.equal(draw_view(images), found)


def test_only_calls_of_images_alone_have_views() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert find_plain_images(Inputs.of(images)) is images
    for other in (torch.randn(2, 3), torch.randn(2, 3, 4), torch.zeros(2, 3, 4, 4).long(), (images, torch.ones(2))):
        assert find_plain_images(Inputs.of(other)) is None
