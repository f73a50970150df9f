"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intrafusion.cli.models import FORMS

Name = Annotated[str, typer.Argument(metavar="MODEL", help=f"{FORMS}, or a saved folder.")]
Base = Annotated[str | None, typer.Option(metavar="MODEL", help="The original network of a saved folder.")]
WeightFiles = Annotated[
    Path | None, typer.Option(help="Weights to load: .safetensors, or .pth if it holds tensors only.")
]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the factory (repeatable).")
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Example input, such as 1,3,224,224 or 2,7:int64 or mask=2,7:int64 (once per input). "
        "Known for zoo and timm networks and torchvision classifiers.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
