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

from intrafusion.cli.completion import complete_from, complete_model
from intrafusion.cli.compress import read_fraction
from intrafusion.cli.console import messages, progress_bar, working
from intrafusion.cli.data import data_of, read_test_images, read_training_images
from intrafusion.cli.defaults import join_defaults, tells_defaults
from intrafusion.cli.models import FILE_PREFIX, FORMS
from intrafusion.cli.network import Network, read_device, read_networks
from intrafusion.cli.options import (
    MOST_EPOCHS,
    MOST_NETWORKS,
    Arguments,
    AsJson,
    Base,
    Cores,
    Criteria,
    Data,
    Device,
    Fractions,
    InputShapes,
    OptionalBatchSize,
    OptionalOutput,
    OptionalTuneEpochs,
    OptionalTuneRate,
    Order,
    Ray,
    TestImages,
    TrainImages,
    TrustProgram,
    WeightFiles,
    count_option,
)
from intrafusion.cli.outputs import check_records
from intrafusion.cli.show import print_json, say
from intrafusion.cli.tables import print_records
from intrafusion.errors import RecipeError
from intrafusion.lab import experiments, zoo
from intrafusion.lab.bench import Cluster, Record
from intrafusion.lab.experiments import OURS, Experiment, Options, Subject
from intrafusion.network.inputs import Inputs
from intrafusion.reduce import REDUCERS

_DIGITS_NAME = "digits_resnet"

Names = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="; ".join(f"{n}: {e.title}" for n, e in experiments.EXPERIMENTS.items()),
        autocompletion=complete_from(experiments.EXPERIMENTS),
    ),
]


def _several(metavar: str, about: str, **options: Any) -> Any:
    return typer.Option(metavar=metavar, help=f"{about} (repeatable).", **options)


_OPTIONS: dict[str, str] = {
    "keep": "keep",
    "importance": "criterion",
    "method": "method",
    "group": "group",
    "order": "order",
    "seeds": "seeds",
    "points": "points",
    "steps": "steps",
    "step_epochs": "step_epochs",
    "tune_epochs": "epochs",
    "tune_lr": "lr",
    "halve_every": "halve_every",
    "batch_size": "batch",
}
"""What experiments and their records call the options."""


def _list_defaults() -> dict[str, Any]:
    """Of every option, by experiment where they differ."""
    found: dict[str, Any] = {"output": "NAME.jsonl", "model": _DIGITS_NAME, "data": "that of a zoo network"}
    for option, old in _OPTIONS.items():
        by_name = {n: getattr(e.defaults, old) for n, e in experiments.EXPERIMENTS.items() if old in e.uses}
        found[option] = join_defaults({n: "all" if value is None else value for n, value in by_name.items()})
    return {**found, "networks": join_defaults({n: e.networks for n, e in experiments.EXPERIMENTS.items()})}


