"""intrafusion export: a network as one file that other programs run."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from intrafusion.cli.console import working
from intrafusion.cli.defaults import tells_defaults
from intrafusion.cli.network import read_network
from intrafusion.cli.options import (
    Arguments,
    AsJson,
    Base,
    InputShapes,
    Name,
    OptionalOutput,
    TrustProgram,
    WeightFiles,
)
from intrafusion.cli.outputs import check_writable
from intrafusion.cli.show import print_json, say
from intrafusion.io.export import DEFAULT_OPSET, LEAST_OPSET, check_export, export_inputs


@tells_defaults({"output": "the network's name and .onnx", "opset": DEFAULT_OPSET})
def export_command(
    model: Name,
    base: Base = None,
    weights: WeightFiles = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    output: OptionalOutput = None,
    opset: Annotated[
        int | None, typer.Option(min=LEAST_OPSET, max=99, metavar="N", help="Version of ONNX's operators.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    trust_program: TrustProgram = False,
    as_json: AsJson = False,
) -> None:
    """Write a saved or any other network as one file, ONNX or a program of torch.export, and check what was written."""
    with working("nothing was written; the same command starts again."):
        file = output or Path(f"{_name(model)}.onnx")
        check_export(file, opset=opset, overwrite=overwrite)
        check_writable(file)
        network = read_network(
            model, base=base, weights=weights or (), arguments=arguments or (), inputs=inputs or (),
            trust_program=trust_program,
        )  # fmt: skip
        found = export_inputs(network.model, network.inputs, file, opset=opset, overwrite=overwrite)
    if as_json:
        print_json("export", {"model": model, **asdict(found), "path": str(found.path)})
    else:
        say(str(found))


def _name(model: str) -> str:
    """Of a folder its name, of another network what stands last in it."""
    return Path(os.path.abspath(model if Path(model).is_dir() else model.rpartition(":")[2])).name
