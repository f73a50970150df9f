"""The laws of reducers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intrafusion.arguments import Seed, checked
from intrafusion.checks.laws import Checking, adopt, describe_kind, random_order
from intrafusion.checks.snapshot import copy_tensors, other_random_numbers, tensors_in
from intrafusion.reduce import Moments, ReducerTraits, ReductionMap, ReductionProblem


@checked
def check_reducer(reducer: Any, *, seed: Seed = 0) -> tuple[str, ...]:
    """Hold a reducer to its laws, on random problems and on degenerate ones.

    Returns:
        the laws that hold.
    Raises:
        LawError: the first law that does not.
    """
    reducer = adopt(reducer, "reducer")
    checking = Checking(reducer)
    checking.law("shape", ReducerTraits.are_told_by(reducer), "expected an attribute mixes, True or False")
    for n, m in ((8, 5), (12, 3), (7, 6), (6, 1), (1, 1), (9, 9)):
        _check_map(checking, reducer, _random_problem(n, m, seed), f"{n} random channels to {m}", seed)
    for where, problem in _degenerate_problems(seed):
        _check_shapes(checking, reducer, reducer(problem), problem, where)
    for n in (1, 2, 9):
        _check_identity(checking, reducer(_random_problem(n, n, seed)), n)
    if ReducerTraits.of(reducer).absorbs_duplicates:
        for times in ((2, 2, 2, 2), (1, 4, 2, 3)):
            _check_duplicates(checking, reducer, times, seed)
    return checking.laws


def _random_problem(n: int, m: int, seed: int, d: int = 9) -> ReductionProblem:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=draw, dtype=torch.float64)
    importance = (torch.randperm(n, generator=draw) + 1).double() / n
    biases = torch.randn(n, 2, generator=draw, dtype=torch.float64)
    return ReductionProblem(rows, importance, m, seed, biases, _moments_like(rows))


def _moments_like(rows: Tensor) -> Moments:
    """Statistics that channels with these rows might have, at two points."""
    means = torch.stack([rows.mean(1), rows.mean(1).abs()])
    covariances = torch.stack([rows @ rows.T, (rows @ rows.T).square()])
    return Moments(means, covariances, rows @ rows.T + torch.eye(len(rows), dtype=rows.dtype))


def _degenerate_problems(seed: int) -> Iterator[tuple[str, ReductionProblem]]:
    ordinary = _random_problem(8, 3, seed)
    rows = ordinary.features
    some = rows.clone()
    some[::2] = 0
    for where, features in (
        ("every other channel is zero", some),
        ("all channels are zero", torch.zeros_like(rows)),
        ("all channels are equal", rows[:1].expand(8, -1).clone()),
        ("all channels point the same way", rows[:1] * torch.arange(1.0, 9.0, dtype=rows.dtype)[:, None]),
    ):
        yield where, replace(ordinary, features=features, moments=_moments_like(features))
    yield "all scores are 0", replace(ordinary, importance=torch.zeros(8, dtype=torch.float64))
    yield "no biases and no moments", replace(ordinary, biases=None, moments=None)
    yield "biases of no layer", replace(ordinary, biases=torch.zeros(8, 0, dtype=torch.float64))


def _check_map(checking: Checking, reducer: Any, problem: ReductionProblem, where: str, seed: int) -> None:
    before = copy_tensors(problem)
    found = reducer(problem)
    _check_shapes(checking, reducer, found, problem, where)
    for name, tensor in tensors_in(problem):
        checking.equal("inputs untouched", tensor, before[name], f"{where}, {name}")
    with other_random_numbers():
        again = reducer(problem)
    checking.equal("deterministic", again.merge, found.merge, f"{where}, merge, asked again")
    checking.equal("deterministic", again.unmerge, found.unmerge, f"{where}, unmerge, asked again")
    if not ReducerTraits.of(reducer).random:
        _check_relabelled(checking, found, reducer, problem, random_order(len(problem.importance), seed), where)


def _check_shapes(checking: Checking, reducer: Any, found: Any, problem: ReductionProblem, where: str) -> None:
    n, m = len(problem.importance), problem.size
    checking.law(
        "shape", isinstance(found, ReductionMap), f"{where}: expected a ReductionMap, got {describe_kind(found)}"
    )
    for name, shape in (("merge", (m, n)), ("unmerge", (n, m)), ("shift", (n,))):
        matrix = getattr(found, name, None)
        if matrix is not None or name != "shift":
            right = isinstance(matrix, Tensor) and matrix.shape == shape and matrix.dtype == torch.float64
            checking.law("shape", right, f"{where}: {name}: expected float64{list(shape)}, got {describe_kind(matrix)}")
            count = count_holes(matrix)
            checking.law("finite", not count, f"{where}: {name} holds {count} NaN or infinite entries")
    if not reducer.mixes:
        ones = (found.merge == 1).sum(1), (found.merge != 0).sum(1), (found.merge != 0).sum(0)
        holds = bool((ones[0] == 1).all() and (ones[1] == 1).all() and (ones[2] <= 1).all())
        checking.law("selects", holds, f"{where}: expected one 1 in each row of merge, got {found.merge.tolist()}")


def count_holes(tensor: Any) -> int:
    """How many entries are NaN or infinite."""
    return int((~torch.isfinite(tensor)).sum())


def _check_relabelled(
    checking: Checking, found: ReductionMap, reducer: Any, problem: ReductionProblem, order: Tensor, where: str
) -> None:
    """The new channels may come in any order: each is looked for among those of the first answer."""
    other = reducer(_reorder_problem(problem, order))
    expected = found.merge[:, order]
    match = torch.cdist(other.merge, expected).argmin(1)
    where = f"{where}, in the order {order.tolist()}"
    once = len(match.unique()) == len(match)
    checking.law("relabelling", once, f"{where}: two new channels are the same one of the first answer")
    checking.close("relabelling", other.merge, expected[match], f"{where}, merge")
    checking.close("relabelling", other.unmerge, found.unmerge[order][:, match], f"{where}, unmerge")


def _reorder_problem(problem: ReductionProblem, order: Tensor) -> ReductionProblem:
    moments = problem.moments
    if moments is not None:
        covariances, reader = moments.covariances[:, order][:, :, order], moments.reader[order][:, order]
        moments = Moments(moments.means[:, order], covariances, reader)
    biases = None if problem.biases is None else problem.biases[order]
    features, importance = problem.features[order], problem.importance[order]
    return replace(problem, features=features, importance=importance, biases=biases, moments=moments)


def _check_identity(checking: Checking, found: ReductionMap, n: int) -> None:
    where = f"keeping {n} of {n} channels"
    order = found.merge.argmax(1)
    permutation = torch.eye(n, dtype=torch.float64)[order]
    once = f"{where}: channel {int(order.mode().values)} is kept more than once"
    checking.law("identity", len(order.unique()) == n, once)
    checking.close("identity", found.merge, permutation, f"{where}, merge")
    checking.close("identity", found.unmerge, permutation.T, f"{where}, unmerge")
    shift = getattr(found, "shift", None)
    if shift is not None:
        checking.close("identity", 1 + shift, torch.ones_like(shift), f"{where}, 1 + shift")


def _check_duplicates(checking: Checking, reducer: Any, times: tuple[int, ...], seed: int) -> None:
    """Different channels, each several times, of which one is more important: consumers must get the same sum."""
    m, n, d = len(times), sum(times), 6
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, d, generator=draw, dtype=torch.float64)
    owner = torch.cat([torch.arange(m), torch.arange(m).repeat_interleave(torch.tensor(times) - 1)])
    importance = torch.where(torch.arange(n) < m, 2.0, 1.0).double() + torch.rand(n, generator=draw)
    order = torch.randperm(n, generator=draw)
    owner, importance = owner[order], importance[order]
    features = torch.cat([rows[owner], rows[owner].flip(1)], dim=1)
    found = reducer(ReductionProblem(features, importance, m, seed, rows[owner, :1], _moments_like(features)))
    signals = torch.randn(5, d, generator=draw, dtype=torch.float64)
    weights = torch.randn(3, n, generator=draw, dtype=torch.float64)
    expected = (signals @ rows[owner].T).relu() @ weights.T
    reduced = (signals @ (found.merge @ rows[owner]).T).relu() @ (weights @ found.unmerge).T
    where = f"{m} channels, {', '.join(map(str, times))} times, merged into {m}"
    checking.close("absorbs duplicates", reduced, expected, where)
