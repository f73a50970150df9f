"""intrafusion experiment: any experiment of the paper, on the digits or on a network of one's own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file

from intrafusion.cli.console import messages, progress_bar, working
from intrafusion.cli.models import FORMS
from intrafusion.cli.network import read_network
from intrafusion.cli.options import Arguments, AsJson, InputShapes, WeightFiles
from intrafusion.cli.show import print_json, say
from intrafusion.cli.tables import print_records
from intrafusion.errors import FolderError, ModelError
from intrafusion.lab import experiments, zoo
from intrafusion.lab.bench import Cluster, Record
from intrafusion.lab.experiments import Experiment, Options, Subject
from intrafusion.lab.zoo import Images
from intrafusion.lab.zoo.data import DATA_SETS
from intrafusion.network.inputs import Inputs

_DIGITS_NAME = "digits_resnet"
_TRAIN_SPLITS = {"cifar10": "train", "cifar100": "calibration", "mnist": "train", "digits": "train"}
_TEST_SPLITS = {"imagenet": "sample"}  # "test" for the others

Names = Annotated[
    str, typer.Argument(metavar="NAME", help="; ".join(f"{n}: {e.title}" for n, e in experiments.EXPERIMENTS.items()))
]


def _several(metavar: str, about: str) -> Any:
    return typer.Option(metavar=metavar, help=f"{about} (repeatable).")


def experiment(
    name: Names,
    network: Annotated[
        list[str] | None, _several("MODEL", f"{FORMS}; by default a small one trained on digits on the spot")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Records; NAME.jsonl by default.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help=f"{', '.join(DATA_SETS)}, or a .safetensors file of test_images, test_labels and perhaps "
            "train_images, train_labels; known for zoo networks.",
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Test images to measure on; all by default.")] = None,
    training_images: Annotated[int | None, typer.Option(min=1, help="Training images; all by default.")] = None,
    weights: WeightFiles = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    keep: Annotated[list[float] | None, _several("FRACTION", "Fraction of the channels to keep")] = None,
    criterion: Annotated[list[str] | None, _several("NAME", "Importance criterion")] = None,
    method: Annotated[
        list[str] | None,
        _several(
            "METHOD",
            "REDUCER[:option=value,...][+STEP...], such as select, intrafusion:normalization=function+closed_form",
        ),
    ] = None,
    group: Annotated[
        list[str] | None, _several("GROUP", "Name of a group, or 'whole network', or 'block-inner channels'")
    ] = None,
    order: Annotated[str | None, typer.Option(help="Of the groups: joint or backward.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Random draws.")] = None,
    networks: Annotated[int | None, typer.Option(min=1, help="Digits networks to train, seeds 0, 1, ...")] = None,
    points: Annotated[int | None, typer.Option(min=2, help="Of each axis of a landscape.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of iterative compression.")] = None,
    step_epochs: Annotated[int | None, typer.Option(min=0, help="Of training after each step but the last.")] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="Of training at the end.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    halve_every: Annotated[int | None, typer.Option(min=1, help="Epochs between halvings of the rate.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Images of one training step.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on Ray: local, or the address of a running cluster.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment of Theus et al. 2024 and keep its records; what is in the records is not measured again.

    A kill at any point loses only what was being measured: the same command goes on from there.
    """
    given = {
        "keep": keep,
        "criterion": criterion,
        "method": method,
        "group": group,
        "order": order,
        "seeds": seeds,
        "points": points,
        "steps": steps,
        "step_epochs": step_epochs,
        "epochs": epochs,
        "lr": lr,
        "halve_every": halve_every,
        "batch": batch,
    }
    with working():
        chosen = experiments.get_experiment(name)
        options = _read_options(name, chosen, given)
        path = output or Path(f"{name}.jsonl")
        if path.is_dir():
            raise FolderError(f"{path}: expected a file for the records, but this is a folder; choose another with -o.")
        subjects = _read_subjects(
            network or ["digits"],
            data=data,
            images=images,
            training_images=training_images,
            weights=weights,
            arguments=arguments or (),
            inputs=inputs or (),
            networks=networks or chosen.networks,
        )
        cluster = Cluster(ray, by_value=tuple(_modules_of_files())) if ray else None
        with progress_bar(name) as progress:
            records = experiments.run_experiment(
                name,
                chosen,
                subjects,
                options,
                path,
                cluster=cluster,
                provenance={"command": shlex.join(["intrafusion", *sys.argv[1:]])},
                progress=lambda _, done, total: progress(f"{done}/{total}", done, total),
            )
    _show(records, path, as_json)


