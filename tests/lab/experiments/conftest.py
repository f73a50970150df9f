"""A small trained network with few images, made once."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from intrafusion.lab import zoo
from intrafusion.lab.experiments import Subject
from intrafusion.network.inputs import Inputs


@pytest.fixture(scope="session")
def digits(digits_network: nn.Module) -> Subject:
    inputs = Inputs.of(zoo.example_input("digits_resnet"))
    test, train = (zoo.load_data("digits_resnet", split, limit=100) for split in ("test", "train"))
    return Subject("digits", copy.deepcopy(digits_network), inputs, test, train)
