"""The digits network that is trained on the spot."""

from __future__ import annotations

import torch
from torch import nn

from intrafusion.lab import zoo
from intrafusion.measure.accuracy import accuracy


def test_the_digits_network_learns_the_digits_whatever_the_number_of_threads(digits_network: nn.Module) -> None:
    data = zoo.load_data("digits", "test")
    assert accuracy(zoo.build("digits_resnet"), data.images, data.labels) < 0.3
    model = digits_network
    assert accuracy(model, data.images, data.labels) > 0.97
    try:
        torch.set_num_threads(2)
        again = zoo.train_digits()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
