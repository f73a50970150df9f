"""intrafusion split-train: members trained on parts of the data, fused, fine-tuned, compressed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from intrafusion.cli.console import progress_bar, working
from intrafusion.cli.models import resolve
from intrafusion.cli.network import loading_line
from intrafusion.cli.options import AsJson
from intrafusion.cli.show import print_json, print_table, say
from intrafusion.errors import FolderError
from intrafusion.lab import zoo
from intrafusion.lab.bench import Cluster, Record, append_record
from intrafusion.lab.experiments.split import PAPER, SCHEDULES, SplitResult, SplitTraining, records_of, split_train
from intrafusion.lab.report.times import run_times_plot
from intrafusion.lab.zoo import Images
from intrafusion.measure.accuracy import accuracy

_RECORDS, _FIGURE, _SMALL, _EXPERIMENT = "records.jsonl", "times.png", "network", "split_train"


def split_train_command(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help="A network of the zoo.")] = "digits_resnet",
    schedule: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Order of the steps: {', '.join(SCHEDULES)} (repeatable; all if none)."),
    ] = None,
    folds: Annotated[int, typer.Option(help="Parts of the data, even: 2 makes 2 members, 4 make 6.")] = 2,
    keep: Annotated[float, typer.Option(help="Fraction of the channels of every group to keep.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Of training each member.")] = 10,
    tune_epochs: Annotated[int, typer.Option(help="Of each fine-tuning.")] = 5,
    lr: Annotated[float, typer.Option(help="Of training; SGD with momentum, halved every 30 epochs.")] = 0.05,
    tune_lr: Annotated[float, typer.Option(help="Of fine-tuning.")] = PAPER.lr,
    batch_size: Annotated[int, typer.Option(help="Images per update.")] = 64,
    using: Annotated[str, typer.Option(help="What channels are compared by in fusing.")] = "activations",
    limit: Annotated[int | None, typer.Option(help="Take this many training images only.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="local|ADDRESS", help="Train members in parallel on Ray, one task each.")
    ] = None,
    cores: Annotated[int | None, typer.Option(help="Of this machine for Ray; all if not said.")] = None,
    seed: Annotated[int, typer.Option(help="Of parts, networks and orders.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, records, figure and networks.")
    ] = Path("split-train"),
    as_json: AsJson = False,
) -> None:
    """Train networks on parts of the data, fuse them into one and compress it; compare the run times.

    Run again with the same folder and options it goes on where it was stopped; at most one epoch is lost. Epochs are
    chosen on validation images; test images are looked at once, at the end.
    """
    with working():
        if output.is_file():
            raise FolderError(f"{output}: expected a folder, but this is a file; choose another name with -o.")
        torch.set_num_threads(1)
        data, validation, test = _read_data(network, limit)
        train = replace(PAPER, epochs=epochs, lr=lr, batch_size=batch_size)
        tune = replace(PAPER, epochs=tune_epochs, lr=tune_lr, batch_size=batch_size)
        cluster = Cluster(ray, cores=cores) if ray else None
        rows: list[dict[str, Any]] = []
        with progress_bar("split-train") as progress:
            for name in schedule or SCHEDULES:
                how = SplitTraining(name, folds, keep, train, tune, using=using, seed=seed)
                folder = output.resolve() / _folder_label(how)
                found = split_train(
                    partial(_build_network, network), zoo.example_input(network), data, validation, how,
                    folder=folder / "checkpoints", cluster=cluster, progress=progress,
                )  # fmt: skip
                found.compressed.save(folder / _SMALL)
                rows.append(_note_result(found, how, network, test, output / _RECORDS))
        run_times_plot(output / _FIGURE, {row["name"]: _times(row) for row in rows})
    _show(rows, output, network, as_json=as_json)


def _build_network(network: str, seed: int) -> torch.nn.Module:
    return zoo.build(network, seed=seed)


def _folder_label(how: SplitTraining) -> str:
    """Of a folder: another training gets another one."""
    folds = "" if how.schedule == "whole" else f"-{how.folds}"
    return f"{how.schedule}{folds}-keep{how.keep:g}-{how.train.epochs}+{how.tune.epochs}-seed{how.seed}"


def _read_data(network: str, limit: int | None) -> tuple[Images, Images, Images]:
    """Images to train on, to choose on, and to report on. Where there is no validation split it is the last tenth.

    Raises:
        ValueError: no data set to train on.
    """
    if zoo.entry(network).data == "digits":
        train, validation = (zoo.load_data(network, split) for split in ("train", "validation"))
        train = Images(train.images[:limit], train.labels[:limit])
    else:
        found = zoo.load_data(network, "train", limit=limit)
        held = max(1, len(found) // 10)
        train = Images(found.images[:-held], found.labels[:-held])
        validation = Images(found.images[-held:], found.labels[-held:])
    return train, validation, zoo.load_data(network, "test")


def _note_result(found: SplitResult, how: SplitTraining, network: str, test: Images, path: Path) -> dict[str, Any]:
    """Measure the result on the test images, once, and append the record."""
    setting, result = records_of(found, how)
    right: Callable[[Any], float] = lambda model: accuracy(model, test.images, test.labels)  # noqa: E731
    tested = {"accuracy": right(found.compressed.model)}
    if found.whole is not None:
        tested["accuracy_before_compression"] = right(found.whole)
    append_record(path, Record(_EXPERIMENT, {"network": network, **setting}, {**result, **tested}))
    return {
        "name": _folder_label(how).partition("-keep")[0],
        "folder": _folder_label(how),
        **setting,
        **result,
        **tested,
    }


def _times(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    return [(p["name"], p["longest_s"], p["work_s"]) for p in row["phases"]]


def _show(rows: Sequence[dict[str, Any]], output: Path, network: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), "runs": list(rows)})
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
    imports, original = resolve(f"zoo:{network}", ["pretrained=false"], trained=False).python()
    say(loading_line(Path(os.path.join(output, rows[0]["folder"], _SMALL)), imports, original))
