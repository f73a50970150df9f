"""The training loop on Hugging Face Accelerate: seeded, resumable after any epoch, with early stopping."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from intrafusion.errors import FolderError, IntrafusionError, unknown_name
from intrafusion.io.atomic import atomic_file
from intrafusion.measure.accuracy import accuracy
from intrafusion.train.adapters import adapted, kinds_of
from intrafusion.train.objectives import Labels, Objective

Augment = Callable[[Tensor, torch.Generator], Tensor]
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float, float], Optimizer]] = {
    "adamw": lambda parameters, lr, decay: AdamW(parameters, lr, weight_decay=decay),
    "sgd": lambda parameters, lr, decay: SGD(parameters, lr, momentum=0.9, weight_decay=decay),
}
DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda done, epoch: 1 - done,
    "cosine": lambda done, epoch: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done, epoch: 1.0,
    "halving": lambda done, epoch: 0.5 ** (epoch // 30),  # Theus et al. 2024, fine-tuning
}
CHECKPOINT = "checkpoint.pt"


class Labelled(Protocol):
    """Images (k, ...) and their class numbers (k,), such as `zoo.Images`."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        epochs: passes over the data.
        steps: stop after this many updates, whatever is left of the epochs; None for all.
        batch_size: images per update.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        lr: largest learning rate.
        weight_decay: of the optimizer.
        warmup: fraction of all updates over which the rate rises from 0.
        decay: of the rate after that: "linear" or "cosine" to 0, "constant", or "halving" every 30 epochs.
        trainable: "full", "biases", "norms", "head", "lora", or several joined by "+".
        rank: of the low-rank changes, and
        alpha: their weight, alpha / rank.
        accumulate: parts into which each batch is cut to save memory; the update is that of the whole batch.
        precision: "no", "bf16" or "fp16": of the forward pass.
        patience: stop when the validation accuracy has not risen for this many epochs; None for never.
        clip: largest norm of the gradient; None for any.
        seed: of the order of images, of dropout and of low-rank changes.
    """

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.1
    decay: str = "linear"
    trainable: str = "full"
    rank: int = 32
    alpha: float = 16.0
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    patience: int | None = None
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        kinds_of(self.trainable)
        for kind, name, valid in (("optimizer", self.optimizer, OPTIMIZERS), ("decay", self.decay, DECAYS)):
            if name not in valid:
                raise ValueError(unknown_name(kind, name, valid))
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(unknown_name("precision", self.precision, ("no", "bf16", "fp16")))
        least = {"epochs": self.epochs, "batch_size": self.batch_size, "accumulate": self.accumulate, "rank": self.rank}
        least |= {} if self.patience is None else {"patience": self.patience}
        least |= {} if self.steps is None else {"steps": self.steps}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value!r}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a fraction in [0, 1), got {self.warmup!r}.")


@dataclass(frozen=True)
class Epoch:
    """One pass: mean loss, learning rate at its end, seconds it took, and validation accuracy in [0, 1] if measured."""

    loss: float
    lr: float
    seconds: float
    validation: float | None = None


@dataclass(frozen=True)
class History:
    """What a training did.

    Attributes:
        epochs: in order, those before an interruption included.
        trained: number of values that were trained, adapters included.
        steps: updates made.
        best: index of the epoch whose weights the network has now; the last one without validation.
    """

    epochs: tuple[Epoch, ...]
    trained: int
    steps: int
    best: int

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs)


@dataclass(eq=False)
class State:
    """Everything that a resumed training needs."""

    epoch: int = 0
    steps: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def train_(
    model: nn.Module,
    data: Labelled,
    how: Training | None = None,
    *,
    objective: Objective | None = None,
    validation: Labelled | None = None,
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
        validation: measured after every epoch; the network ends with the weights of the best one.
        masks: entries of weights that may be other than zero, by name; see `intrafusion.train.masks`.
        penalty: added to the loss, such as `factorize.Smooth(...)`.
        augment: (images, generator) -> images, for each batch.
        within: train this module only; what comes before it is then in evaluation mode.
        folder: keep a checkpoint there after every epoch, and resume from it.
        on_epoch: called as (index, epoch) after every epoch.
    Raises:
        ValueError: no images, or patience without validation images.
        ModelError: nothing to train, labels that are missing, or masks that do not fit.
        FolderError: a checkpoint of another training.
        IntrafusionError: the loss is NaN.
    """
    how, objective = how or Training(), objective or Labels()
    if not len(data.images) or len(data.images) != len(data.labels):
        raise ValueError(f"expected one label per image, got {len(data.images)} images, {len(data.labels)} labels.")
    if how.patience is not None and validation is None:
        raise ValueError("patience: stopping early needs validation images; give some, out of the training set.")
    accelerator = accelerator_for(how)
    options = {"rank": how.rank, "alpha": how.alpha, "masks": masks, "within": within, "seed": how.seed}
    with modes_kept(model), random_state_kept(model), adapted(model, how.trainable, **options) as trained:
        run = Run(model, data, how, objective, validation, penalty, augment, within, trained, accelerator)
        if folder is not None:
            run.resume(Path(folder))
        while not run.finished():
            epoch = run.epoch()
            if folder is not None and accelerator.is_main_process:
                run.keep(Path(folder))
            if on_epoch is not None:
                on_epoch(len(run.state.epochs) - 1, epoch)
        return run.history()


