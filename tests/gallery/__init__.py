"""The gallery of trouble: the smallest network for each thing that can go wrong when channels are told apart."""

from __future__ import annotations

from gallery import across, attention, branching, convolution, movement, normalisation, recurrent, refusals, weights  # noqa: F401
from gallery import quantisation as quantisation
from gallery.core import CASES, Case, Expect, Inputs

__all__ = ["CASES", "Case", "Expect", "Inputs"]
