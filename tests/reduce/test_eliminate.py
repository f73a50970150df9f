"""What elimination loses, against readers that are solved anew for every choice of units."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from intrafusion.reduce.eliminate import eliminate
from intrafusion.reduce.problem import Moments

N, SIZE, OUT = 5, 3, 7


def make(seed: int) -> tuple[Tensor, Tensor]:
    """Covariance (d, d) of N units of SIZE channels that can partly be told from each other, and a reader (OUT, d)."""
    generator = torch.Generator().manual_seed(seed)
    d = N * SIZE
    mixed = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, d)
    return mixed @ mixed.T, torch.randn(OUT, d, generator=generator, dtype=torch.float64)


def lost(covariance: Tensor, reader: Tensor, units: tuple[int, ...]) -> float:
    """The error of the reader of these units alone that is solved for what the whole reader gives, with the ridge."""
    c = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    kept = torch.tensor([u * SIZE + k for u in units for k in range(SIZE)], dtype=torch.long)
    told = c[:, kept] @ torch.linalg.inv(c[kept][:, kept]) @ c[kept]
    return float((reader @ (c - told) @ reader.T).trace() / (reader @ covariance @ reader.T).trace())


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_of_readers_that_are_solved_anew(seed: int) -> None:
    covariance, reader = make(seed)
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], reader.T @ reader), SIZE)
    assert sorted(found.order.tolist()) == list(range(N))
    for m in range(N + 1):
        kept = tuple(found.kept(m).tolist())
        assert len(kept) == m
        assert float(found.losses[m]) == pytest.approx(lost(covariance, reader, kept), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_to_go_is_the_one_without_which_least_is_lost(seed: int) -> None:
    covariance, reader = make(seed)
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], reader.T @ reader), SIZE)
    errors = {kept: lost(covariance, reader, kept) for kept in itertools.combinations(range(N), N - 1)}
    assert tuple(found.kept(N - 1).tolist()) == min(errors, key=errors.__getitem__)


def test_a_unit_that_others_tell_goes_first_however_large_it_is() -> None:
    covariance = torch.eye(4, dtype=torch.float64)
    covariance[2:, 2:] = 100 * (covariance[2:, 2:] + 1) / 2
    covariance[2, 3] = covariance[3, 2] = 99.9
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], torch.eye(4).double()), 1)
    assert int(found.order[0]) in (2, 3)


def test_channels_that_never_vary_are_spared_first() -> None:
    covariance = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], torch.eye(4).double()), 1)
    assert set(found.order[:2].tolist()) == {1, 3}
