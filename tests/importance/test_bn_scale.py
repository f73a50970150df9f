from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from intrafusion import inspect
from intrafusion.errors import ModelError
from intrafusion.importance import BNScale, ObservationError
from intrafusion.observe.observe import observe_for


class TwoNorms(nn.Module):
    """A stream with a batch norm behind each of its two producers, and an inner group with none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.inner, self.outer, self.norm2 = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x)).relu()
        return self.head(x + self.norm2(self.outer(self.inner(x).relu())))


X = torch.randn(2, 2, 3, 3)


def test_scores_are_the_networks_own_scales_over_the_norms() -> None:
    model = TwoNorms().eval()
    model.norm1.weight.data = torch.tensor([1.0, -2.0, 0.0, 4.0])
    model.norm2.weight.data = torch.tensor([3.0, 0.0, -1.0, 8.0])
    graph = inspect(model, X)
    group = graph["stem"]
    seen = observe_for(BNScale(), model, graph, [group], None)["stem"]
    assert BNScale("sum", None)(group, {}, seen).tolist() == [4.0, 2.0, 1.0, 12.0]
    assert BNScale("max", None)(group, {}, seen).tolist() == [3.0, 2.0, 1.0, 8.0]
    assert BNScale()(group, {}, seen).tolist() == [4 / 4.75, 2 / 4.75, 1 / 4.75, 12 / 4.75]


def test_other_norms_count_only_where_there_is_no_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model[1].weight.data = torch.tensor([1.0, -2.0, 0.5, 3.0])
    graph = inspect(model, torch.randn(5, 3))
    seen = observe_for(BNScale(), model, graph, graph.reducible, None)["0"]
    assert BNScale(normalizer=None)(graph["0"], {}, seen).tolist() == [1.0, 2.0, 0.5, 3.0]


def test_a_group_without_norm_says_so() -> None:
    model = TwoNorms().eval()
    graph = inspect(model, X)
    seen = observe_for(BNScale(), model, graph, graph.reducible, None)
    with pytest.raises(ModelError, match="group 'inner': no norm scales its channels"):
        BNScale()(graph["inner"], {}, seen["inner"])
    with pytest.raises(ObservationError, match=r"BNScale\(.*group 'stem': expected an Observation with tensors"):
        BNScale()(graph["stem"], {})