@tells_defaults(_list_defaults())
def experiment(
    name: Names,
    model: Annotated[
        list[str] | None,
        _several("MODEL", f"{FORMS}; by default a small one trained on digits", autocompletion=complete_model),
    ] = None,
    output: OptionalOutput = None,
    base: Base = None,
    weights: WeightFiles = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    device: Device = "cpu",
    data: Data = None,
    test_images: TestImages = None,
    train_images: TrainImages = None,
    keep: Fractions = None,
    importance: Criteria = None,
    method: Annotated[
        list[str] | None,
        _several(
            "METHOD",
            f"REDUCER[+STEP...], such as select, fold+reestimate, intrafusion:bias=false; {OURS} is the default of "
            "compress",
            autocompletion=complete_from((OURS, *REDUCERS)),
        ),
    ] = None,
    group: Annotated[
        list[str] | None, _several("GROUP", "Name of a group, or 'whole network', or 'block-inner channels'")
    ] = None,
    order: Order = None,
    seeds: Annotated[int | None, count_option("Random draws.", most=MOST_NETWORKS)] = None,
    networks: Annotated[
        int | None, count_option("Digits networks to train, seeds 0, 1, ...", most=MOST_NETWORKS)
    ] = None,
    points: Annotated[int | None, count_option("Of each axis of a landscape.", least=2, most=1000)] = None,
    steps: Annotated[int | None, count_option("Of iterative compression.", most=1000)] = None,
    step_epochs: Annotated[
        int | None, count_option("Of training after each step but the last.", least=0, most=MOST_EPOCHS)
    ] = None,
    tune_epochs: OptionalTuneEpochs = None,
    tune_lr: OptionalTuneRate = None,
    halve_every: Annotated[int | None, count_option("Epochs between halvings of the rate.")] = None,
    batch_size: OptionalBatchSize = None,
    ray: Ray = None,
    cores: Cores = None,
    trust_program: TrustProgram = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment of Theus et al. 2024 and keep its records; what is in the records is not measured again.

    A kill at any point loses only what was being measured: the same command goes on from there.
    """
    said = locals()
    path = output or Path(f"{name}.jsonl")
    with working(f"what was measured, if anything, is in {path}; the same command goes on from there."):
        chosen = experiments.get_experiment(name)
        options = _read_options(name, chosen, {option: said[option] for option in _OPTIONS})
        check_records(path)
        found = _read_subjects(
            model or ["digits"],
            data=data,
            limits=(test_images, train_images),
            networks=networks or chosen.networks,
            weights=weights or [],
            base=base,
            arguments=arguments or (),
            inputs=inputs or (),
            device=device,
            trust_program=trust_program,
        )
        cluster = Cluster(ray, cores=cores, by_value=tuple(_modules_of_files())) if ray else None
        with progress_bar("experiment") as progress:
            records = experiments.run_experiment(
                name,
                chosen,
                found,
                options,
                path,
                cluster=cluster,
                provenance={"command": shlex.join(["intrafusion", *sys.argv[1:]])},
                progress=progress,
            )
    _show(name, records, path, as_json=as_json)


def _read_options(name: str, chosen: Experiment, given: dict[str, Any]) -> Options:
    """The experiment's defaults, changed by what was given.

    Raises:
        RecipeError: an option that this experiment does not use, or one that means nothing.
    """
    spelt = {old: f"--{option.replace('_', '-')}" for option, old in _OPTIONS.items()}
    said = {_OPTIONS[k]: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None and v != []}
    for option in said:
        if option not in chosen.uses:
            used = ", ".join(sorted(spelt[option] for option in chosen.uses))
            raise RecipeError(f"{spelt[option]} means nothing to {name}, which uses {used}; leave it out.")
    if "keep" in said:
        said["keep"] = tuple(map(read_fraction, said["keep"]))
    return replace(chosen.defaults, **said)


def _read_subjects(
    names: Sequence[str],
    *,
    data: str | None,
    limits: tuple[int | None, int | None],
    networks: int,
    weights: Sequence[Path],
    **options: Any,
) -> list[Subject]:
    """The networks with their images; digits networks are trained on the spot."""
    trained = [name in ("digits", f"zoo:{_DIGITS_NAME}") and not weights for name in names]
    others = [name for name, here in zip(names, trained, strict=True) if not here]
    for name in others:
        data_of(name, data)  # what is not known is told before anything is built
    read = read_networks(others, weights=weights, **options) if others else []
    several = len(weights) > len(others)
    found = [
        _read_subject(network, f" ({weights[index].name})" if several else "", data, limits)
        for index, network in enumerate(read)
    ]
    return [s for name in names if name not in others for s in _digits(networks, limits, options["device"])] + found


def _digits(count: int, limits: tuple[int | None, int | None], device: str) -> Iterator[Subject]:
    torch.set_num_threads(1)  # for 8 x 8 images, more threads only wait for one another
    messages.print(f"training {count} small network(s) on digits ...")
    test = read_test_images("digits", _DIGITS_NAME, limits[0])
    train = read_training_images("digits", _DIGITS_NAME, limits[1])
    place = read_device(device)
    for seed in range(count):
        name = _DIGITS_NAME if seed == 0 else f"{_DIGITS_NAME} (seed {seed})"
        inputs = Inputs.of(zoo.example_input(_DIGITS_NAME)).map(lambda t: t.to(place))
        yield Subject(name, zoo.train_digits(seed=seed).to(place), inputs, test, train)


def _read_subject(network: Network, which: str, data: str | None, limits: tuple[int | None, int | None]) -> Subject:
    """Raises ModelError if no data are known for it."""
    wanted = data_of(network.name, data)
    images = (
        read_test_images(wanted, network.name, limits[0]),
        read_training_images(wanted, network.name, limits[1]),
    )
    return Subject(network.name.removeprefix("zoo:") + which, network.model.eval(), network.inputs, *images)


def _modules_of_files() -> Iterator[ModuleType]:
    """Modules that were run from a path.py:factory, which workers cannot import."""
    yield from (module for name, module in sys.modules.items() if name.startswith(FILE_PREFIX))


def _show(name: str, records: Sequence[Record], path: Path, *, as_json: bool) -> None:
    if as_json:
        measured = [{"setting": dict(r.setting), "result": dict(r.result)} for r in records]
        print_json("experiment", {"experiment": name, "output": str(path), "records": measured})
        return
    print_records(records)
    say(f"\n{len(records)} records in {path}; as a page: intrafusion report {shlex.quote(str(path))} -o report.html")
