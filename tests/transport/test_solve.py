from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from intrafusion.errors import IntrafusionError
from intrafusion.transport import optimal_coupling


def random_problem(n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    a, b = draw.random(n) + 0.05, draw.random(m) + 0.05
    return torch.from_numpy(draw.random((n, m))), torch.from_numpy(a / a.sum()), torch.from_numpy(b / b.sum())


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_square_uniform_problem_is_an_assignment(n):
    cost, _, _ = random_problem(n, n, seed=n)
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    coupling = optimal_coupling(cost, uniform, uniform)
    rows, columns = linear_sum_assignment(cost.numpy())
    expected = torch.zeros(n, n, dtype=torch.float64)
    expected[rows, columns] = 1 / n
    torch.testing.assert_close(coupling, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 1), (5, 3), (7, 6)])
def test_unequal_problem_equals_the_linear_program(n, m):
    cost, a, b = random_problem(n, m, seed=10 * n + m)
    coupling = optimal_coupling(cost, a, b)
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    program = linprog(cost.numpy().ravel(), A_eq=sums, b_eq=[*a, *b])
    assert program.status == 0
    torch.testing.assert_close(coupling.flatten(), torch.from_numpy(program.x), rtol=1e-9, atol=1e-9)


def test_marginals_and_sparsity_of_a_large_plan():
    cost, a, b = random_problem(120, 50, seed=3)
    coupling = optimal_coupling(cost, a, b)
    torch.testing.assert_close(coupling.sum(1), a, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(coupling.sum(0), b, rtol=1e-10, atol=1e-14)
    assert (coupling >= 0).all()
    assert int((coupling > 0).sum()) <= 120 + 50 - 1


def test_a_solver_that_stops_early_is_an_error():
    cost, a, b = random_problem(60, 40, seed=4)
    with pytest.raises(
        IntrafusionError, match=r"60 onto 40 channels stopped before the optimum: .*raise max_iterations"
    ):
        optimal_coupling(cost, a, b, max_iterations=1)


def test_errors():
    cost, half = torch.zeros(2, 2), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"got \(2, 2\), \(2,\), \(3,\)"):
        optimal_coupling(cost, half, torch.ones(3) / 3)
    with pytest.raises(ValueError, match="expected finite distances"):
        optimal_coupling(cost + torch.nan, half, half)
    with pytest.raises(ValueError, match="b: expected masses >= 0, got -0.5"):
        optimal_coupling(cost, half, torch.tensor([1.5, -0.5]))
    with pytest.raises(ValueError, match="a: expected masses >= 0, got nan"):
        optimal_coupling(cost, half * torch.nan, half)
    with pytest.raises(ValueError, match="same mass, got 1.0 and 2.0"):
        optimal_coupling(cost, half, torch.ones(2))


def test_importing_does_not_import_the_solver():
    code = "import sys, intrafusion.reduce, intrafusion.transport; assert 'ot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
