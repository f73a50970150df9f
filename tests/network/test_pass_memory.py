"""What a forward pass holds, against what the tensors of a small network take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from intrafusion.network.inputs import Inputs
from intrafusion.network.pass_memory import PASS, choose_size, measure_pass

X = torch.zeros(5, 1000)


class Steps(nn.Module):
    """Holds its copied input, then two tensors three times as long, then one of them beside a short one."""

    def forward(self, x: Tensor) -> Tensor:
        a = torch.cat([x, x, x], 1)
        b = a * 2
        view = b.view(-1).view(len(x), -1)
        del a
        return view[:, :10].clone()


def test_tensors_that_are_alive_together_are_counted_and_views_once() -> None:
    own = X.nbytes
    assert measure_pass(Steps(), Inputs((X,))) == own + own + 3 * own + 3 * own


def test_weights_are_not_counted() -> None:
    model = nn.Linear(1000, 10)
    assert measure_pass(model, Inputs((X,))) == 2 * X.nbytes + 5 * 10 * 4


def test_images_at_a_time_are_a_power_of_two_within_the_memory() -> None:
    each = 8 * 1000 * 4  # bytes, see above
    assert choose_size(Steps(), Inputs((X,)), 4 * 7 * each) == 4
    assert choose_size(Steps(), Inputs((X,)), 4 * each) == 1
    assert choose_size(Steps(), Inputs((X,))) == min(256, 2 ** ((PASS // each).bit_length() - 1))


@pytest.mark.parametrize("scale", [1, 50])
def test_the_size_does_not_depend_on_what_is_free(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intrafusion.network.free_memory._find_available", lambda: 10**6 * scale)
    assert choose_size(Steps(), Inputs((X,))) == 256
