"""intrafusion: one file per command."""

from __future__ import annotations

from typing import Annotated

import typer

import intrafusion
from intrafusion.cli.compress import compress_command
from intrafusion.cli.console import EXIT_CODES
from intrafusion.cli.demo import demo
from intrafusion.cli.experiment import experiment
from intrafusion.cli.export import export_command
from intrafusion.cli.frontier import frontier_command
from intrafusion.cli.fuse import fuse_command
from intrafusion.cli.inspect import inspect_command
from intrafusion.cli.program import Command, Program
from intrafusion.cli.report import report
from intrafusion.cli.split_train import split_train_command

app = Program(no_args_is_help=True, pretty_exceptions_enable=False, epilog=EXIT_CODES)
COMMANDS = {
    "inspect": inspect_command,
    "compress": compress_command,
    "frontier": frontier_command,
    "export": export_command,
    "fuse": fuse_command,
    "split-train": split_train_command,
    "experiment": experiment,
    "report": report,
    "demo": demo,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command, epilog=EXIT_CODES)(command)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(intrafusion.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make a trained neural network smaller without retraining it, and prove each step."""
