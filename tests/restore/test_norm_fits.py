"""Norms that see fewer channels: fitted by the formula, against numpy, and never to something worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import RowWeights
from intrafusion.reduce import ReductionMap
from intrafusion.restore import LeastSquares
from intrafusion.restore.lockstep import Turn
from intrafusion.restore.norm_fits import ChannelNorm, NormFits, find_channel_norms, fit_channels
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.shelf import Shelf

WIDTH, KEPT = 12, [0, 2, 3, 7, 8, 10]
MERGE = torch.eye(WIDTH, dtype=torch.float64)[KEPT]


class PlusOne(nn.Module):
    """A gain as in Gemma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class PostNorm(nn.Module):
    """As in BERT: what a norm gives is read and goes on in the sum."""

    def __init__(self, norm: Any = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first = nn.Linear(5, WIDTH), norm(WIDTH)
        self.up, self.down, self.norm = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), norm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for module in (self.first, self.norm):
                for parameter in module.parameters():
                    parameter.add_(0.5 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embed(x))
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def make_norm(kind: Any, width: int) -> nn.Module:
    torch.manual_seed(1)
    norm = kind(width).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return norm


def make_fits(norm: ChannelNorm, call: Inputs) -> NormFits:
    """No ridge; on one batch."""
    return NormFits({"norm": norm}, RowStore(PlaceSampler([call], 10_000, 0), Shelf(2**30)), 0.0, 0.0)


def fit(kind: Any, x: Tensor, weights: RowWeights | None = None, dim: int = -1) -> tuple[nn.Module, nn.Module]:
    """The original's norm and that of the kept channels, fitted to it on what they read; no ridge."""
    large, small = make_norm(kind, WIDTH), make_norm(kind, len(KEPT))
    norm = ChannelNorm("norm", small, small.weight, getattr(small, "bias", None), MERGE, dim)  # type: ignore[arg-type]
    call = Inputs((x,), weights=weights)
    fits = make_fits(norm, call)
    with torch.no_grad():
        shell, reduced = nn.ModuleDict({"norm": large}), x.index_select(dim, torch.tensor(KEPT))
        with fits.recording(shell, 0, call, []):
            large(x)
        fits.store.finish()
        with fits.fitting(nn.ModuleDict({"norm": small}), 0, Turn(fits.meet), lambda _: None):
            found = small(reduced)
        assert fits.fitted == ["norm"]
        torch.testing.assert_close(found, small(reduced))
    return large, small


