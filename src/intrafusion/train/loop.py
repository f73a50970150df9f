"""The one training loop: seeded, resumable after any epoch, with early stopping.

`train_` puts the network into the state to train in, `_Run` goes from epoch to epoch and from update to update.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError, DivergenceError, show
from intrafusion.measure.accuracy import accuracy
from intrafusion.train.accelerator import find_accelerator
from intrafusion.train.adapters import adapt
from intrafusion.train.checkpoint import Course, clone_tensors, put_tensors_, resume_, write_checkpoint
from intrafusion.train.objectives import Labels, Objective
from intrafusion.train.training import Epoch, History, Labelled, Training

Augment = Callable[[Tensor, torch.Generator], Tensor]
Judge = Callable[[nn.Module], float]

_TIMED = 10  # updates before it is looked at how long they take


@checked
def train_(
    model: nn.Module,
    data: Labelled,
    how: Training | None = None,
    *,
    objective: Objective | None = None,
    validation: Labelled | Judge | None = None,
    masks: Mapping[str, Tensor] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    augment: Augment | None = None,
    within: str = "",
    folder: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> History:
    """Train a network in place; modules keep their train or eval mode, parameters their identity and requires_grad.

    Runs on the device of the network, or on all devices that `accelerate launch` gave it. The same seed gives the same
    weights, bit for bit, on one machine with one number of threads, also if it was interrupted and then resumed.

    Args:
        data: images and labels in memory; their number is at least one batch, else the batch is smaller.
        how: hyper-parameters; `Training()` by default.
        objective: `Labels()` by default; `Distillation(original)` and `Block(...)` need no labels.
        validation: measured after every epoch; the network ends with the weights of the best one. Images, or a function
            of the network, higher being better.
        masks: entries of weights that may be other than zero, by name; see `intrafusion.train.masks`.
        penalty: added to the loss, such as `factorize.Smooth(...)`.
        augment: (images, generator) -> images, for each batch.
        within: train this module only; what comes before it is then in evaluation mode.
        folder: keep a checkpoint there after every epoch, and resume from it.
        on_epoch: called as (index, epoch) after every epoch.
    Raises:
        ArgumentError: no images, or patience without validation images.
        ModelError: nothing to train, labels that are missing, or masks that do not fit.
        FolderError: a checkpoint of another training.
        DivergenceError: the loss is NaN.
        IntrafusionError: Accelerate is needed and not installed.
    """
    how = how or Training()
    _check_data(data, how, validation)
    options = {"rank": how.rank, "alpha": how.alpha, "masks": masks, "within": within, "seed": how.seed}
    with _keep_modes(model), _keep_random_state(model), adapt(model, how.trainable, **options) as trained:
        accelerator = find_accelerator(how.precision)
        objective = objective or Labels()
        run = _Run(model, data, how, objective, validation, penalty, augment, within, trained, accelerator)
        return run.go(None if folder is None else Path(folder), on_epoch or (lambda index, epoch: None))


def _check_data(data: Labelled, how: Training, validation: Labelled | Judge | None) -> None:
    if not len(data.images) or len(data.images) != len(data.labels):
        raise ArgumentError(f"expected one label per image, got {len(data.images)} images, {len(data.labels)} labels.")
    if isinstance(validation, nn.Module):
        raise ArgumentError(f"validation: expected images or a function of the network, got {show(validation)}.")
    if how.patience is not None and validation is None:
        raise ArgumentError("patience: stopping early needs validation images; give some, out of the training set.")


@dataclass(eq=False)
class _Run:
    """One training under way."""

    model: nn.Module
    data: Labelled
    how: Training
    objective: Objective
    validation: Labelled | Judge | None
    penalty: Callable[[nn.Module], Tensor] | None
    augment: Augment | None
    within: str
    trained: list[nn.Parameter]
    accelerator: Any
    course: Course = field(default_factory=Course)
    began: float | None = None  # the epoch under way

    def __post_init__(self) -> None:
        several = self.accelerator.num_processes > 1
        if several:
            self.model.to(self.accelerator.device)
        self.optimizer: Optimizer = self.how.build_optimizer(self.trained)
        self.called = self.accelerator.prepare(self.model) if several else self.model
        self.stepper = self.accelerator.prepare_optimizer(self.optimizer)

    # ---- from epoch to epoch ----------------------------------------------------------------------------------------

    def go(self, folder: Path | None, on_epoch: Callable[[int, Epoch], None]) -> History:
        if folder is not None:
            self.resume(folder)
        while not self.is_finished():
            epoch = self.run_epoch()
            if folder is not None and self.accelerator.is_main_process:
                write_checkpoint(folder, self.how, len(self.data.images), self.tensors, self.optimizer, self.course)
            on_epoch(len(self.course.epochs) - 1, epoch)
        return self.finish()

    def resume(self, folder: Path) -> None:
        found = resume_(folder, self.how, len(self.data.images), self.tensors, self.optimizer)
        self.course = found or self.course

    def is_finished(self) -> bool:
        course, patience = self.course, self.how.patience
        waited = len(course.epochs) - 1 - course.best
        return (
            course.steps >= self.total
            or (course.steps > 0 and self.is_time_over)
            or (bool(course.epochs) and patience is not None and waited >= patience)
        )

    def run_epoch(self) -> Epoch:
        self.began = start = time.perf_counter()
        loss = self.pass_over_data()
        rate, validation = self.find_rate(self.course.steps - 1), self.validate()
        epoch, self.began = Epoch(loss, rate, time.perf_counter() - start, validation), None
        self.note(epoch)
        return epoch

    def validate(self) -> float | None:
        if isinstance(self.validation, Labelled):
            return accuracy(self.model, self.validation.images, self.validation.labels)
        return None if self.validation is None else _check_number(self.validation(self.model))

    def note(self, epoch: Epoch) -> None:
        """Add an epoch that is done; the best is the first of those with the highest validation, or else the last."""
        course = self.course
        course.epochs.append(epoch)
        best = course.epochs[course.best].validation
        if epoch.validation is None:
            course.best = len(course.epochs) - 1
        elif len(course.epochs) == 1 or best is None or epoch.validation > best:
            course.best, course.best_weights = len(course.epochs) - 1, clone_tensors(self.tensors)

    def finish(self) -> History:
        """Take the best weights."""
        course = self.course
        if course.best_weights:
            put_tensors_(self.tensors, course.best_weights)
        return History(tuple(course.epochs), sum(p.numel() for p in self.trained), course.steps, course.best)

    # ---- from update to update --------------------------------------------------------------------------------------

    def pass_over_data(self) -> float:
        """Mean loss; everything random in a pass depends on the seed and the number of the epoch alone."""
        torch.manual_seed(_seed_of(self.how, len(self.course.epochs)))
        _set_mode_(self.model, self.within, self.how)
        order, generator = _draw_order(self.how, len(self.course.epochs), len(self.data.images))
        chosen = _split_batches(order, self.how)[: self.total - self.course.steps]
        losses = list[float]()
        for batch in chosen:
            losses.append(self.update(batch, generator))
            if self.is_time_over:
                break
        return sum(losses) / len(losses)

    def update(self, chosen: Tensor, generator: torch.Generator) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.find_rate(self.course.steps)
        self.stepper.zero_grad()  # of what was there before the training too
        loss = self.add_gradients(*self.take(chosen, generator))
        if self.how.clip is not None:
            self.accelerator.clip_grad_norm_(self.trained, self.how.clip)
        self.stepper.step()
        self.stepper.zero_grad()
        self.course.steps += 1
        return loss

    def take(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images of a batch, augmented, and their labels: this process's share."""
        images, labels = self.data.images[chosen], self.data.labels[chosen]
        if self.augment is not None:
            images = _check_tensor(self.augment(images, generator), "augment")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return images[rank::world], labels[rank::world]

    def add_gradients(self, images: Tensor, labels: Tensor) -> float:
        """Of the mean loss of a batch, part by part."""
        total, count = 0.0, self.how.accumulate
        for part, own in zip(_cut(images, count), _cut(labels, count), strict=True):
            loss = self.find_loss(part, own, len(own) / len(labels))
            self.accelerator.backward(loss)
            total += float(loss.detach())
        return total

    def find_loss(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        first = self.trained[0]
        images = images.to(first.device, first.dtype if images.is_floating_point() else None)
        with self.accelerator.autocast():
            loss = _check_tensor(self.objective(self.called, images, labels.to(first.device)), "objective") * share
            if self.penalty is not None:
                loss = loss + _check_tensor(self.penalty(self.model), "penalty").to(loss) * share
        if not bool(torch.isfinite(loss)):
            raise DivergenceError(
                f"train: the loss is {loss.item()} after {self.course.steps} updates; lower lr (now {self.how.lr})."
            )
        return loss

    # ---- what it knows ----------------------------------------------------------------------------------------------

    @cached_property
    def per_epoch(self) -> int:
        return len(_split_batches(torch.arange(len(self.data.images)), self.how))

    @cached_property
    def total(self) -> int:
        """Updates in all."""
        updates = self.how.epochs * self.per_epoch
        return updates if self.how.steps is None else min(updates, self.how.steps)

    @property
    def time_passed(self) -> float:
        """As a share of the budget, 0 without one; what an interruption took does not count."""
        if self.how.seconds is None:
            return 0.0
        now = 0.0 if self.began is None else time.perf_counter() - self.began
        return (sum(epoch.seconds for epoch in self.course.epochs) + now) / self.how.seconds

    @property
    def is_time_over(self) -> bool:
        return self.time_passed >= 1

    def find_rate(self, step: int) -> float:
        late = min(int(self.time_passed * self.total), self.total - 1) if step >= _TIMED else 0
        return self.how.find_rate(max(step, late), self.total, self.per_epoch)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes: parameters, adapters and buffers."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def _check_number(value: Any) -> float:
    """What a function of the caller gave."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"train: validation: expected a function that returns a number, got {show(value)} from it.")
    return float(value)


def _check_tensor(value: Any, name: str) -> Tensor:
    """What a function of the caller gave."""
    if not isinstance(value, Tensor):
        raise ArgumentError(f"train: {name}: expected a function that returns a tensor, got {show(value)} from it.")
    return value


# ---- order of the images --------------------------------------------------------------------------------------------


def _seed_of(how: Training, epoch: int) -> int:
    return how.seed * 1_000_003 + epoch


def _draw_order(how: Training, epoch: int, count: int) -> tuple[Tensor, torch.Generator]:
    """Order of `count` images (count,) in an epoch, and where the other random numbers of its batches come from."""
    if how.shuffle == "epoch":
        generator = torch.Generator().manual_seed(_seed_of(how, epoch))
    else:
        generator = torch.Generator().manual_seed(how.seed)
        for _ in range(epoch):  # replayed, so that a resumed training goes on in the same stream
            torch.randperm(count, generator=generator)
    return torch.randperm(count, generator=generator), generator


def _split_batches(order: Tensor, how: Training) -> Sequence[Tensor]:
    batches = order.split(how.batch_size)
    if how.drop_last:
        return batches[: max(1, len(order) // how.batch_size)]
    return [batch for batch in batches if len(batch) > 1] or batches


def _cut(x: Tensor, count: int) -> Sequence[Tensor]:
    return x.tensor_split(min(count, len(x)))


# ---- how the network is found and left ------------------------------------------------------------------------------


def _set_mode_(model: nn.Module, within: str, how: Training) -> None:
    if how.evaluating or within:
        model.eval()
    if not how.evaluating:
        model.get_submodule(within).train()
    elif how.norms:
        for module in model.get_submodule(within).modules():
            module.training = isinstance(module, _BatchNorm)


@contextmanager
def _keep_modes(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _keep_random_state(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield
