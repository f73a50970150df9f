"""The gallery of trouble: the smallest network for each thing that can go wrong when channels are told apart."""

from __future__ import annotations

from gallery import (  # noqa: F401
    across,
    attention,
    branching,
    convolution,
    gates,
    movement,
    normalisation,
    quantisation,
    recurrent,
    refusals,
    weights,
)
from gallery.core import CASES, Case, Expect, Inputs

__all__ = ["CASES", "Case", "Expect", "Inputs"]
