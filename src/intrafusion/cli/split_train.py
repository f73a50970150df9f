"""intrafusion split-train: members trained on parts of the data, fused, fine-tuned, compressed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from intrafusion.asked import check_keep
from intrafusion.cli.compress import read_fraction
from intrafusion.cli.console import progress_bar, working
from intrafusion.cli.data import data_of, read_test_images, require_training_images, zoo_data
from intrafusion.cli.defaults import tells_defaults
from intrafusion.cli.models import resolve
from intrafusion.cli.network import Network, is_saved, read_device, read_network
from intrafusion.cli.options import (
    MOST_EPOCHS,
    Arguments,
    AsJson,
    BatchSize,
    Cores,
    Data,
    Device,
    Fractions,
    InputShapes,
    Name,
    Output,
    Ray,
    Seed,
    TestImages,
    TrainImages,
    TuneEpochs,
    TuneRate,
    Using,
    choice_option,
    count_option,
    rate_option,
)
from intrafusion.cli.outputs import check_folder, check_records
from intrafusion.cli.show import print_json, print_table, say
from intrafusion.errors import FolderError, ModelError, RecipeError, unknown_name
from intrafusion.fusion.networks import USING
from intrafusion.lab import zoo
from intrafusion.lab.bench import Cluster, Record, append_record
from intrafusion.lab.experiments.split import PAPER, SCHEDULES, SplitResult, SplitTraining, records_of, split_train
from intrafusion.lab.report.times import run_times_plot
from intrafusion.lab.zoo import Images
from intrafusion.measure.accuracy import accuracy

_RECORDS, _FIGURE, _SMALL, _EXPERIMENT = "records.jsonl", "times.png", "network", "split_train"
_FOLDER, _KEEP = "split-train", 0.5
_MOST_FOLDS = 12  # 924 members


@tells_defaults({"keep": _KEEP, "schedule": SCHEDULES, "data": "that of a zoo network"})
def split_train_command(
    model: Name = "zoo:digits_resnet",
    output: Output = Path(_FOLDER),
    arguments: Arguments = None,
    inputs: InputShapes = None,
    device: Device = "cpu",
    data: Data = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    schedule: Annotated[
        list[str] | None, choice_option(SCHEDULES, "Order of the steps (repeatable; all if none)")
    ] = None,
    folds: Annotated[
        int, count_option("Parts of the data, even: 2 makes 2 members, 4 make 6.", least=2, most=_MOST_FOLDS)
    ] = 2,
    keep: Fractions = None,
    epochs: Annotated[int, count_option("Of training each network.", most=MOST_EPOCHS)] = 10,
    lr: Annotated[float, rate_option(about="Of training; SGD with momentum, halved every 30 epochs.")] = 0.05,
    tune_epochs: TuneEpochs = 5,
    tune_lr: TuneRate = PAPER.lr,
    batch_size: BatchSize = 64,
    using: Using = USING[1],
    ray: Ray = None,
    cores: Cores = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train networks on parts of the data, fuse them into one and compress it; compare the run times.

    Run again with the same folder and options it goes on where it was stopped; at most one epoch is lost. Epochs are
    chosen on validation images; test images are looked at once, at the end.
    """
    with working(f"checkpoints and records are in {output}; the same command goes on from there."):
        schedules = _check_schedules(schedule or SCHEDULES)
        train = replace(PAPER, epochs=epochs, lr=lr, batch_size=batch_size)
        tune = replace(PAPER, epochs=tune_epochs, lr=tune_lr, batch_size=batch_size)
        only = _read_one_fraction(keep)
        hows = [SplitTraining(name, folds, only, train, tune, using=using, seed=seed) for name in schedules]
        check_folder(output)
        check_records(output / _RECORDS)
        torch.set_num_threads(1)
        factory = _Factory(_name(model), tuple(arguments or ()), device)
        if is_saved(factory.name):
            raise ModelError(
                f"{factory.name}: split-train trains anew; name the code of a network, not a saved folder."
            )
        example = read_network(
            factory.name, arguments=factory.arguments, inputs=inputs or (), device=device, trained=False
        )
        chosen = _read_data(data_of(factory.name, data), factory.name, train_images, test_images)
        cluster = Cluster(ray, cores=cores) if ray else None
        rows: list[dict[str, Any]] = []
        with progress_bar("split-train") as progress:
            for how in hows:
                folder = output.resolve() / _folder_label(how)
                found = split_train(
                    factory, example.inputs, chosen[0], chosen[1], how,
                    folder=folder / "checkpoints", cluster=cluster, progress=progress,
                )  # fmt: skip
                found.compressed.save(folder / _SMALL)
                rows.append(_note_result(found, how, factory.name, chosen[2], output / _RECORDS))
        run_times_plot(output / _FIGURE, {row["name"]: _times(row) for row in rows})
    _show(rows, output, example, as_json=as_json)


