from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafusion import inspect
from intrafusion.importance import Observation, ObservationError, RelativeContribution
from intrafusion.observe.observe import observe_for


def test_scores_are_shares_summed_over_outgoing_weights_and_readers() -> None:
    shares = torch.tensor([[0.5, 0.25, 0.25], [1.5, 0.0, 0.5]], dtype=torch.float64)
    seen = Observation(contributions=shares)
    group = inspect(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.rand(1, 2))["0"]
    assert RelativeContribution(normalizer=None)(group, {}, seen).tolist() == [2.0, 0.25, 0.75]
    assert RelativeContribution()(group, {}, seen).tolist() == [2.0, 0.25, 0.75]  # their mean is 1 here
    assert RelativeContribution("max", None)(group, {}, seen).tolist() == [1.5, 0.25, 0.5]


def test_a_hand_made_network() -> None:
    """Two channels of equal weight, one of them three times as active."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).eval()
    model[0].weight.data = torch.eye(2)
    model[2].weight.data = torch.tensor([[1.0, -1.0]])
    images = torch.tensor([[3.0, 1.0], [6.0, 2.0]])
    graph = inspect(model, images)
    seen = observe_for(RelativeContribution(), model, graph, graph.reducible, images)["0"]
    assert RelativeContribution(normalizer=None)(graph["0"], {}, seen).tolist() == pytest.approx([0.75, 0.25])


def test_errors() -> None:
    with pytest.raises(ObservationError, match=r"RelativeContribution\(.*looks at contributions on images.* images="):
        RelativeContribution()(
            inspect(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).eval(), torch.rand(1, 2))["0"], {}
        )
