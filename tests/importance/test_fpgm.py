from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from intrafusion import ChannelGroup, inspect
from intrafusion.errors import ModelError
from intrafusion.importance import FPGM


@pytest.mark.parametrize(("p", "metric"), [(2.0, "euclidean"), (1.0, "cityblock")])
def test_distances_to_all_other_channels_per_member(p: float, metric: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 2)).eval()
    graph = inspect(model, torch.randn(1, 2, 8, 8))
    weights = {k: v.double() for k, v in model.state_dict().items()}
    rows = [weights["0.weight"].flatten(1).numpy(), weights["2.weight"].transpose(0, 1).flatten(1).numpy()]
    apart = [cdist(r, r, metric=metric).sum(1) for r in rows]  # type: ignore[call-overload]
    mean = np.mean(apart, axis=0)
    np.testing.assert_allclose(FPGM(p, "mean", None, folded=True)(graph["0"], weights).numpy(), mean, rtol=1e-12)
    normal = FPGM(p, "mean", folded=True)(graph["0"], weights)
    np.testing.assert_allclose(normal.numpy(), mean / mean.mean(), rtol=1e-12)
    np.testing.assert_allclose(FPGM(p, normalizer=None, folded=True)(graph["0"], weights).numpy(), apart[0], rtol=1e-12)


def test_the_channel_in_the_middle_is_the_least_important() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).eval()
    model[0].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    model[2].weight.data = torch.ones(1, 5)
    graph = inspect(model, torch.randn(1, 2))
    assert int(FPGM(folded=True)(graph["0"], model.state_dict()).argmin()) == 4


def test_errors() -> None:
    with pytest.raises(ValueError, match="p: expected p > 0, got -1"):
        FPGM(p=-1)
    with pytest.raises(ModelError, match="group 'empty': no weight to compare"):
        FPGM(folded=True)(ChannelGroup("empty", 3, ()), {})
