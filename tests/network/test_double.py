"""Networks in float64, also where an operation has none."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

import intrafusion
from intrafusion.network.double import copy_as_double, run_in_double
from intrafusion.network.inputs import Inputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_that_torch_quantised_is_left_alone_and_the_others_are_not() -> None:
    """Against the original in which the channels that went are read as zeros."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        quantised = quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)
    model = nn.Sequential(nn.Linear(6, 8), quantised, nn.ReLU(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3)).eval()
    x = torch.randn(4, 6)
    small = intrafusion.compress(model, x, 0.5, reducer="select", restore=None)
    assert small.plan.sizes == {"3": 4}
    reasons = {d.group: d.reason for d in small.plan.decisions}
    assert "quantized::linear_dynamic" in str(reasons["0"])
    kept = [next(i for i in range(9) if torch.equal(row, model[3].weight[i])) for row in small.model[3].weight]
    reference = copy.deepcopy(model)
    reference[5].weight.data[:, [i for i in range(9) if i not in kept]] = 0
    torch.testing.assert_close(small.model(x), reference(x))


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 8)  # of no type: float32, whatever x is
        y[:, ::2] = self.enter(x)
        y[:, 1::2] += y[:, ::2]
        return self.leave(y)


def test_what_is_written_into_part_of_a_shorter_tensor_is_not_lost() -> None:
    """Its double must not be a copy, or any two networks that write so would seem to be alike."""
    torch.manual_seed(0)
    model, x = Written(), torch.randn(2, 5, dtype=torch.float64)
    double = copy_as_double(model)
    h = double.enter(x)
    expected = double.leave(torch.stack([h, h], -1).flatten(1))
    torch.testing.assert_close(run_in_double(double, Inputs.of(x)), [expected.detach()], rtol=1e-14, atol=1e-14)
