"""What becomes one head: against what is known to be lost, and all pairings."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from intrafusion.heads.maps import as_matrix, merge_pair, merge_rows, pair_up


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(z: Tensor) -> Tensor:
    """Of complex numbers (k, f), as real and imaginary parts head by head."""
    rows = torch.view_as_real(z).flatten(1)
    return rows.T @ rows / len(rows)


def test_multiplication_as_a_matrix() -> None:
    a, b = torch.complex(draw(2, seed=1), draw(2, seed=2))
    torch.testing.assert_close(as_matrix(a) @ torch.view_as_real(b), torch.view_as_real(a * b))


def test_pairs_that_differ_by_a_factor_merge_without_loss_at_every_angle() -> None:
    k = torch.complex(draw(50), draw(50, seed=1))
    factors = torch.polar(torch.tensor([2.0, 0.3, 1.0]).double(), torch.tensor([0.4, -2.0, 1.0]).double())
    keys = k[:, None] * factors
    found = merge_pair(second_moment(keys), torch.tensor([1.0, 5.0, 0.2]).double())
    assert found.lost <= 1e-9 * found.total
    merged = torch.view_as_complex((torch.view_as_real(keys).flatten(1) @ found.merge.T).contiguous())
    q = torch.complex(draw(50, seed=2), draw(50, seed=3))
    for g in range(3):
        mapped = torch.view_as_complex((torch.view_as_real(q) @ found.unmerge[g]).contiguous())  # q <- U^T q
        for angle in (0.0, 0.7):  # a rotary embedding turns queries and keys by their places
            turned = torch.polar(torch.ones(()).double(), torch.tensor(angle).double())
            torch.testing.assert_close((q * turned * keys[:, g].conj()).real, (mapped * turned * merged.conj()).real)


def test_what_a_pair_loses_is_the_best_that_any_factors_reach() -> None:
    """The energy of what the queries see, against the least singular value of the keys in the queries' units."""
    keys, energies = torch.complex(draw(80, 2), draw(80, 2, seed=1)), torch.tensor([1.0, 4.0]).double()
    found = merge_pair(second_moment(keys), energies)
    seen = keys * energies.sqrt()
    assert found.lost == pytest.approx(float(torch.linalg.svdvals(seen)[1].square()) / 80, rel=1e-9)
    merged = torch.view_as_complex((torch.view_as_real(keys).flatten(1) @ found.merge.T).contiguous())
    told = torch.stack(
        [torch.view_as_complex((torch.view_as_real(merged) @ u.T).contiguous()) for u in found.unmerge], 1
    )
    error = float(((keys - told).abs().square() * energies).sum() / 80)
    assert error == pytest.approx(found.lost, rel=1e-9)


def test_heads_without_rotation_merge_into_their_best_directions() -> None:
    w = 3
    common = draw(100, w)
    rows = torch.cat([common @ draw(w, w, seed=s) for s in (1, 2)], 1)
    readings = [draw(5, w, seed=s).T @ draw(5, w, seed=s) for s in (3, 4)]
    found = merge_rows(rows.T @ rows / 100, readings)
    assert found.lost <= 1e-9 * found.total
    merged = rows @ found.merge.T
    torch.testing.assert_close(torch.cat([merged @ u.T for u in found.unmerge], 1), rows)
    noisy = rows + draw(100, 2 * w, seed=5)
    found = merge_rows(noisy.T @ noisy / 100, readings)
    weigh = torch.linalg.cholesky(torch.block_diag(*readings))
    best = torch.linalg.svdvals(noisy @ weigh)[w:].square().sum() / 100
    assert found.lost == pytest.approx(float(best), rel=1e-8)


@pytest.mark.parametrize("n", [2, 6])
def test_pairs_are_the_cheapest_of_all_pairings(n: int) -> None:
    cost = draw(n, n).abs()
    costs = {(i, j): float(cost[i, j]) for i, j in itertools.combinations(range(n), 2)}
    orders = itertools.permutations(range(n))
    total = lambda order: sum(costs[min(p), max(p)] for p in zip(order[::2], order[1::2], strict=True))  # noqa: E731
    found = pair_up(n, costs)
    assert sorted(x for pair in found for x in pair) == list(range(n))
    assert sum(costs[p] for p in found) == pytest.approx(min(map(total, orders)))


def test_of_many_heads_the_cheapest_pairs_go_first() -> None:
    costs = {(i, j): float(abs(j - i - 5)) for i, j in itertools.combinations(range(10), 2)}
    assert sorted(pair_up(10, costs)) == [(i, i + 5) for i in range(5)]
