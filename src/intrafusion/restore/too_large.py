"""Batches that memory does not hold: recognised, and cut into smaller ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from intrafusion.errors import RecipeError
from intrafusion.network.batches import count_images, cut_call, take_images
from intrafusion.network.calibration_images import warn_caller
from intrafusion.network.inputs import Inputs
from intrafusion.network.rows_apart import is_row_by_row


class TooLarge(Exception):
    """A batch is too large; nothing was written yet.

    Args:
        fitting: images that fit, as far as is known.
        why: what to raise where there is one image only.
    """

    def __init__(self, call: Inputs, fitting: int, why: Exception) -> None:
        super().__init__(str(why))
        self.call, self.why = call, why
        self.size = max(1, min(fitting, count_images(call) - 1))

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            RecipeError, ModelError: what there is does not fit in parts either.
        Warns:
            IntrafusionWarning: it is cut.
        """
        count = count_images(self.call)
        if count < 2 or not is_row_by_row(model, take_images(self.call, 0, 2)):
            raise self.why
        warn_caller(f"restoring: {self.why} Batches of {count} images are cut to {self.size}.")

    def cut(self, batches: Sequence[Inputs]) -> list[Inputs]:
        """All batches in parts that fit."""
        return [part for call in batches for part in cut_call(call, self.size)]


def check_size(call: Inputs, need: int, memory: int | None) -> None:
    """
    Raises:
        TooLarge: a forward pass on this batch holds more than is allowed.
    """
    if memory is not None and need > memory:
        count = count_images(call)
        taken = f"{need:,} bytes, which {f'{count} images take' if count > 1 else 'one image takes'} between two layers"
        raise TooLarge(call, count * memory // need, RecipeError(f"memory: expected at least {taken}, got {memory:,}."))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device, or the machine, had no room; also where another error tells of it."""
    while error is not None:
        said = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
        if said or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        error = error.__cause__
    return False
