"""What a cut costs is measured on batches, and is what one call of all images says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion.budget.sensitivity import Sensitivity
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.restore import Calibration, LeastSquares

X = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_error_of_a_cut_does_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 3)).double()
    graph = intrafusion.inspect(model.eval(), X[:1])
    scores = {g.name: torch.arange(float(g.size), dtype=torch.float64) for g in graph.reducible}
    errors = []
    for sizes in ([80], [50, 30], [1] * 80):
        images = Batches.of(*(Inputs((part,)) for part in X.split(sizes)))
        calibration = Calibration("images", images, model, LeastSquares())
        sensitivity = Sensitivity(model, graph, scores, calibration.moments_of(graph), calibration, Inputs((X[:1],)))
        errors.append(sensitivity.error({"0": 4, "2": 3}))
    assert errors[0] > 0.01
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=1e-8)