def _read_options(name: str, chosen: Experiment, given: dict[str, Any]) -> Options:
    """The experiment's defaults, changed by what was given.

    Raises:
        ValueError: an option that this experiment does not use.
    """
    stated = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if v is not None and v != []}
    for key in stated:
        if key not in chosen.uses:
            used = ", ".join(f"--{k.replace('_', '-')}" for k in sorted(chosen.uses))
            raise ValueError(f"--{key.replace('_', '-')} means nothing to {name}, which uses {used}; leave it out.")
    return replace(chosen.defaults, **stated)


def _read_subjects(names: Sequence[str], *, networks: int, **options: Any) -> list[Subject]:
    """The networks with their images; digits networks are trained on the spot."""
    subjects: list[Subject] = []
    for name in names:
        if name in ("digits", f"zoo:{_DIGITS_NAME}") and options["weights"] is None:
            torch.set_num_threads(1)  # for 8 x 8 images, more threads only wait for one another
            messages.print(f"training {networks} small network(s) on digits ...")
            subjects += [_digits(seed, options) for seed in range(networks)]
        else:
            subjects.append(_read_subject(name, **options))
    return subjects


def _digits(seed: int, options: dict[str, Any]) -> Subject:
    test, train = read_data_images("digits", _DIGITS_NAME, options["images"], options["training_images"])
    name = _DIGITS_NAME if seed == 0 else f"{_DIGITS_NAME} (seed {seed})"
    return Subject(name, zoo.train_digits(seed=seed), Inputs.of(zoo.example_input(_DIGITS_NAME)), test, train)


def _read_subject(
    name: str,
    *,
    data: str | None,
    images: int | None,
    training_images: int | None,
    weights: Path | None,
    arguments: Sequence[str],
    inputs: Sequence[str],
) -> Subject:
    """Raises ModelError if it cannot be built, or no data are known for it."""
    kind, _, target = name.partition(":")
    entry = zoo.entry(target) if kind == "zoo" and target in zoo.names() else None
    if data is None and entry is None:
        raise ModelError(
            f"{name}: no data are known for it; name some with --data ({', '.join(DATA_SETS)}, or a file)."
        )
    network = read_network(name, weights=weights, arguments=arguments, inputs=inputs)
    test, train = read_data_images(
        data or (entry.data if entry else ""), target if entry else None, images, training_images
    )
    return Subject(target if entry else name, network.model.eval(), network.inputs, test, train)


def read_data_images(
    data: str, network: str | None, images: int | None, training_images: int | None
) -> tuple[Images, Images | None]:
    """Test and training images, normalised for a network of the zoo if it is one for these data."""
    if data not in DATA_SETS:
        return _read_file(Path(data), images, training_images)
    normalised = network if network and zoo.entry(network).data == data else data
    test = zoo.load_data(normalised, _TEST_SPLITS.get(data, "test"), limit=images)
    split = _TRAIN_SPLITS.get(data)
    return test, zoo.load_data(normalised, split, limit=training_images) if split else None


def _read_file(path: Path, images: int | None, training_images: int | None) -> tuple[Images, Images | None]:
    """Raises FolderError if the file is missing, damaged or lacks the test images."""
    if not path.is_file():
        raise FolderError(f"--data {path}: expected {', '.join(DATA_SETS)}, or a .safetensors file; there is none.")
    try:
        found = load_file(path)
        test = Images(found["test_images"][:images], found["test_labels"][:images].long())
    except (SafetensorError, KeyError, RuntimeError, ValueError, TypeError, IndexError, OSError) as error:
        wanted = "a .safetensors file with test_images (n, ...) and test_labels (n,)"
        raise FolderError(f"--data {path}: expected {wanted}, got {type(error).__name__}: {error}.") from error
    if "train_images" not in found:
        return test, None
    return test, Images(found["train_images"][:training_images], found["train_labels"][:training_images].long())


def _modules_of_files() -> Iterator[ModuleType]:
    """Modules that were run from a path.py:factory, which workers cannot import."""
    yield from (module for name, module in sys.modules.items() if name.startswith("_intrafusion_model_"))


def _show(records: Sequence[Record], path: Path, as_json: bool) -> None:
    if as_json:
        print_json([{"setting": dict(r.setting), "result": dict(r.result)} for r in records])
        return
    print_records(records)
    say(f"\n{len(records)} records in {path}; as a page: intrafusion report {shlex.quote(str(path))} -o report.html")
