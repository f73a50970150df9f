"""intrafusion fuse: several trained networks of one structure into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from intrafusion.cli.console import check_output, progress_bar, working
from intrafusion.cli.network import Network, loading_line, read_network
from intrafusion.cli.options import Arguments, AsJson, InputShapes
from intrafusion.cli.show import plan_data, print_json, print_plan, say
from intrafusion.errors import ModelError
from intrafusion.fusion import Alignment, Fused
from intrafusion.fusion import fuse as fuse_networks
from intrafusion.fusion.align import _COST_FUNCTIONS, _MEMBER_SIDES
from intrafusion.fusion.networks import USING
from intrafusion.lab import zoo


def fuse_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Networks of one structure, as for compress; or one, and")
    ],
    weights: Annotated[
        list[Path] | None,
        typer.Option(help="files of weights for it, two or more (repeatable): .safetensors or .pth."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to save to; none: only show.")] = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    using: Annotated[str, typer.Option(help=f"What channels are compared by: {', '.join(USING)}.")] = "weights",
    data: Annotated[
        str | None, typer.Option(help="Data set of the zoo to take images from: cifar10, cifar100, mnist, digits.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many of its training images to take; labels are not read.")] = 200,
    restore: Annotated[str | None, typer.Option(help="Restorer to apply at the end, on the same images.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="What each network counts (once per network).")] = None,
    cost: Annotated[str, typer.Option(help=f"Distance between channels: {', '.join(_COST_FUNCTIONS)}.")] = "distance",
    sides: Annotated[str, typer.Option(help=f"Weights that describe a channel: {', '.join(_MEMBER_SIDES)}.")] = "both",
    rescale: Annotated[bool, typer.Option(help="Make up for what averaging takes from the channels.")] = True,
    keep: Annotated[float, typer.Option(help="Make the result narrower: fraction of the anchor's channels.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Fuse networks that were trained apart into one, channel by channel, and save it.

    The first is the anchor: the result has its channels and its widths.
    """
    with working():
        if output is not None:
            check_output(output)
        networks = _read_networks(models, weights or [], arguments or [], inputs or [])
        found = (
            None if data is None else zoo.load_data(_data_name(models[0], data), _data_split(data), limit=images).images
        )
        with progress_bar("fuse") as progress:
            fused = fuse_networks(
                [n.model for n in networks],
                networks[0].inputs,
                using=using,
                images=found,
                weights=share or None,
                keep=keep,
                alignment=Alignment(cost=cost, sides=sides),
                rescale=rescale,
                restore=restore,
                progress=progress,
            )
        if output is not None:
            fused.save(output)
    _show(fused, networks[0], output, as_json=as_json)


def _read_networks(models: list[str], weights: list[Path], arguments: list[str], inputs: list[str]) -> list[Network]:
    """The anchor and the others.

    Raises:
        ModelError: fewer than two networks, or files of weights for more than one.
    """
    if len(models) > 1 and weights:
        raise ModelError("fuse: --weights goes with one MODEL; name one network and give all its files of weights.")
    wanted = [(models[0], path) for path in weights] or [(name, None) for name in models]
    if len(wanted) < 2:
        raise ModelError("fuse: expected two networks or more; name several, or give --weights twice or more.")
    return [read_network(name, weights=path, arguments=arguments, inputs=inputs) for name, path in wanted]


def _data_name(model: str, data: str) -> str:
    """The network of the zoo if it is one, for its normalisation; else the data set."""
    name = model.removeprefix("zoo:")
    return name if name in zoo.names() and zoo.entry(name).data == data else data


def _data_split(data: str) -> str:
    return {"cifar100": "calibration", "imagenet": "sample"}.get(data, "train")


def _show(fused: Fused, anchor: Network, output: Path | None, *, as_json: bool) -> None:
    moved = {name: _moved_share(fused, name) for name in fused.alignments[-1]}
    if as_json:
        print_json({**plan_data(fused.plan, fused.before, fused.after), "moved": moved})
        return
    print_plan(fused.plan, fused.before, fused.after)
    average = sum(moved.values()) / max(1, len(moved))
    say(f"\n{len(fused.weights)} networks; {average:.0%} of the channels of the others changed their place")
    if output is not None:
        say(f"saved to {output}; back in one line:\n{loading_line(output, anchor.imports, anchor.original)}")


def _moved_share(fused: Fused, group: str) -> float:
    """Fraction of the channels that are not where they were, over all networks but the anchor."""
    maps = [own[group].merge for own in fused.alignments[1:]]
    stay = [float(torch.diagonal(m).sum() / len(m)) for m in maps]
    return 1 - sum(stay) / len(stay)
