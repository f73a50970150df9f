"""Images that were given with their mirror images, which `restore="mirrored"` tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import Inputs

ENOUGH = 50
"""Images held out that can tell whether mirror images help; twelve pointed the wrong way in three cases of five."""


def add_mirrored(images: Batches, model: nn.Module) -> Batches:
    """The images, and behind all of them the mirror image (last dimension) of each; copied when they are read."""
    return read_input_batches(_Mirrored(images), model, images.memory)


def check_mirrors(call: Inputs) -> None:
    """
    Raises:
        ModelError: there is no mirror image of this: it is not one floating tensor of two or more spatial dimensions.
    """
    tensors = call.tensors()
    if len(tensors) != 1 or tensors[0].dim() < 4 or not tensors[0].is_floating_point():
        got = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors) or "no tensor"
        raise ModelError(
            'restore="mirrored": expected images, one floating tensor (N, C, ..., H, W) in a call, got '
            f'{got}; say "images" for other inputs.'
        )


@dataclass(frozen=True, eq=False)
class _Mirrored:
    """Read one batch after another, as often as it is wanted."""

    images: Batches

    __repr__ = show_briefly

    def __iter__(self) -> Iterator[Inputs]:
        yield from self.images
        for call in self.images:
            yield call.map(_mirror)


def _mirror(images: Tensor) -> Tensor:
    return images.flip(-1)
