"""Images from batch norms: their statistics come closer, the same seed gives the same images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

from intrafusion.errors import FolderError, ModelError, RecipeError
from intrafusion.network.inputs import Inputs
from intrafusion.restore import Synthesis, load_images, save_images
from intrafusion.restore.synthesize import (
    collect_statistics,
    find_mismatch,
    read_norms,
    take_statistics,
    total_variation,
    watch_noise,
)

QUICK = Synthesis(images=8, mirrored=False, steps=25)
EXAMPLE = torch.zeros(1, 3, 8, 8)


def made() -> nn.Sequential:
    """A network that remembers the statistics of smooth, bright images."""
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(216, 4))
    model: nn.Sequential = randomise_(nn.Sequential(*layers))  # type: ignore[assignment]
    with torch.no_grad():
        z = model[0](2 * torch.randn(50, 3, 1, 1) + 0.3 * torch.randn(50, 3, 8, 8) + 1).movedim(1, 0).flatten(1)
        model[1].running_mean.copy_(z.mean(1))
        model[1].running_var.copy_(z.var(1))
    return model


def mismatch(model: nn.Sequential, images: Tensor) -> float:
    """The statistics term by hand, for the one norm."""
    norm = model[1]
    with torch.no_grad():
        z = model[0](images).movedim(1, 0).flatten(1)
        sigma = (norm.running_var + norm.eps).sqrt()
        mean = ((z.mean(1) - norm.running_mean) / sigma).square().mean()
        return float(mean + (z.std(1, unbiased=False) / sigma - 1).square().mean())


def test_how_far_images_are_from_what_the_norms_remember() -> None:
    model, images = made().eval(), torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    assert find_mismatch(model, Inputs.of(images)) == pytest.approx(mismatch(model, images), rel=1e-5)
    assert np.isnan(find_mismatch(nn.Sequential(nn.Flatten()), Inputs.of(images)))


def test_statistics_come_closer_and_labels_are_met() -> None:
    model = made().eval()
    start = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = replace(QUICK, steps=150)(model, EXAMPLE)
    assert images.shape == (8, 3, 8, 8)
    assert mismatch(model, images) < 0.2 * mismatch(model, start)
    assert (model(images).argmax(1) == torch.arange(8) % 4).float().mean() > 0.7


def test_every_image_comes_with_its_mirror_image() -> None:
    model = made()
    both = replace(QUICK, steps=2, mirrored=True)(model, EXAMPLE)
    assert torch.equal(both[:8], replace(QUICK, steps=2)(model, EXAMPLE))
    assert torch.equal(both[8:], torch.flip(both[:8], dims=[3]))
    sequences = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)).eval()
    assert len(replace(QUICK, steps=2, mirrored=True)(sequences, torch.zeros(1, 3, 8))) == 8


def test_the_collected_mismatch_is_the_one_by_hand() -> None:
    model, images = made().eval(), torch.randn(5, 3, 8, 8)
    with collect_statistics(read_norms(model)) as found, torch.no_grad():
        model(images)
    ((one, mean, variance),) = found
    assert float(one.measure_mismatch(mean, variance)) == pytest.approx(mismatch(model, images), rel=1e-4)
    assert not model[1]._forward_hooks


def test_without_batch_norms_layers_give_what_they_give_on_noise() -> None:
    """Labels are met by images on which every layer keeps the mean and the deviation that noise gives it."""
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(216, 4))
    model = randomise_(nn.Sequential(*layers)).eval()
    wanted = watch_noise(model, EXAMPLE, seed=0)
    assert [(type(w.module), w.reads) for w in wanted] == [(nn.Conv2d, False), (nn.Linear, False)]
    images = replace(QUICK, images=32, steps=200)(model, EXAMPLE)
    with torch.no_grad():
        y = model[0](images).movedim(1, 0).flatten(1)
    np.testing.assert_allclose(y.mean(1), wanted[0].mean, atol=0.3 * float(wanted[0].deviation.max()))
    np.testing.assert_allclose(y.std(1), wanted[0].deviation, rtol=0.3)
    assert (model(images).argmax(1) == torch.arange(32) % 4).float().mean() > 0.7
    assert not model[0]._forward_hooks


def test_total_variation_is_the_mean_squared_difference() -> None:
    ramp = torch.arange(5.0).expand(2, 1, 4, 5)
    assert float(total_variation(ramp)) == 1.0
    assert float(total_variation(torch.ones(2, 7))) == 0.0


def test_the_network_and_the_random_state_are_left_alone() -> None:
    model = made().train()
    model[4].weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again = QUICK(model, EXAMPLE), QUICK(model, EXAMPLE)
    assert torch.equal(first, again)
    assert not torch.equal(first, replace(QUICK, seed=1)(model, EXAMPLE))
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_budget_of_seconds_and_progress() -> None:
    seen: list[tuple[int, int]] = []
    report = lambda stage, done, total: seen.append((done, total))  # noqa: E731
    replace(QUICK, steps=10**6, seconds=0.05)(made(), EXAMPLE, progress=report)
    assert seen[0] == (0, 10**6)
    assert seen[-1] == (10**6, 10**6)
    assert 1 < len(seen) < 10**4


def test_saved_and_loaded(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 4, 4)
    save_images(images, tmp_path / "images.safetensors", QUICK)
    assert torch.equal(load_images(tmp_path / "images.safetensors"), images)
    with pytest.raises(FolderError, match="expected images saved by intrafusion"):
        load_images(tmp_path / "none.safetensors")


def test_in_parts_they_are_the_same_up_to_rounding() -> None:
    """Seven images, three or one at a time: the norm is wanted to see the statistics of all."""
    model, example = made().double().eval(), EXAMPLE.double()
    wanted = Synthesis(images=7, mirrored=False, steps=6)
    whole = wanted(model, example)
    parts = list[int]()
    model.register_forward_pre_hook(lambda _, given: parts.append(len(given[0])))
    for memory in (90_000, 30_000):
        torch.testing.assert_close(wanted(model, example, memory=memory), whole, atol=1e-9, rtol=1e-9)
    assert {3, 1} <= set(parts)
    assert max(parts) < 7


def test_a_network_whose_images_meet_is_not_given_parts() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x - x.mean(0))

    model, parts = Centred().eval(), list[int]()
    model.inner.register_forward_pre_hook(lambda _, given: parts.append(len(given[0])))
    Synthesis(images=7, mirrored=False, steps=2)(model, EXAMPLE, memory=20_000)
    assert parts[-2:] == [7, 7]


def test_too_little_memory_for_one_image() -> None:
    with pytest.raises(RecipeError, match=r"expected at least [\d.]+ kB, as making one image .* got 100 bytes"):
        QUICK(made(), EXAMPLE, memory=100)


def test_what_cannot_be_made() -> None:
    with pytest.raises(ModelError, match="only from batch norms, convolutions or linear layers; there are none"):
        QUICK(nn.AvgPool2d(2), EXAMPLE)
    with pytest.raises(ModelError, match="one floating-point input"):
        QUICK(made(), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2 images and 1 step, got 1 and 250"):
        Synthesis(images=1)


@pytest.mark.parametrize(("shape", "dim"), [((6, 3), 1), ((6, 3, 4), 1), ((6, 3, 4, 5), 1), ((6, 4, 3), -1)])
def test_moments_of_channels_and_their_gradients(shape: tuple[int, ...], dim: int) -> None:
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    x.requires_grad_()
    rows = x.movedim(dim, -1).flatten(0, -2)
    found, expected = take_statistics(x, dim), (rows.mean(0), rows.var(0, correction=0))
    torch.testing.assert_close(found, expected)
    weights = torch.randn(2, rows.shape[1], dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * torch.stack(m)).sum(), x)[0] for m in (found, expected)]
    torch.testing.assert_close(*gradients)