def regress(xhat: np.ndarray, target: np.ndarray, *, intercept: bool) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept of every column, by numpy's own least squares."""
    found = [
        np.linalg.lstsq(np.stack([h, np.full_like(h, intercept)], 1), t, rcond=None)[0]
        for h, t in zip(xhat.T, target.T, strict=True)
    ]
    return np.array([a for a, _ in found]), np.array([b for _, b in found])


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, PlusOne])
def test_gain_and_shift_are_those_of_a_regression_on_the_normalised_values(kind: Any) -> None:
    x = 1 + torch.randn(40, 7, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    large, small = fit(kind, x)
    target = large(x)[..., KEPT].flatten(0, 1).detach().numpy()
    reduced = x[..., KEPT].flatten(0, 1)
    centred = reduced - reduced.mean(-1, keepdim=True) if kind is nn.LayerNorm else reduced
    xhat = centred / (centred.square().mean(-1, keepdim=True) + (getattr(small, "eps", None) or 0.0)).sqrt()
    gain, shift = regress(xhat.numpy(), target, intercept=kind is nn.LayerNorm)
    stored = small.weight.detach().numpy() + (kind is PlusOne)  # type: ignore[union-attr]
    np.testing.assert_allclose(stored, gain, rtol=1e-4, atol=1e-5)  # the targets are kept in float32
    if kind is nn.LayerNorm:
        np.testing.assert_allclose(small.bias.detach().numpy(), shift, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_channels_of_images_lie_along_the_second_dimension() -> None:
    x = torch.randn(30, WIDTH, 3, 3, generator=torch.Generator().manual_seed(2)).double()
    large, small = fit(lambda width: nn.GroupNorm(2, width), x, dim=1)
    rows = lambda t: t.movedim(1, -1).flatten(0, 2).detach().numpy()  # noqa: E731
    left = rows(small(x[:, KEPT])) - rows(large(x)[:, KEPT])
    np.testing.assert_allclose(left.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose((left * rows(small(x[:, KEPT]))).mean(0), 0, atol=1e-6)


def test_rows_of_padding_do_not_count() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 6, WIDTH, generator=generator).double()
    mask = torch.ones(20, 6, dtype=torch.float64)
    mask[:, 4:] = 0
    other = x.clone()
    other[:, 4:] = 50 * torch.randn(20, 2, WIDTH, generator=generator).double()
    found = [fit(nn.LayerNorm, each, RowWeights((mask,)))[1] for each in (x, other)]
    torch.testing.assert_close(found[0].weight, found[1].weight)
    without = fit(nn.LayerNorm, x[:, :4])[1]
    torch.testing.assert_close(found[0].weight, without.weight)


def test_the_ridge_draws_towards_what_was_there() -> None:
    given = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    slope, constant = fit_channels(given, 3 * given + 2, None, strength=1.0, scarcity=0.0, intercept=True)
    torch.testing.assert_close(slope, torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(constant, 2 + given.mean(0))


def test_a_constant_channel_gets_a_shift_alone() -> None:
    given = torch.ones(8, 2, dtype=torch.float64)
    slope, constant = fit_channels(given, given + 4, None, strength=1e-3, scarcity=0.2, intercept=True)
    torch.testing.assert_close(slope, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(constant, torch.full((2,), 4.0, dtype=torch.float64))


def test_a_norm_that_runs_twice_and_one_that_reads_more_are_left_alone() -> None:
    class Conditional(nn.LayerNorm):
        def forward(self, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
            return factor * super().forward(x)

    x = torch.randn(16, WIDTH).double()
    for kind, times, more in ((nn.LayerNorm, 2, ()), (Conditional, 1, (2.0,))):
        large, small = make_norm(kind, WIDTH), make_norm(kind, len(KEPT))
        before = small.weight.detach().clone()  # type: ignore[union-attr]
        norm = ChannelNorm("norm", small, small.weight, small.bias, MERGE, -1)  # type: ignore[arg-type]
        call = Inputs((x,))
        fits = make_fits(norm, call)
        with torch.no_grad(), fits.recording(nn.ModuleDict({"norm": large}), 0, call, []):
            for _ in range(times):
                large(x, *more)
        fits.store.finish()
        with torch.no_grad(), fits.fitting(nn.ModuleDict({"norm": small}), 0, Turn(fits.meet), lambda _: None):
            small(x[:, KEPT], *more)
        assert fits.fitted == []
        torch.testing.assert_close(small.weight.detach(), before)  # type: ignore[union-attr]


def test_which_norms_are_fitted() -> None:
    """Those of streams that are selected from; not batch norms, and not what a rotation made bare."""
    model, example = PostNorm().eval(), torch.randn(4, 6, 5)
    graph = intrafusion.inspect(model, example)
    pick = ReductionMap(MERGE, MERGE.T.contiguous())
    stream = next(g.name for g in graph.groups if g.size == WIDTH and g.reducible)
    assert find_channel_norms(model, graph, {stream: pick}).keys() == {"first", "norm"}
    inner = next(g for g in graph.groups if g.size == 24)
    half = torch.eye(24, dtype=torch.float64)[:12]
    assert find_channel_norms(model, graph, {inner.name: ReductionMap(half, half.T.contiguous())}) == {}
    batch = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, 2, 1)).eval()
    assert find_channel_norms(batch, intrafusion.inspect(batch, torch.randn(1, 3, 4, 4)), {"0": pick}) == {}


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, PlusOne])
def test_a_post_norm_stream_comes_closer_and_the_gains_are_written(kind: Any) -> None:
    model, example = PostNorm(kind).eval(), torch.randn(64, 6, 5, generator=torch.Generator().manual_seed(0))
    plan = intrafusion.compress(model, example, keep={"embed": 0.5, "*": 1.0}, restore=None).plan
    plain = intrafusion.apply(model, plan, example)
    graph = intrafusion.inspect(model, example)
    solved = intrafusion.apply(model, plan, example)
    LeastSquares()(solved, model, graph, example)
    with torch.no_grad():
        before, after = (float((m.model(example) - model(example)).norm()) for m in (plain, solved))
        kept = plan.maps["embed"].merge.argmax(1)
        first = model.first(model.embed(example))[..., kept]  # type: ignore[operator]
        found = solved.model.get_submodule("first")(solved.model.get_submodule("embed")(example))
        original = plain.model.get_submodule("first")(plain.model.get_submodule("embed")(example))
    assert after < before
    assert float((found - first).norm()) < float((original - first).norm())
    changed = (solved.model.get_parameter("norm.weight") - plain.model.get_parameter("norm.weight")).detach()
    assert float(changed.abs().max()) > 1e-3


def test_a_lossless_reduction_keeps_every_bit_of_its_norms() -> None:
    model, example = PostNorm().eval(), torch.randn(32, 6, 5)
    plan = intrafusion.compress(model, example, keep={"up": 0.5, "*": 1.0}, restore=None).plan
    small, graph = intrafusion.apply(model, plan, example), intrafusion.inspect(model, example)
    LeastSquares()(small, model, graph, example)
    assert torch.equal(small.model.get_parameter("norm.weight"), model.get_parameter("norm.weight"))
