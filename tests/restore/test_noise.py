"""Restoration without data: what noise is, what the norms see of it, and what it gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bare import compress
from gallery.core import Wired, conv_bn
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion.errors import ModelError, RecipeError
from intrafusion.network.inputs import Inputs
from intrafusion.restore import Noise
from intrafusion.restore.noise import correlate_channels, image_like, scatter_shapes, smooth, standardise

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def residual(norm: bool = True) -> nn.Module:
    def wiring(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))  # type: ignore[operator]
        return net.head(F.relu(net.b(F.relu(net.a(x))) + x).mean((2, 3)))  # type: ignore[operator]

    layer = conv_bn if norm else lambda a, b: nn.Conv2d(a, b, 3, padding=1)
    parts = {"stem": layer(3, 12), "a": layer(12, 10), "b": layer(10, 12), "head": nn.Linear(12, 4)}
    torch.manual_seed(0)
    return randomise_(Wired(wiring, **parts)).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_smooth_noise_has_its_spectrum() -> None:
    field = smooth(torch.randn(4000, 1, 16, generator=torch.Generator().manual_seed(1)), 1.5)
    power = np.abs(np.fft.rfft(field[:, 0].numpy(), axis=1)) ** 2
    ratio = power.mean(0)[1:8] / power.mean(0)[1]
    np.testing.assert_allclose(ratio, np.arange(1, 8) ** -3.0, rtol=0.2)
    assert float(field.std()) == pytest.approx(1, abs=1e-3)


def test_slope_zero_and_vectors_stay_white() -> None:
    white = torch.randn(50, 3, 8, 8)
    torch.testing.assert_close(smooth(white, 0.0), white / white.std(), atol=1e-5, rtol=1e-5)
    assert smooth(white[:, :, 0, 0], 1.5) is not None
    assert torch.equal(smooth(white[:, :, 0, 0], 1.5), white[:, :, 0, 0])


def test_shapes_hide_what_they_fall_on() -> None:
    """Where they cover an image many times over, most neighbours differ by the little of the field in a shape."""
    generator = torch.Generator().manual_seed(3)
    field = smooth(torch.randn(6, 2, 40, 48, generator=generator), 0.0)
    found = scatter_shapes(field, 20.0, generator)
    assert found.shape == field.shape
    assert not torch.equal(found[0], found[1])
    below, above = (x.diff(dim=3).numpy() for x in (field, found))
    inside = np.isclose(above, 0.3 * below, atol=1e-5)
    assert np.array_equal(inside[:, 0], inside[:, 1])  # a shape is one in all channels
    assert 0.5 < inside.mean() < 0.95
    assert float((found == field).float().mean()) < 0.02
    assert np.std(above[~inside]) > 1.0  # of two colours


def test_the_balls_around_shapes_cover_an_image_as_often_as_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []
    place = intrafusion.restore.noise._place_shape

    def spy(n: int, shape: list[int], radius: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        radii.append(radius)
        places, inside = place(n, shape, radius, generator)
        assert all(len(row.unique()) == len(row) for row in places)
        assert int(inside.sum(1).max()) <= (2 * radius + 1) ** 2
        return places, inside

    monkeypatch.setattr(intrafusion.restore.noise, "_place_shape", spy)
    scatter_shapes(torch.zeros(2, 1, 64, 96), 7.0, torch.Generator().manual_seed(0))
    assert sum(np.pi * r * r for r in radii) == pytest.approx(7 * 64 * 96, rel=0.02)
    assert min(radii) >= 0.035 * 64
    assert max(radii) <= 0.45 * 64
    larger = [sum(r > bound for r in radii) for bound in (4.0, 8.0)]
    expected = (4.0**-2 - 28.8**-2) / (8.0**-2 - 28.8**-2)  # of a density of r^-3
    assert larger[0] / larger[1] == pytest.approx(expected, rel=0.1)


def test_channels_are_as_alike_as_is_asked() -> None:
    white = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    found = np.cov(correlate_channels(white, 0.8).numpy().T)
    np.testing.assert_allclose(found, 0.2 * np.eye(3) + 0.8, atol=0.03)
    torch.testing.assert_close(correlate_channels(white, 0.0), white, atol=1e-5, rtol=1e-5)


def test_what_is_no_picture_gets_no_shapes() -> None:
    for shape in ((4, 20), (4, 6, 20)):
        like = torch.zeros(1, *shape[1:])
        plain = Noise(images=4, cover=0.0, likeness=0.0).make(like).tensors()[0]
        assert torch.equal(Noise(images=4).make(like).tensors()[0], plain)
    small = Noise(images=4).make(torch.zeros(1, 1, 2, 2)).tensors()[0]  # too small for any
    assert bool(small.isfinite().all())


@pytest.mark.parametrize("options", [{"cover": -1.0}, {"cover": float("inf")}, {"likeness": 1.0}, {"images": 1}])
def test_hyper_parameters_that_mean_nothing(options: dict) -> None:
    (name,) = options
    with pytest.raises(RecipeError, match=f"{name}: expected .* got"):
        Noise(**options)


def test_there_are_fewer_images_where_they_are_large() -> None:
    count = lambda *shape: len(Noise().make(Inputs.of(torch.zeros(1, 3, *shape))).tensors()[0])  # noqa: E731
    assert (count(8, 8), count(32, 32), count(64, 64), count(224, 224)) == (512, 512, 128, 32)


def test_behind_every_norm_a_channel_has_the_mean_and_deviation_that_it_has_on_data() -> None:
    model = residual()
    before, noise = state(model), Noise(images=64).make(X)
    copy = standardise(model, noise)
    assert equal(state(model), before)
    norm = copy.stem[1]  # type: ignore[index]
    with torch.no_grad():
        z = copy.stem(noise.tensors()[0])  # type: ignore[operator]
    np.testing.assert_allclose(z.mean((0, 2, 3)), norm.bias.detach(), atol=1e-4)
    np.testing.assert_allclose(z.std((0, 2, 3)), norm.weight.detach().abs(), rtol=1e-3, atol=1e-4)
    assert norm.momentum == model.stem[1].momentum  # type: ignore[index]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("reducer", ["select", "intrafusion", "pivot"])
def test_it_gains_on_images_that_it_has_not_seen(norm: bool, reducer: str) -> None:
    """Of another slope, with fewer shapes; batch norms remember these."""
    images = Noise(images=64, slope=1.0, cover=3.0, seed=5).make(X).tensors()[0]
    model = standardise(residual(norm), Inputs.of(images))
    errors = []
    for restore in (None, "noise"):
        small = compress(model, X, 0.6, reducer=reducer, restore=restore).model
        with torch.no_grad():
            errors.append(float((small(images) - model(images)).square().mean()))
    assert errors[1] < 0.5 * errors[0], errors


def test_a_lossless_reduction_stays_so_and_the_original_is_left_alone() -> None:
    model = residual()
    before = state(model)
    small = compress(model, X, 1.0, restore="noise")
    with torch.no_grad():
        torch.testing.assert_close(small.model(X), model(X), atol=1e-4, rtol=1e-4)
    assert equal(state(model), before)


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, again, other = (state(compress(residual(), X, 0.5, restore="noise", seed=s).model) for s in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)


def test_an_error_leaves_the_weights_alone() -> None:
    small = compress(residual(), X, 0.5)
    before = state(small.model)
    broken = residual()
    broken.head.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, index]
    graph = intrafusion.inspect(residual(), X)
    with pytest.raises(ModelError, match="head: the original network gives NaN"):
        Noise()(small, broken, graph)
    assert equal(state(small.model), before)


@pytest.mark.parametrize("inputs", [(X, X), torch.zeros(2, 7, dtype=torch.int64), torch.zeros(3)])
def test_inputs_that_are_no_image_are_refused(inputs: object) -> None:
    with pytest.raises(ModelError, match="expected a network of one floating-point input"):
        image_like(inputs)  # type: ignore[arg-type]