class Run:
    """One training under way."""

    def __init__(
        self,
        model: nn.Module,
        data: Labelled,
        how: Training,
        objective: Objective,
        validation: Labelled | None,
        penalty: Callable[[nn.Module], Tensor] | None,
        augment: Augment | None,
        within: str,
        trained: list[nn.Parameter],
        accelerator: Any,
    ) -> None:
        self.model, self.data, self.how, self.objective = model, data, how, objective
        self.validation, self.penalty, self.augment, self.within = validation, penalty, augment, within
        self.trained, self.accelerator, self.state = trained, accelerator, State()
        self.per_epoch = max(1, len(data.images) // how.batch_size)
        self.total = min(how.epochs * self.per_epoch, how.steps or math.inf)
        if accelerator.num_processes > 1:
            model.to(accelerator.device)
        self.device = trained[0].device
        self.optimizer = OPTIMIZERS[how.optimizer](trained, how.lr, how.weight_decay)
        self.called = model
        if accelerator.num_processes > 1:
            self.called = accelerator.prepare(model)
        self.stepper = accelerator.prepare_optimizer(self.optimizer)

    def finished(self) -> bool:
        state, patience = self.state, self.how.patience
        out_of_patience = patience is not None and state.epoch - 1 - state.best >= patience
        return state.steps >= self.total or (state.epoch > 0 and out_of_patience)

    def epoch(self) -> Epoch:
        """One pass over the data; everything random in it depends on the seed and its number alone."""
        start, state = time.perf_counter(), self.state
        torch.manual_seed(self.how.seed * 1_000_003 + state.epoch)
        generator = torch.Generator().manual_seed(self.how.seed * 1_000_003 + state.epoch)
        set_mode_(self.model, self.within)
        order = torch.randperm(len(self.data.images), generator=generator)
        losses = []
        for chosen in order.split(self.how.batch_size)[: min(self.per_epoch, int(self.total - state.steps))]:
            losses.append(self.update(chosen, generator))
        state.epoch += 1
        validation = None
        if self.validation is not None:
            validation = accuracy(self.model, self.validation.images, self.validation.labels)
        rate = self.rate(max(0, state.steps - 1))
        epoch = Epoch(sum(losses) / len(losses), rate, time.perf_counter() - start, validation)
        state.epochs.append(epoch)
        best = state.epochs[state.best].validation
        if validation is not None and (len(state.epochs) == 1 or best is None or validation > best):
            state.best, state.best_weights = state.epoch - 1, clone(self.tensors())
        elif validation is None:
            state.best = state.epoch - 1
        return epoch

    def update(self, chosen: Tensor, generator: torch.Generator) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.state.steps)
        images, labels = self.data.images[chosen], self.data.labels[chosen]
        if self.augment is not None:
            images = self.augment(images, generator)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        images, labels = images[rank::world], labels[rank::world]
        total = 0.0
        for part, own in zip(parts(images, self.how.accumulate), parts(labels, self.how.accumulate), strict=True):
            share = len(own) / len(labels)
            part = part.to(self.device, self.dtype if part.is_floating_point() else None)
            with self.accelerator.autocast():
                loss = self.objective(self.called, part, own.to(self.device)) * share
                if self.penalty is not None:
                    loss = loss + self.penalty(self.model).to(loss) * share
            if not bool(torch.isfinite(loss)):
                raise IntrafusionError(
                    f"train: the loss is {loss.item()} after {self.state.steps} updates; lower lr (now {self.how.lr})."
                )
            self.accelerator.backward(loss)
            total += float(loss.detach())
        if self.how.clip is not None:
            self.accelerator.clip_grad_norm_(self.trained, self.how.clip)
        self.stepper.step()
        self.stepper.zero_grad()
        self.state.steps += 1
        return total

    @property
    def dtype(self) -> torch.dtype:
        return self.trained[0].dtype

    def rate(self, step: int) -> float:
        """Learning rate of an update: a linear rise, then the decay."""
        rise = round(self.how.warmup * self.total)
        if step < rise:
            return self.how.lr * (step + 1) / rise
        done = (step - rise) / max(1, self.total - rise)
        return self.how.lr * DECAYS[self.how.decay](done, step / self.per_epoch)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes: parameters, adapters and buffers."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def keep(self, folder: Path) -> None:
        """Write a checkpoint that needs no code to be read."""
        state = self.state
        content = {
            "how": asdict(self.how),
            "images": len(self.data.images),
            "tensors": clone(self.tensors()),
            "optimizer": self.optimizer.state_dict(),
            "steps": state.steps,
            "epochs": [asdict(epoch) for epoch in state.epochs],
            "best": state.best,
            "best_weights": state.best_weights,
        }
        with atomic_file(folder / CHECKPOINT) as path:
            torch.save(content, path)

    def resume(self, folder: Path) -> None:
        path = folder / CHECKPOINT
        if not path.is_file():
            return
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            made_with, count = content["how"], content["images"]
        except Exception as error:
            raise FolderError(f"{path}: damaged, or no checkpoint of a training ({error}); remove it.") from error
        if (made_with, count) != (asdict(self.how), len(self.data.images)):
            raise FolderError(
                f"{path}: is of a training with other data or options; remove it, or choose another folder."
            )
        put_(self.tensors(), content["tensors"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        epochs = [Epoch(**epoch) for epoch in content["epochs"]]
        self.state = State(len(epochs), content["steps"], epochs, content["best"], content["best_weights"])

    def history(self) -> History:
        state = self.state
        if state.best_weights:
            put_(self.tensors(), state.best_weights, Path(CHECKPOINT))
        trained = sum(p.numel() for p in self.trained)
        return History(tuple(state.epochs), trained, state.steps, state.best)


def accelerator_for(how: Training) -> Any:
    """An Accelerator for this precision; Accelerate keeps the one of an earlier training in global state."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise IntrafusionError("training needs Accelerate: pip install 'intrafusion[train]'.") from error
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=how.precision)


def parts(x: Tensor, count: int) -> Sequence[Tensor]:
    return x.tensor_split(min(count, len(x)))


def clone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def put_(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in saved.items()}:
        raise FolderError(f"{path}: is of another network; remove it, or choose another folder.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


def set_mode_(model: nn.Module, within: str) -> None:
    if within:
        model.eval()
        model.get_submodule(within).train()
    else:
        model.train()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield
