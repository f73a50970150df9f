from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from intrafusion import inspect
from intrafusion.importance import LAMP, Magnitude
from intrafusion.importance.features import linear_rows


def test_each_score_is_divided_by_all_that_are_not_smaller() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    graph = inspect(model, torch.randn(1, 3))
    group, weights = graph["0"], {k: v.double() for k, v in model.state_dict().items()}
    sizes = sum(rows.square().sum(1).numpy() for rows in linear_rows(group, weights)) / 2
    expected = [s / sizes[sizes >= s].sum() for s in sizes]
    np.testing.assert_allclose(LAMP(folded=True)(group, weights).numpy(), expected, rtol=1e-12)
    magnitudes = Magnitude(p=2, folded=True)(group, weights)
    assert LAMP(folded=True)(group, weights).argsort().tolist() == magnitudes.argsort().tolist()
    assert float(LAMP(folded=True)(group, weights).max()) == 1.0


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown reduction 'men'"):
        LAMP(reduction="men")