@dataclass(frozen=True)
class _Factory:
    """seed -> a new network with random weights; pickles, so it can travel to workers."""

    name: str
    arguments: tuple[str, ...]
    device: str

    def __call__(self, seed: int) -> nn.Module:
        arguments = self.arguments
        if self.name.startswith("zoo:"):
            arguments = (*arguments, f"seed={seed}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return resolve(self.name, arguments, trained=False).build().to(read_device(self.device))


def _name(model: str) -> str:
    return f"zoo:{model}" if model in zoo.names() else model


def _check_schedules(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in SCHEDULES:
            raise RecipeError(unknown_name("schedule", name, SCHEDULES))
    return names


def _read_one_fraction(keep: Sequence[str] | None) -> float:
    """
    Raises:
        BudgetError, RecipeError: more than one, or no fraction.
    """
    if keep is not None and len(keep) > 1:
        raise RecipeError(f"--keep: expected one fraction for all groups, got {', '.join(keep)}.")
    fraction = read_fraction(keep[0]) if keep else _KEEP
    check_keep(fraction)
    return fraction


def _folder_label(how: SplitTraining) -> str:
    """Of a folder: another training gets another one."""
    folds = "" if how.schedule == "whole" else f"-{how.folds}"
    return f"{how.schedule}{folds}-keep{how.keep:g}-{how.train.epochs}+{how.tune.epochs}-seed{how.seed}"


def _read_data(data: str, model: str, train: int | None, test: int | None) -> tuple[Images, Images, Images]:
    """Images to train on, to choose on, and to report on. Where there is no validation split it is the last tenth.

    Raises:
        FolderError: no data to train on, or too few.
    """
    found = require_training_images(data, model, train)
    if data == "digits":
        return found, zoo.load_data(zoo_data(data, model), "validation"), read_test_images(data, model, test)
    held = max(1, len(found) // 10)
    if len(found) <= held:
        raise FolderError(f"--data {data}: expected two training images or more, got {len(found)}.")
    parts = (slice(None, -held), slice(-held, None))
    learn, choose = (Images(found.images[part], found.labels[part]) for part in parts)
    return learn, choose, read_test_images(data, model, test)


def _note_result(found: SplitResult, how: SplitTraining, network: str, test: Images, path: Path) -> dict[str, Any]:
    """Measure the result on the test images, once, and append the record."""
    setting, result = records_of(found, how)
    right: Callable[[Any], float] = lambda model: accuracy(model, test.images, test.labels)  # noqa: E731
    tested = {"accuracy": right(found.compressed.model)}
    if found.whole is not None:
        tested["accuracy_before_compression"] = right(found.whole)
    append_record(path, Record(_EXPERIMENT, {"network": network.removeprefix("zoo:"), **setting}, {**result, **tested}))
    return {
        "name": _folder_label(how).partition("-keep")[0],
        "folder": _folder_label(how),
        **setting,
        **result,
        **tested,
    }


def _times(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    return [(p["name"], p["longest_s"], p["work_s"]) for p in row["phases"]]


def _show(rows: Sequence[dict[str, Any]], output: Path, network: Network, *, as_json: bool) -> None:
    saved = [Path(os.path.join(output, row["folder"], _SMALL)) for row in rows]
    if as_json:
        runs = [{**row, "load": network.loading(folder)} for row, folder in zip(rows, saved, strict=True)]
        print_json("split-train", {"model": network.name, "output": str(output), "runs": runs})
        return
    lines = []
    for row in rows:
        before = row.get("accuracy_before_compression")
        seconds = f"{row['longest_s']:.1f}", f"{row['work_s']:.1f}"
        lines.append((row["name"], "" if before is None else f"{before:.1%}", f"{row['accuracy']:.1%}", *seconds))
    print_table(
        ("schedule", "test accuracy before", "compressed", "s, a machine each", "s of work"), lines, numbers=True
    )
    say(f"\nwritten to {output}: {_RECORDS}, {_FIGURE}, checkpoints and networks; the first one back in one line:")
    say(network.loading(saved[0]))
