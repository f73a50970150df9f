"""Claim: a network cut to a fraction of its channels keeps most of its accuracy, without training, if its layers are
solved for what the original network gives.

Measures, on the first --images CIFAR-10 test images (standard error about 0.7 points for 2,000): block-inner channels
of cifar10_resnet20_pad at keep 0.7, 0.5, 0.3, and all channels of cifar10_resnet20 at keep 0.9, 0.8, 0.7, 0.5; reduced
by pruning, Intra-Fusion or pivoting; restored with nothing, with constants alone (no data), on 128 images made from the
network, or on 64 or 256 unlabelled training images. Sizes are round(n * keep). Images made from a network are kept
in `build` beside the records. Resumable: what is in the records is not measured again.
Records: benchmarks/records/restoration.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from intrafusion import ChannelGraph, Recipe, carry_out, decide, inspect, zoo
from intrafusion.bench import Record, append, done, read
from intrafusion.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.restore import LeastSquares, Pivot, Synthesis, add_shifts_, load_images, save_images

RECORDS = Path(__file__).parent / "records" / "restoration.jsonl"
EXPERIMENT = "restoration_cifar10"
INNER, WHOLE = "block-inner channels", "whole network"
CASES = {
    ("cifar10_resnet20_pad", INNER): (0.7, 0.5, 0.3),
    ("cifar10_resnet20", WHOLE): (0.9, 0.8, 0.7, 0.5),
}
REDUCERS = ("select", "intrafusion", "pivot")
RESTORERS = ("none", "constants", "synthetic 128", "real 64", "real 256")
SYNTHESIS = Synthesis()


@dataclass
class Case:
    """One network with everything that is computed once for it."""

    network: str
    scope: str
    images: int
    folder: Path

    def __post_init__(self) -> None:
        self.model: nn.Module = zoo.build(self.network, pretrained=True)
        self.example = zoo.example_input(self.network)
        self.graph: ChannelGraph = inspect(self.model, self.example)
        self.test = zoo.load_data(self.network, "test", limit=self.images)
        self.real = zoo.load_data(self.network, "train", limit=256).images

    @cached_property
    def synthetic(self) -> Tensor:
        """128 images made from the network, once."""
        path = self.folder / f"{self.network}.synthetic.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_images(SYNTHESIS(self.model, self.example), path, SYNTHESIS)
        return load_images(path)

    def calibration(self, restorer: str) -> Tensor | None:
        kind, _, count = restorer.partition(" ")
        if kind == "synthetic":
            return self.synthetic
        return self.real[: int(count)] if kind == "real" else None

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.test.images, self.test.labels)

    def measure(self, keep: float, reducer: str, restorer: str) -> dict[str, Any]:
        images = self.calibration(restorer)
        start = time.perf_counter()
        inner = [g.producers[0] for g in self.graph.reducible if len(g.producers) == 1]
        fractions = {g.name: round(g.size * keep) / g.size for g in self.graph.reducible}
        name = "select" if reducer == "pivot" else reducer
        recipe = Recipe.of(keep=fractions, reducer=name, **({"include": inner} if self.scope == INNER else {}))
        plan, shifts = decide(self.model, self.graph, recipe), {}
        if reducer == "pivot":
            pivoted = Pivot()(plan, self.model, self.graph, self.example, images)
            plan, shifts = pivoted.plan, pivoted.shifts
        small = carry_out(self.model, plan, self.graph, self.example)
        if restorer == "constants":
            add_shifts_(small, self.model, self.graph, shifts)
        if images is not None:
            LeastSquares()(small, self.model, self.graph, images)
        seconds = time.perf_counter() - start
        sizes = {"params": small.after.params, "params_before": small.before.params}
        return {"accuracy": self.accuracy(small.model), "compress_and_restore_s": round(seconds, 2), **sizes}


def settings(
    network: str, scope: str, images: int, keeps: tuple[float, ...], restorers: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Constants are owed by pivoting only: the other reducers give none."""
    base = {"network": network, "group": scope, "test_images": images}
    yield {**base, "keep": 1.0, "reducer": "none", "restorer": "none"}
    for keep in keeps:
        for reducer in REDUCERS:
            for restorer in restorers:
                if restorer != "constants" or reducer == "pivot":
                    yield {**base, "keep": keep, "reducer": reducer, "restorer": restorer}


def run(
    images: int,
    records: Path,
    keeps: tuple[float, ...] | None = None,
    restorers: tuple[str, ...] = RESTORERS,
    only: int | None = None,
) -> None:
    for (network, scope), usual in CASES.items():
        finished = done(read(records))
        wanted = settings(network, scope, images, keeps or usual, restorers)
        todo = [s for s in wanted if key_of(EXPERIMENT, s) not in finished][:only]
        if not todo:
            continue
        case = Case(network, scope, images, records.parent / "build")
        for setting in track(todo, network):
            if setting["reducer"] == "none":
                result: dict[str, Any] = {"accuracy": case.accuracy(case.model)}
            else:
                result = case.measure(setting["keep"], setting["reducer"], setting["restorer"])
            append(records, Record(EXPERIMENT, setting, result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--restorers", nargs="+", default=RESTORERS, choices=RESTORERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two measurements on 100 images, recorded nowhere")
    options = parser.parse_args()
    if not os.environ.get("INTRAFUSION_DATA"):
        print("skipped: INTRAFUSION_DATA is not set; it names the folder with cifar10.npz and models/.")
        return
    torch.set_num_threads(options.threads)
    if options.smoke:
        smoke()
    else:
        run(options.images, options.records, restorers=tuple(options.restorers))


def smoke() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "smoke.jsonl"
        run(100, records, keeps=(0.5,), only=2)
        for record in read(records):
            print(record.setting["reducer"], record.setting["restorer"], f"{record.result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
