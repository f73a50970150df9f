"""Restoring what a reduction lost, without training."""

from intrafusion.restore.batches import batches
from intrafusion.restore.least_squares import LeastSquares
from intrafusion.restore.pivoting import Pivot, Pivoted, add_shifts_

__all__ = ["LeastSquares", "Pivot", "Pivoted", "add_shifts_", "batches"]
