"""Restoring what a reduction lost, without training."""

from intrafusion.batches import batches
from intrafusion.restore.least_squares import LeastSquares
from intrafusion.restore.pivoting import Pivot, Pivoted, add_shifts_
from intrafusion.restore.synthesize import Synthesis, load_images, save_images

__all__ = ["LeastSquares", "Pivot", "Pivoted", "Synthesis", "add_shifts_", "batches", "load_images", "save_images"]
