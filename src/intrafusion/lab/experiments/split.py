"""Training split over data: members trained apart on parts of it, fused into one network, and compressed."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.application import apply
from intrafusion.brief import show_briefly
from intrafusion.compressed import Compressed
from intrafusion.errors import ArgumentError, IntrafusionError, unknown_name
from intrafusion.fusion import fuse
from intrafusion.inspection import inspect
from intrafusion.lab.bench.cluster import Cluster
from intrafusion.lab.zoo import Images
from intrafusion.measure.accuracy import accuracy
from intrafusion.network.inputs import ExampleInputs
from intrafusion.planning import decide
from intrafusion.progress import ShowProgress, report, shows_progress
from intrafusion.recipe import Recipe
from intrafusion.train import History, Labelled, Training, train_

SCHEDULES = ("fap", "paf", "whole")
PAPER = Training(epochs=10, optimizer="sgd", lr=0.01, warmup=0.0, decay="halving")  # batch 128, lr 0.01 * 0.5^(e // 30)


@dataclass(frozen=True)
class SplitTraining:
    """In which order networks are trained on parts of the data, fused, fine-tuned and compressed.

    "fap" (fuse and prune): train members, fuse, fine-tune, compress, fine-tune. "paf" (prune and fuse): train members,
    compress each, fine-tune each, fuse, fine-tune. "whole": one network on all data, compress, fine-tune for as many
    epochs as "fap" fine-tunes in all; what the other two are compared with.

    Attributes:
        schedule: "fap", "paf" or "whole".
        folds: parts k of the data, even; every union of k / 2 parts trains one member (2 gives 2 members, 4 give 6).
        keep: fraction of the channels of every group that the result keeps.
        train: how members, or the whole-data network, are trained.
        tune: how each fine-tuning is done.
        reducer: how channels become fewer, and
        importance: which matter; as for `compress`.
        using: what channels are compared by in fusing.
        images: how many training images are looked at for that.
        seed: of the parts and, plus its index, of each member.

    Reference: Theus et al. 2024, section 6 and Figs 22-28.
    """

    schedule: str = "fap"
    folds: int = 2
    keep: float = 0.5
    train: Training = PAPER
    tune: Training = PAPER
    reducer: str = "intrafusion"
    importance: str = "l1"
    using: str = "activations"
    images: int = 200
    seed: int = 0

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ArgumentError(unknown_name("schedule", self.schedule, SCHEDULES))
        if self.folds < 2 or self.folds % 2:
            raise ArgumentError(f"folds: expected an even number of at least 2, got {self.folds!r}.")


@dataclass(frozen=True)
class Phase:
    """One step of a schedule.

    Attributes:
        wall_s: seconds until it was done, as this run saw them.
        work_s: seconds of all its members together, also those spent before an interruption.
        longest_s: seconds of its slowest member: what it takes with a machine for each.
        members: how many were worked on.
        validation: best validation accuracy of a member after it, in [0, 1]; None where it was not measured.
    """

    name: str
    wall_s: float
    work_s: float
    longest_s: float
    members: int
    validation: float | None

    __repr__ = show_briefly


@dataclass(frozen=True, eq=False)
class SplitResult:
    """What a schedule gave.

    Attributes:
        compressed: the small network with the plan that made it from a network of the original shape.
        phases: in order.
        whole: the network before it was compressed ("fap", "whole"); None for "paf".
    """

    compressed: Compressed
    phases: tuple[Phase, ...]
    whole: nn.Module | None = None

    __repr__ = show_briefly

    @property
    def work_s(self) -> float:
        return sum(phase.work_s for phase in self.phases)

    @property
    def longest_s(self) -> float:
        return sum(phase.longest_s for phase in self.phases)


def subsets(count: int, folds: int, seed: int = 0) -> list[Tensor]:
    """Indices of the data of every member: all unions of half of `folds` equal random parts of `count` images.

    >>> [len(s) for s in subsets(8, 4)]
    [4, 4, 4, 4, 4, 4]

    Raises:
        ArgumentError: fewer images than parts.
    """
    if count < folds:
        raise ArgumentError(f"expected at least one image for each of {folds} parts, got {count}.")
    parts = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tensor_split(folds)
    return [torch.cat(union).sort().values for union in itertools.combinations(parts, folds // 2)]


@shows_progress("split training")
def split_train(
    factory: Callable[[int], nn.Module],
    example_inputs: ExampleInputs,
    data: Labelled,
    validation: Labelled,
    how: SplitTraining | None = None,
    *,
    folder: Path | None = None,
    cluster: Cluster | None = None,
    progress: ShowProgress = None,
) -> SplitResult:
    """Run a schedule.

    Called again with the same folder it goes on where it was stopped: every training keeps a checkpoint after each
    epoch. On Ray a member whose worker dies is tried again from its checkpoint.

    Args:
        factory: seed -> a new network; all of one shape.
        data: what is trained on.
        validation: out of the training set; every choice (epoch, anchor) looks at it alone.
        folder: for the checkpoints; None keeps none.
        cluster: where members are trained, one task each; None for one after another in this process. On a machine
            with GPUs member i uses GPU i modulo their number.
    Raises:
        IntrafusionError: a member failed; gives its error.
    """
    how = how or SplitTraining()
    run = _Runner(factory, example_inputs, data, validation, how, folder, cluster)
    return {"fap": run.fap, "paf": run.paf, "whole": run.whole}[how.schedule]()


@dataclass(eq=False)
class _Runner:
    """The steps that schedules are made of; notes the time of each."""

    factory: Callable[[int], nn.Module]
    example: ExampleInputs
    data: Labelled
    validation: Labelled
    how: SplitTraining
    folder: Path | None
    cluster: Cluster | None
    phases: list[Phase] = field(default_factory=list)

    def fap(self) -> SplitResult:
        report("train members", 0, 5)
        fused = self.fused(self.trained("train members", self.members(), self.how.train, self.parts()))
        report("fine-tune", 2, 5)
        [whole] = self.trained("fine-tune", [fused], self.how.tune)
        small = self.compressed("compress", [whole])[0]
        report("fine-tune compressed", 4, 5)
        [tuned] = self.trained("fine-tune compressed", [small.model], self.how.tune)
        return self.result(small, tuned, whole)

    def paf(self) -> SplitResult:
        report("train members", 0, 5)
        members = self.trained("train members", self.members(), self.how.train, self.parts())
        small = self.compressed("compress members", members)
        report("fine-tune members", 2, 5)
        tuned = self.trained("fine-tune members", [s.model for s in small], self.how.tune, self.parts())
        fused = self.fused(tuned)
        report("fine-tune", 4, 5)
        [final] = self.trained("fine-tune", [fused], self.how.tune)
        return self.result(small[0], final, None)

    def whole(self) -> SplitResult:
        report("train", 0, 3)
        [whole] = self.trained("train", [self.factory(self.how.seed)], self.how.train)
        small = self.compressed("compress", [whole])[0]
        report("fine-tune compressed", 2, 3)
        longer = replace(self.how.tune, epochs=2 * self.how.tune.epochs)
        [tuned] = self.trained("fine-tune compressed", [small.model], longer)
        return self.result(small, tuned, whole)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def parts(self) -> list[Tensor]:
        return subsets(len(self.data.images), self.how.folds, self.how.seed)

    def members(self) -> list[nn.Module]:
        return [self.factory(self.how.seed + index) for index in range(math.comb(self.how.folds, self.how.folds // 2))]

    def trained(
        self, name: str, models: list[nn.Module], how: Training, parts: Sequence[Tensor] | None = None
    ) -> list[nn.Module]:
        """Train each network on its part of the data, or on all of it; where there are several, on the cluster."""
        start = time.perf_counter()
        folder = None if self.folder is None else self.folder / name.replace(" ", "-")
        data = Images(self.data.images, self.data.labels), Images(self.validation.images, self.validation.labels)
        task = MemberTask(models, data[0], data[1], how, parts, folder, self.how.seed)
        cluster = self.cluster if len(models) > 1 else None
        found: dict[int, tuple[dict[str, Tensor], History]] = {}
        if cluster is None:
            found = {index: task(index) for index in range(len(models))}
        else:
            for index, outcome, _ in cluster.outcomes(task, range(len(models))):
                if isinstance(outcome, Exception):
                    raise IntrafusionError(f"{name}: member {index} failed: {outcome}") from outcome
                found[index] = outcome
        results = []
        for index, model in enumerate(models):
            model = copy.deepcopy(model)
            model.load_state_dict(found[index][0])
            results.append(model)
        seconds = [found[index][1].seconds for index in range(len(models))]
        best = max(e.validation or 0.0 for _, history in found.values() for e in history.epochs)
        self.note(name, start, sum(seconds), max(seconds), len(models), best)
        return results

    def fused(self, models: list[nn.Module]) -> nn.Module:
        """All members onto the one that is best on the validation images."""
        start = time.perf_counter()
        scores = [self.score(model) for model in models]
        anchor = max(range(len(models)), key=lambda index: scores[index])
        images = self.data.images[: self.how.images] if self.how.using == "activations" else None
        found = fuse(models, self.example, using=self.how.using, images=images, anchor=anchor).model
        self.note("fuse", start, None, None, len(models), self.score(found))
        return found

    def compressed(self, name: str, models: list[nn.Module]) -> list[Compressed]:
        start = time.perf_counter()
        recipe = Recipe.of(
            keep=self.how.keep, reducer=self.how.reducer, importance=self.how.importance, seed=self.how.seed
        )
        found = []
        for model in models:
            graph = inspect(model, self.example)
            found.append(apply(model, decide(model, graph, recipe), self.example, graph=graph))
        self.note(name, start, None, None, len(models), max(self.score(c.model) for c in found))
        return found

    def result(self, small: Compressed, model: nn.Module, whole: nn.Module | None) -> SplitResult:
        return SplitResult(replace(small, model=model), tuple(self.phases), whole)

    def score(self, model: nn.Module) -> float:
        return accuracy(model, self.validation.images, self.validation.labels)

    def note(
        self, name: str, start: float, work: float | None, longest: float | None, members: int, score: float | None
    ) -> None:
        wall = time.perf_counter() - start
        work = wall if work is None else work
        self.phases.append(Phase(name, wall, work, work if longest is None else longest, members, score))
        report(name, len(self.phases), 3 if self.how.schedule == "whole" else 5)


@dataclass(frozen=True, eq=False)
class MemberTask:
    """Trains one of several networks on its part of the data: a task that travels to a worker."""

    models: Sequence[nn.Module]
    data: Images
    validation: Images
    how: Training
    parts: Sequence[Tensor] | None
    folder: Path | None
    seed: int

    __repr__ = show_briefly

    def __call__(self, index: int) -> tuple[dict[str, Tensor], History]:
        model, data = copy.deepcopy(self.models[index]), self.data
        if self.parts is not None:
            data = Images(data.images[self.parts[index]], data.labels[self.parts[index]])
        if torch.cuda.is_available():
            model = model.to(f"cuda:{index % torch.cuda.device_count()}")
        how = replace(self.how, seed=self.seed + index)
        folder = None if self.folder is None else self.folder / f"member-{index}"
        history = train_(model, data, how, validation=self.validation, folder=folder)
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}, history


def records_of(result: SplitResult, how: SplitTraining) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(setting, result) of a run, of values that JSON has; test accuracies are for the caller to add."""
    setting = {"schedule": how.schedule, "folds": how.folds, "keep": how.keep, "seed": how.seed, "using": how.using}
    setting |= {"train_epochs": how.train.epochs, "tune_epochs": how.tune.epochs, "reducer": how.reducer}
    phases = [{f: getattr(p, f) for f in Phase.__dataclass_fields__} for p in result.phases]
    sizes = {"params": result.compressed.after.params, "params_before": result.compressed.before.params}
    return setting, {"phases": phases, "work_s": result.work_s, "longest_s": result.longest_s, **sizes}
