"""intrafusion fuse: several trained networks of one structure into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from intrafusion.cli.completion import complete_model
from intrafusion.cli.compress import read_keep
from intrafusion.cli.console import progress_bar, working
from intrafusion.cli.data import data_of, require_training_images
from intrafusion.cli.defaults import tells_defaults
from intrafusion.cli.inputs import check_there, read_images
from intrafusion.cli.network import Network, annotated, read_networks, say_saved, tell_doubt
from intrafusion.cli.options import (
    Arguments,
    AsJson,
    Base,
    Data,
    Device,
    Fractions,
    ImageFile,
    InputShapes,
    KeepProgram,
    OptionalOutput,
    Seed,
    Steps,
    TrainImages,
    TrustProgram,
    Using,
    WeightFiles,
    choice_option,
)
from intrafusion.cli.outputs import check_program, check_saving, check_space, save_network
from intrafusion.cli.show import plan_data, print_json, say
from intrafusion.errors import ModelError, RecipeError, unknown_name
from intrafusion.fusion import Alignment, Fused
from intrafusion.fusion import fuse as fuse_networks
from intrafusion.fusion.align import _COST_FUNCTIONS, _MEMBER_SIDES
from intrafusion.fusion.networks import USING
from intrafusion.restore import RESTORERS

_IMAGES, _KEEP = 200, 1.0  # training images, and what is kept, where nothing is said


@tells_defaults(
    {"keep": _KEEP, "restore": "none", "share": "the same for all", "train_images": f"{_IMAGES}, where --data is read"}
)
def fuse_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Networks of one structure, as for compress; or one, and several --weights.",
            autocompletion=complete_model,
        ),
    ],
    output: OptionalOutput = None,
    base: Base = None,
    weights: WeightFiles = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    device: Device = "cpu",
    using: Using = USING[0],
    data: Data = None,
    train_images: TrainImages = None,
    images: ImageFile = None,
    restore: Steps = None,
    share: Annotated[
        list[float] | None, typer.Option(metavar="NUMBER", help="What each network counts (once per network).")
    ] = None,
    cost: Annotated[str, choice_option(_COST_FUNCTIONS, "Distance between channels")] = "distance",
    sides: Annotated[str, choice_option(_MEMBER_SIDES, "Weights that describe a channel")] = "both",
    rescale: Annotated[bool, typer.Option(help="Make up for what averaging takes from the channels.")] = True,
    keep: Fractions = None,
    seed: Seed = 0,
    program: KeepProgram = False,
    trust_program: TrustProgram = False,
    as_json: AsJson = False,
) -> None:
    """Fuse networks that were trained apart into one, channel by channel, and save it.

    The first is the anchor: the result has its channels and its widths.
    """
    with working():
        step = _read_step(restore)
        fractions = read_keep(keep) if keep else _KEEP
        alignment = Alignment(cost=cost, sides=sides)
        if using not in USING:
            raise RecipeError(unknown_name("using", using, USING))
        if output is not None:
            check_saving(output)
        check_there(images)
        if len(models) == 1 and len(weights or ()) < 2:
            raise ModelError("fuse: expected two networks or more; name several, or give --weights twice or more.")
        networks = read_networks(
            models, weights=weights or [], base=base, arguments=arguments or [], inputs=inputs or [], device=device,
            trust_program=trust_program,
        )  # fmt: skip
        found = _read_images(networks[0], using, images, data, train_images)
        tell_doubt(*networks)
        if output is not None:
            check_space(output, networks[0].model)
        if program:
            check_program(output, networks[0].model, networks[0].inputs)
        with progress_bar("fuse") as progress:
            fused = fuse_networks(
                [n.model for n in networks],
                networks[0].inputs,
                using=using,
                images=found,
                weights=share or None,
                keep=fractions,
                alignment=alignment,
                rescale=rescale,
                restore=step,
                seed=seed,
                progress=progress,
            )
        fused = annotated(fused, *networks)
        if output is not None:
            save_network(fused, output, program=program)
    if as_json:
        print_json("fuse", _summary(fused, networks[0], output))
    else:
        say(str(fused))
        say_saved(networks[0], output)


def _read_step(restore: Sequence[str] | None) -> str | None:
    """The restorer at the end, if there is one.

    Raises:
        RecipeError: several, or a level, which is for `compress`.
    """
    steps = [step for step in restore or () if step != "none"]
    if len(steps) > 1 or not set(steps) <= set(RESTORERS):
        valid = ", ".join(("none", *RESTORERS))
        raise RecipeError(f"fuse: --restore: expected one of {valid}, got {', '.join(steps)}; name one of these.")
    return steps[0] if steps else None


def _read_images(anchor: Network, using: str, file: Path | None, data: str | None, limit: int | None) -> Tensor | None:
    """Images of a file, or training images of a data set; labels are not read.

    Raises:
        ModelError: channels are to be compared by what they give, and there are neither.
    """
    if file is not None:
        return read_images(file, anchor.inputs)
    if data is None and using != "activations":
        return None
    return require_training_images(data_of(anchor.name, data), anchor.name, limit or _IMAGES).images


def _summary(fused: Fused, anchor: Network, output: Path | None) -> dict[str, Any]:
    return {
        "model": anchor.name,
        "output": str(output) if output else None,
        "load": anchor.loading(output) if output else None,
        "shares": list(fused.weights),
        "moved": fused.moved,
        "notes": list(fused.notes),
        **plan_data(fused.plan, fused.before, fused.after),
    }
