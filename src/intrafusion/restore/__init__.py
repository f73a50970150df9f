"""Restoring what a reduction lost, without training."""

from intrafusion.restore.batches import batches
from intrafusion.restore.least_squares import LeastSquares

__all__ = ["LeastSquares", "batches"]
