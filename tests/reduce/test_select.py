from __future__ import annotations

import pytest
import torch

from intrafusion.errors import BudgetError, RecipeError
from intrafusion.reduce import REDUCERS, IntraFusion, Reducer, ReductionProblem, Select, get_reducer, most_important


def problem(importance: list[float], size: int) -> ReductionProblem:
    scores = torch.tensor(importance, dtype=torch.float64)
    return ReductionProblem(torch.eye(len(importance), dtype=torch.float64), scores, size)


def test_select_keeps_the_largest_in_their_order():
    answer = Select()(problem([3.0, 1.0, 2.0, 9.0], 2))
    assert answer.merge.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert torch.equal(answer.unmerge, answer.merge.T)


@pytest.mark.parametrize(
    ("scores", "m", "kept"),
    [
        ([0.0, 0.0, 0.0, 0.0], 2, [0, 1]),
        ([1.0, 2.0, 2.0, 2.0], 2, [1, 2]),
        ([5.0, -1.0, 3.0], 1, [0]),
        ([5.0, -1.0, 3.0], 3, [0, 1, 2]),
        ([7.0], 1, [0]),
    ],
)
def test_most_important(scores, m, kept):
    assert most_important(torch.tensor(scores), m).tolist() == kept


def test_ties_go_to_the_lower_index_also_in_wide_groups():
    assert most_important(torch.zeros(4096), 1000).tolist() == list(range(1000))


@pytest.mark.parametrize("m", [0, 4, -1])
def test_impossible_sizes(m):
    with pytest.raises(BudgetError, match=f"cannot keep {m} of 3 channels; expected 1 <= m <= 3"):
        most_important(torch.ones(3), m)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="expected finite scores"):
        most_important(torch.tensor([1.0, torch.nan]), 1)


def test_registry():
    assert get_reducer("select") == Select()
    assert get_reducer("intrafusion") == IntraFusion()
    mine = IntraFusion(p=2.0)
    assert get_reducer(mine) is mine
    assert all(isinstance(make(), Reducer) for make in REDUCERS.values())
    assert not Select().mixes
    assert IntraFusion().mixes
    with pytest.raises(ValueError, match="unknown reducer 'intrafuse'. Did you mean 'intrafusion'"):
        get_reducer("intrafuse")
    with pytest.raises(RecipeError, match="expected a name, a mapping with a name or an object with `mixes`"):
        get_reducer(Select)  # type: ignore[arg-type]
