"""intrafusion frontier: one network at several sizes, shown side by side, drawn and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from intrafusion.cli import hugging_face
from intrafusion.cli.compress import check_given, read_fraction, read_given, read_ranks, read_recipe
from intrafusion.cli.console import Kept, progress_bar, working
from intrafusion.cli.defaults import tells_defaults
from intrafusion.cli.models import read_function
from intrafusion.cli.network import Network, annotated, lift_precision_, read_network, tell_doubt
from intrafusion.cli.options import (
    Arguments,
    AsJson,
    Base,
    Checkpoints,
    Device,
    DistillSeconds,
    EvaluateFunction,
    ImageFile,
    InputShapes,
    Memory,
    Name,
    Of,
    OptionalOutput,
    OptionalSeed,
    RankWord,
    RecipeFile,
    ReducerName,
    RoundTo,
    Steps,
    TextFile,
    TrustProgram,
    Uniform,
    WeightFiles,
    set_distilling,
)
from intrafusion.cli.outputs import check_file, check_folder, check_place, check_saving, save_result
from intrafusion.cli.show import print_json, say
from intrafusion.errors import RecipeError
from intrafusion.frontiers import PICTURES, SIZES, Frontier, Point, frontier
from intrafusion.recipe import Recipe
from intrafusion.restore import Distill

_DEFAULTS = {
    "size": SIZES,
    "of": "macs",
    "reducer": "pivot",
    "restore": "auto",
    "seed": 0,
    "distill_seconds": Distill().seconds,
}


@tells_defaults(_DEFAULTS)
def frontier_command(
    model: Name,
    output: OptionalOutput = None,
    base: Base = None,
    weights: WeightFiles = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    device: Device = "cpu",
    size: Annotated[
        list[str] | None, typer.Option(metavar="FRACTION", help="A size, as a fraction of the original (repeatable).")
    ] = None,
    of: Of = None,
    reducer: ReducerName = None,
    round_to: RoundTo = None,
    restore: Steps = None,
    distill_seconds: DistillSeconds = None,
    checkpoints: Checkpoints = None,
    images: ImageFile = None,
    texts: TextFile = None,
    seed: OptionalSeed = None,
    uniform: Uniform = None,
    ranks: RankWord = None,
    memory: Memory = None,
    evaluate: EvaluateFunction = None,
    recipe: RecipeFile = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the output error against the MACs (.png, .svg or .pdf)."),
    ] = None,
    trust_program: TrustProgram = False,
    as_json: AsJson = False,
) -> None:
    """Make a network smaller to several sizes, which share what is found out once, and show what each costs and keeps.

    Every size is saved in a folder of its own in the one given, as soon as it is done.
    """
    kept = Kept()
    with working(kept):
        said = {"reducer": reducer, "round_to": round_to, "restore": restore, "seed": seed, "uniform": uniform}
        wanted = read_recipe(recipe, said, None)
        wanted = set_distilling(wanted, distill_seconds, checkpoints)
        sizes = [read_fraction(text, "--size") for text in size or map(str, SIZES)]
        _check_outputs(output, picture)
        lines = check_given(images, texts, None)
        judge = read_function(evaluate, "--evaluate") if evaluate else None
        of = of or "macs"
        network = read_network(
            model, base=base, weights=weights or (), arguments=arguments or (), inputs=inputs or (), device=device,
            trust_program=trust_program,
        )  # fmt: skip
        given, tokenizer = read_given(network, images, lines)
        tell_doubt(network)
        if output:
            check_place(output, network)
        dtypes = lift_precision_(network)
        options = {name: getattr(wanted, name) for name in Recipe.options() if name not in ("keep", "target")}
        options |= {"ranks": read_ranks(ranks)} if ranks else {}
        with progress_bar("frontier") as progress:
            found = frontier(
                *(network.model, network.inputs, given, sizes, judge),
                of=of,
                tokenizer=tokenizer,
                memory=memory,
                progress=progress,
                **options,
            )
            _carry_out(found, network, dtypes, output, kept)
        if picture:
            found.draw(picture)
        shown = str(found)
    if as_json:
        print_json("frontier", _summary(network, found, of, output))
        return
    say(shown)
    say(f"\nsaved in {output}" if output else "\nnothing was written; -o FOLDER saves all sizes")


def _check_outputs(folder: Path | None, picture: Path | None) -> None:
    """
    Raises:
        FolderError: they cannot be written.
        RecipeError: no picture is drawn in such a file.
    """
    if folder:
        check_folder(folder)
    if picture:
        check_file(picture)
        if picture.suffix not in PICTURES:
            raise RecipeError(f"--picture {picture}: expected a picture in .png, .svg or .pdf; name it so.")


def _carry_out(
    found: Frontier, network: Network, dtypes: Mapping[str, torch.dtype], output: Path | None, kept: Kept
) -> None:
    """One size after another, each measured, and saved in the precision that the network came in, once it is done."""
    places = {point: output / name_folder(point) for point in found} if output else {}
    for place in places.values():
        check_saving(place)
    for point in found:
        _ = point.compressed, point.score
        if point in places:
            small = hugging_face.lower_precision_(annotated(point.compressed, network), dtypes)
            save_result(small, places[point], network)
            kept.add(places[point])


def name_folder(point: Point) -> str:
    """What the folder of a size is called, such as "macs-0.9"."""
    return point.asked.replace(", ", "-").replace(" ", "-")


def _summary(network: Network, found: Frontier, of: str, output: Path | None) -> dict[str, Any]:
    return {
        "model": network.name,
        "of": of,
        "output": str(output) if output else None,
        "before": asdict(found[0].compressed.before),
        "score": found.score,
        "points": [_summarise_point(point, output) for point in found],
    }


def _summarise_point(point: Point, output: Path | None) -> dict[str, Any]:
    small = point.compressed
    return {
        "asked": point.asked,
        "output": str(output / name_folder(point)) if output else None,
        "after": asdict(small.after),
        "error": point.error,
        "agreement": point.agreement,
        "score": point.score,
        "comparison": small.comparison.to_data() if small.comparison else None,
        "groups": {d.group: d.m for d in small.plan.decisions if d.reduced},
        "warnings": list(dict.fromkeys((*small.plan.warnings, *small.warnings))),
    }
