"""Distances of outputs, against plain NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from intrafusion.measure.drift import drift, histogram, output_error, output_rows


class Two(nn.Module):
    """Two outputs, one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x):
        scores = self.dropout(self.linear(x))
        return {"scores": scores, "squares": scores[:, :, None] ** 2, "class": scores.argmax(1)}


def test_distance_over_all_outputs_in_evaluation_mode():
    first, images = Two().train(), torch.randn(7, 4)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.linear.bias += 1.0
    x, w = images.double().numpy(), first.linear.weight.detach().double().numpy()
    scores = [x @ w.T + m.linear.bias.detach().double().numpy() for m in (first, second)]
    both = [np.concatenate([s, s**2], 1) for s in scores]
    expected = np.linalg.norm(both[1] - both[0], axis=1)
    np.testing.assert_allclose(drift(second, first, images).numpy(), expected, rtol=1e-5)
    assert first.training
    assert first.dropout.training
    assert torch.equal(output_rows(first, images, batch_size=2), output_rows(first, images, batch_size=100))


def test_a_network_does_not_drift_from_itself():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    assert drift(model, copy.deepcopy(model), torch.randn(3, 1, 5, 5)).tolist() == [0, 0, 0]


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        output_rows(nn.Linear(2, 2), torch.zeros(0, 2))


def test_histogram_counts_as_numpy_does_and_what_lies_beyond():
    values, edges = torch.rand(500, dtype=torch.float64) * 3, np.linspace(0, 2, 11)
    expected, _ = np.histogram(values[values < 2].numpy(), edges)
    found = histogram(values, edges.tolist())
    assert found[:-1] == expected.tolist()
    assert found[-1] == int((values >= 2).sum()) > 0


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_value_in_no_bin_is_refused(value):
    with pytest.raises(ValueError, match="histogram"):
        histogram(torch.tensor([0.5, value]), [0.0, 1.0])


def test_an_output_that_does_not_vary_is_compared_with_its_square():
    constant = torch.full((5, 1), 2.0)
    assert output_error([constant + 1], [constant]) == 0.25
    assert output_error([constant + 1, torch.tensor([[1.0], [3.0]])], [constant, torch.tensor([[1.0], [3.0]])]) == 2.5
