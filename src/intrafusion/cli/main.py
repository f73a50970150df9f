"""intrafusion: one file per command."""

from __future__ import annotations

from typing import Annotated

import typer

import intrafusion
from intrafusion.cli.compress import compress_command
from intrafusion.cli.console import EXIT_CODES
from intrafusion.cli.demo import demo
from intrafusion.cli.experiment import experiment
from intrafusion.cli.fuse import fuse_command
from intrafusion.cli.inspect import inspect_command
from intrafusion.cli.report import report
from intrafusion.cli.split_train import split_train_command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_CODES)
for command in (inspect_command, compress_command, fuse_command, experiment, report, demo):
    app.command(epilog=EXIT_CODES)(command)
app.command("split-train", epilog=EXIT_CODES)(split_train_command)


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
