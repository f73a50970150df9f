"""What a training needs to go on after it was stopped, in a file that is read without running code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from intrafusion.brief import show_briefly
from intrafusion.errors import FolderError
from intrafusion.io.atomic import atomic_file, report_unreadable
from intrafusion.train.training import Epoch, Training

_FILE = "checkpoint.pt"


@dataclass(eq=False)
class Course:
    """How far a training is.

    Attributes:
        epochs: those that are done.
        steps: updates made.
        best: index of the epoch to end with, and
        best_weights: what the network had then; empty where nothing was validated.
    """

    epochs: list[Epoch] = field(default_factory=list)
    steps: int = 0
    best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    __repr__ = show_briefly


def write_checkpoint(
    folder: Path, how: Training, count: int, tensors: Mapping[str, Tensor], optimizer: Optimizer, course: Course
) -> None:
    """`count` images and `how` tell the training from others; `tensors` is everything that it changes."""
    content = {
        "how": asdict(how),
        "images": count,
        "tensors": clone_tensors(tensors),
        "optimizer": optimizer.state_dict(),
        "steps": course.steps,
        "epochs": [asdict(epoch) for epoch in course.epochs],
        "best": course.best,
        "best_weights": course.best_weights,
    }
    with atomic_file(folder / _FILE) as path, path.open("wb") as file:
        torch.save(content, file)


def resume_(
    folder: Path, how: Training, count: int, tensors: Mapping[str, Tensor], optimizer: Optimizer
) -> Course | None:
    """Put the checkpoint of a folder into tensors and optimizer; None where there is none.

    It is read and checked before anything is written.

    Raises:
        FolderError: it is damaged, or of another training.
    """
    path = folder / _FILE
    with report_unreadable(path):
        if not path.is_file():
            return None
    made_with, images, saved, optimizer_state, course = _read(path)
    if (made_with, images) != (how, count):
        raise FolderError(f"{path}: is of a training with other data or options; remove it, or choose another folder.")
    for found in (saved, course.best_weights or saved):
        if {n: t.shape for n, t in tensors.items()} != _find_shapes(found):
            raise FolderError(f"{path}: is of another network; remove it, or choose another folder.")
    with _damage_named(path):
        optimizer.load_state_dict(optimizer_state)
    put_tensors_(tensors, saved)
    return course


def _read(path: Path) -> tuple[Training, int, dict[str, Tensor], dict[str, Any], Course]:
    with _damage_named(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        epochs = [Epoch(**epoch) for epoch in content["epochs"]]
        course = Course(epochs, content["steps"], content["best"], content["best_weights"])
        how = Training(**content["how"])  # what an older version wrote lacks later options, and means their defaults
        return how, content["images"], content["tensors"], content["optimizer"], course


def _find_shapes(saved: Any) -> dict[str, Any] | None:
    """Of what should be tensors by name, and may be anything in a file that somebody else wrote."""
    return {n: getattr(t, "shape", None) for n, t in saved.items()} if isinstance(saved, Mapping) else None


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise FolderError(f"{path}: damaged, or no checkpoint of a training ({error}); remove it.") from error


def clone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def put_tensors_(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
