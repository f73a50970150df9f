"""Records of every experiment."""

from __future__ import annotations

import pytest
from lab.report.samples import some_of_every_experiment

from intrafusion.lab.bench import Record


@pytest.fixture
def records() -> list[Record]:
    return some_of_every_experiment()
