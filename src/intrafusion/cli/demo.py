"""intrafusion demo: trains a small residual network on digits on the spot, then prunes, fuses and restores it.

The best default comes last, and is what is saved and reported: what `compress` does with unlabelled images.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion import pipeline
from intrafusion.cli.console import messages, progress_bar, working
from intrafusion.cli.models import resolve
from intrafusion.cli.network import loading_line, read_device
from intrafusion.cli.options import AsJson, Device, Output
from intrafusion.cli.outputs import check_folder, check_page, check_saving
from intrafusion.cli.report import page_of_folder
from intrafusion.cli.show import print_json, print_table, say
from intrafusion.compressed import Compressed
from intrafusion.io.atomic import atomic_file
from intrafusion.lab import zoo
from intrafusion.lab.report import html
from intrafusion.lab.report.plot import accuracy_plot
from intrafusion.lab.zoo import Images
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.size import size_of
from intrafusion.network.batches import cast_like
from intrafusion.network.inputs import Inputs
from intrafusion.recipe import Recipe

_NETWORK = "digits_resnet"
_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_METHODS: Mapping[str, Mapping[str, Any]] = {
    "pruned": {"reducer": "select", "restore": None},
    "fused": {"reducer": "intrafusion", "restore": None},
    "on noise": {"restore": "noise"},
    "on images": {},
}
_BEST, _IMAGES = "on images", 256
_SAVED = (_BEST, 0.5)
_FOLDER, _TABLE, _PLOT, _PAGE, _SMALL = "intrafusion-demo", "accuracy.csv", "accuracy.png", "report.html", "restored-50"


@dataclass(frozen=True)
class Row:
    """One network: how it was made, how large it is, and its test accuracy in [0, 1]."""

    method: str
    keep: float
    params: int
    macs: int
    accuracy: float


def demo(
    output: Output = Path(_FOLDER),
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Train a small residual CNN on scikit-learn's digits, then shrink it: pruned, fused, restored on noise, on images.

    It is shrunk without retraining; the images have no labels. This takes about a minute and needs no file; running it
    again replaces the files it wrote, and no others.
    """
    with working(f"no table was written to {output}, perhaps the network {_SMALL}; the same command starts again."):
        check_folder(output)
        check_saving(output / _SMALL)
        check_page(output / _PAGE)
        place = read_device(device)
        torch.set_num_threads(1)  # for 8 x 8 images, more threads only wait for one another
        messages.print("training a small residual network on 1,197 digits ...")
        rows = run(zoo.train_digits().to(place), output)
    show(rows, output, as_json=as_json)


def run(model: nn.Module, folder: Path, keeps: Sequence[float] = _KEEPS) -> list[Row]:
    """Measure the original and all methods at every keep; write table, plot, one network and its report."""
    test, seen = zoo.load_data(_NETWORK, "test"), zoo.load_data(_NETWORK, "train", limit=_IMAGES).images
    inputs = cast_like(Inputs.of(zoo.example_input(_NETWORK)), model)
    size = size_of(model, inputs)
    rows = [Row("original", 1.0, size.params, size.macs, accuracy(model, test.images, test.labels))]
    with progress_bar("demo") as progress:
        graph = pipeline.inspect(model, inputs, progress=progress)  # traced and proven once
        for index, keep in enumerate(keeps):
            progress(f"keep {keep:.0%}", index, len(keeps))
            recipes = {name: Recipe.of(keep=keep, **options) for name, options in _METHODS.items()}
            smaller = {
                name: pipeline.follow(recipe, model, graph, inputs, seen if name == _BEST else None, progress=False)
                for name, recipe in recipes.items()
            }
            rows += [_measure_row(name, keep, small, test) for name, small in smaller.items()]
            if keep == _SAVED[1]:
                smaller[_BEST].save(folder / _SMALL)
                html.write(page_of_folder(folder / _SMALL), folder / _PAGE)
    _write_table(folder / _TABLE, rows)
    curves = {method: [(r.keep, r.accuracy) for r in rows if r.method == method] for method in _METHODS}
    title = f"Digits, a residual network of {size.params:,} parameters, not retrained;\n{_IMAGES} unlabelled images"
    accuracy_plot(folder / _PLOT, curves, original=rows[0].accuracy, title=title)
    return rows


def _measure_row(method: str, keep: float, small: Compressed, test: Images) -> Row:
    return Row(method, keep, small.after.params, small.after.macs, accuracy(small.model, test.images, test.labels))


def _write_table(path: Path, rows: Iterable[Row]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(astuple(row) for row in rows)


def show(rows: Sequence[Row], folder: Path, *, as_json: bool = False) -> None:
    original, rest = rows[0], rows[1:]
    line = loading_line(folder / _SMALL, *resolve(f"zoo:{_NETWORK}").python())
    if as_json:
        print_json("demo", {"output": str(folder), "load": line, "rows": [asdict(row) for row in rows]})
        return
    keeps = sorted({row.keep for row in rest}, reverse=True)
    say(f"test accuracy on 360 digits; the original has {original.accuracy:.1%} and {original.params:,} parameters\n")
    print_table(("keep", "parameters", *_METHODS), [_line(keep, rest) for keep in keeps], numbers=True)
    say(f"\non noise: without data; on images: {_IMAGES} without labels, which is what compress does with inputs=")
    say(f"written to {folder}: {_TABLE}, {_PLOT}, the network {_SMALL}, {_PAGE} about it; back in one line:")
    say(line)


def _line(keep: float, rows: Iterable[Row]) -> tuple[str, ...]:
    """One keep: what is left of the parameters, and the accuracy of each method."""
    found = {row.method: row for row in rows if row.keep == keep}
    params = next(iter(found.values())).params
    return f"{keep:.0%}", f"{params:,}", *(f"{found[method].accuracy:.1%}" for method in _METHODS)
