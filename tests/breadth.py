"""Grids of cases, of which `make test` runs a part and `make fuzz` all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]


def spread(many: Sequence[Any], few: Sequence[Any]) -> list[Any]:
    """Every pair of the two; only one for each of `many`, with `few` taken in turn, is not exhaustive."""
    return [
        pytest.param(one, other, id=f"{one}-{other}", marks=[] if at == index % len(few) else EXHAUSTIVE)
        for index, one in enumerate(many)
        for at, other in enumerate(few)
    ]
