"""Options that several commands take: a name means the same wherever it stands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from intrafusion.cli.completion import complete_device, complete_from, complete_model
from intrafusion.cli.inputs import IMAGE_FILES
from intrafusion.cli.models import FORMS
from intrafusion.errors import RecipeError
from intrafusion.fusion.networks import USING
from intrafusion.importance import IMPORTANCES
from intrafusion.lab.zoo.data import DATA_SETS
from intrafusion.network.free_memory import read_memory
from intrafusion.recipe import ORDERS, Recipe
from intrafusion.reduce import REDUCERS
from intrafusion.restore import LEVELS, RESTORERS, Distill
from intrafusion.smallest import FRACTIONS

_MOST, MOST_EPOCHS, MOST_NETWORKS = 10**9, 10**6, 1000
"""Largest counts: what is above is a slip of the pen, or never ends."""

_STEPS = dict.fromkeys(("auto", *LEVELS, "none", *RESTORERS))


def choice_option(names: Iterable[str], about: str) -> Any:
    """An option whose value is one of these names."""
    names = tuple(names)
    return typer.Option(metavar="NAME", help=f"{about}: {', '.join(names)}.", autocompletion=complete_from(names))


def count_option(about: str, *, least: int = 1, most: int = _MOST, **options: Any) -> Any:
    """An option that is a whole number."""
    return typer.Option(min=least, max=most, metavar="N", help=about, **options)


def _check_rate(rate: float | None) -> float | None:
    if rate is not None and not 0 < rate < math.inf:
        raise typer.BadParameter(f"expected a number above 0, such as 0.01, got {rate!r}.")
    return rate


def rate_option(*names: str, about: str) -> Any:
    """An option that is a learning rate."""
    return typer.Option(*names, metavar="RATE", help=about, callback=_check_rate)


# ---- the network ----------------------------------------------------------------------------------------------------

Name = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"{FORMS}, or a saved folder.", autocompletion=complete_model)
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The original network of a saved folder, where the folder does not name it.",
        autocompletion=complete_model,
    ),
]
TrustProgram = Annotated[
    bool,
    typer.Option(
        "--trust-program",
        help="Load the program that --program kept in a saved folder. It can run code: only from people you trust.",
    ),
]
WeightFiles = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Weights to load: .safetensors, or .pth if it holds tensors only (once per network, where a command takes "
        "several).",
    ),
]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the factory (repeatable).")
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Example input, such as 1,3,224,224 or 2,7:int64 or mask=2,7:int64 (once per input). Known for zoo, timm "
        "and transformers networks and torchvision classifiers.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="Where the network runs: cpu, cuda, cuda:1, or auto for a GPU where there is one.",
        autocompletion=complete_device,
    ),
]

# ---- data -----------------------------------------------------------------------------------------------------------

ImageFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=f"Unlabelled images as the network takes them: {IMAGE_FILES}.",
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Unlabelled texts for a language model, one a line (a hundred are enough); the tokenizer is that in its "
        "folder.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help=f"{', '.join(DATA_SETS)}, or a .safetensors file of train_images, train_labels, test_images, test_labels; "
        "known for zoo networks.",
        autocompletion=complete_from(DATA_SETS),
    ),
]


def _check_memory(said: str | None) -> str | None:
    try:
        read_memory(said)
    except RecipeError as error:
        raise typer.BadParameter(str(error)) from error
    return said


Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What is held of the images and computed of them takes at most this, beside the network: 2GB, 500MB. "
        "Half of what is free by default.",
        callback=_check_memory,
    ),
]
TrainImages = Annotated[int | None, count_option("Take this many training images only.")]
TestImages = Annotated[int | None, count_option("Take this many test images only.")]

# ---- the method -----------------------------------------------------------------------------------------------------

Fractions = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="FRACTION",
        help="Fraction of the channels to keep, or PATTERN=FRACTION (repeatable): the first pattern that matches "
        "counts, a fraction alone holds for the rest. An experiment measures each fraction.",
    ),
]
Criterion = Annotated[str | None, choice_option(IMPORTANCES, "How much a channel matters")]
Criteria = Annotated[list[str] | None, choice_option(IMPORTANCES, "How much a channel matters")]
Order = Annotated[str | None, choice_option(ORDERS, "Order of the groups")]
Steps = Annotated[
    list[str] | None,
    choice_option(
        _STEPS,
        "What is done against the loss (repeatable, in order); auto takes the strongest that the images allow",
    ),
]
_BUDGET, _CHECKPOINTS = "--distill-seconds", "--checkpoints"


def _check_seconds(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise typer.BadParameter(
            f"expected a time above 0, got {seconds!r}; to distil nothing, leave --restore distill out."
        )
    return seconds


DistillSeconds = Annotated[
    float | None,
    typer.Option(
        _BUDGET,
        metavar="SECONDS",
        help="Budget of --restore distill, all that it tries included.",
        callback=_check_seconds,
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        _CHECKPOINTS,
        metavar="FOLDER",
        help="Where --restore distill keeps how far it is, so that the same command goes on after an interruption.",
    ),
]


def set_distilling(recipe: Recipe, seconds: float | None, folder: Path | None) -> Recipe:
    """The recipe with these in its step of distillation.

    Raises:
        RecipeError: it has none.
    """
    said = {"seconds": seconds, "folder": None if folder is None else str(folder)}
    said = {name: value for name, value in said.items() if value is not None}
    if said and not any(isinstance(step, Distill) for step in recipe.restore):
        named = f"{_CHECKPOINTS} {folder}" if seconds is None else f"{_BUDGET} {seconds:g}"
        raise RecipeError(f"{named}: goes with --restore distill, which is not there; add it, or leave this out.")
    steps = tuple(replace(step, **said) if isinstance(step, Distill) else step for step in recipe.restore)
    return replace(recipe, restore=steps)


ReducerName = Annotated[str | None, choice_option(REDUCERS, "How channels become fewer; select is plain pruning")]
Of = Annotated[
    str | None,
    choice_option(FRACTIONS, "What sizes are fractions of; of MACs and parameters where to cut is chosen"),
]
EvaluateFunction = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="FUNCTION",
        help="path.py:function or module:function that gives a number for a network, such as its accuracy.",
    ),
]
RoundTo = Annotated[int | None, count_option("Make every size a multiple of this.")]
Uniform = Annotated[
    bool | None,
    typer.Option(
        "--uniform",
        help="Of a network of transformers: only sizes that its configuration can say, so that from_pretrained "
        "opens the folder.",
    ),
]
RankWord = Annotated[
    str | None,
    typer.Option(
        "--ranks",
        metavar="both|only|FRACTION",
        help="Layers may become two thinner ones each. With a target, both: fewer channels or lower ranks, layer by "
        "layer; only: lower ranks. FRACTION: each layer keeps that part of its weights.",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="recipe.yaml of an earlier run; options beside it count more."),
]
Using = Annotated[str, choice_option(USING, "What channels are compared by in fusing")]
_SEED = count_option("For whatever draws random numbers.", least=0, most=2**32 - 1)
Seed = Annotated[int, _SEED]
OptionalSeed = Annotated[int | None, _SEED]

# ---- training -------------------------------------------------------------------------------------------------------

_TUNE_EPOCHS = count_option("Epochs of fine-tuning at the end.", least=0, most=MOST_EPOCHS)
_TUNE_RATE = rate_option("--tune-lr", about="Learning rate of fine-tuning.")
_BATCH_SIZE = count_option("Images of one training step.", least=2)
TuneEpochs = Annotated[int, _TUNE_EPOCHS]
OptionalTuneEpochs = Annotated[int | None, _TUNE_EPOCHS]
TuneRate = Annotated[float, _TUNE_RATE]
OptionalTuneRate = Annotated[float | None, _TUNE_RATE]
BatchSize = Annotated[int, _BATCH_SIZE]
OptionalBatchSize = Annotated[int | None, _BATCH_SIZE]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Run in parallel on Ray: local, or the address of a running cluster."),
]
Cores = Annotated[int | None, count_option("Of this machine for Ray; all if not said.", most=100_000)]

# ---- what comes out -------------------------------------------------------------------------------------------------

_OUTPUT = typer.Option(
    "--output", "-o", metavar="PATH", help="Where to write: a folder; experiment, report and export: a file."
)
Output = Annotated[Path, _OUTPUT]
OptionalOutput = Annotated[Path | None, _OUTPUT]
KeepProgram = Annotated[
    bool,
    typer.Option(
        "--program",
        help="Save a torch.export program too, which runs without the code of the network: "
        "intrafusion.load(folder, trust_program=True).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
