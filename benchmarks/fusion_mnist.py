"""Claim: networks that were trained apart fuse far above their plain average once their channels are aligned.

Pairs: mnist_mlp_a and mnist_mlp_b (--images test images, 10,000 by default), and two digits_resnet trained here from
different seeds (360 test images). Channels are compared by weights (what produces them, or also what reads them) or by
their outputs on 200 training images without labels. Each result is measured as it is, without the rescaling of the
averaged channels, and restored to the first network's outputs by least squares on the same 200 images; so is the plain
average, since least squares repairs that too.
Records: benchmarks/records/fusion.jsonl. Resumable: what is in the records is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion import inspect
from intrafusion.application import apply
from intrafusion.fusion import Alignment, fuse
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.planning import decide
from intrafusion.recipe import Recipe
from intrafusion.restore import LeastSquares

RECORDS = Path(__file__).parent / "records" / "fusion.jsonl"
EXPERIMENT = "fusion"
CALIBRATION = 200
HOW = {"weights, producers": ("weights", "inputs"), "weights": ("weights", "both"), "activations": ("activations", "")}
AFTER = ("nothing", "rescaled", "least squares")


class Pair:
    """Two trained networks, their test images, and some training images."""

    def __init__(self, name: str, images: int) -> None:
        self.name = "digits_resnet" if name == "digits" else "mnist_mlp_a"
        if name == "digits":
            self.models: list[nn.Module] = [zoo.train_digits(seed=seed) for seed in (0, 1)]
        else:
            self.models = [zoo.build(f"mnist_mlp_{k}", pretrained=True) for k in "ab"]
        self.test = zoo.load_data(self.name, "test", limit=images)
        self.some = zoo.load_data(self.name, "train", limit=CALIBRATION).images
        self.example = zoo.example_input(self.name)

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.test.images, self.test.labels)

    def average(self) -> nn.Module:
        """Of tensors by name, no channel moved."""
        mean = copy.deepcopy(self.models[0])
        states = zip(self.models[0].state_dict().items(), self.models[1].state_dict().values(), strict=True)
        mean.load_state_dict({name: ((x + y) / 2).to(x.dtype) for (name, x), y in states})
        return mean

    def fused(self, how: str, after: str) -> nn.Module:
        restore = LeastSquares() if after == "least squares" else None
        if how == "plain average":
            return self.average() if restore is None else self.restored(self.average())
        using, sides = HOW[how]
        images = self.some if using == "activations" or restore is not None else None
        alignment = Alignment(sides=sides) if sides else Alignment()
        options: dict[str, Any] = {"rescale": after != "nothing", "restore": restore}
        return fuse(self.models, self.example, using=using, images=images, alignment=alignment, **options).model

    def restored(self, model: nn.Module) -> nn.Module:
        """The average, restored as the fused networks are: the same plan with nothing reduced."""
        graph = inspect(self.models[0], self.example)
        kept = apply(self.models[0], decide(self.models[0], graph, Recipe.of(keep=1.0)), self.example, graph=graph)
        kept.model.load_state_dict(model.state_dict())
        LeastSquares()(kept, self.models[0], graph, self.some)
        return kept.model


def settings(pair: str, images: int) -> Iterator[dict[str, Any]]:
    base = {"pair": pair, "test_images": images}
    for k in ("first", "second"):
        yield {**base, "how": f"{k} network", "after": "nothing"}
    for how in ("plain average", *HOW):
        for after in AFTER:
            if (how, after) != ("plain average", "rescaled"):
                yield {**base, "how": how, "after": after}


def measure(pair: Pair, setting: dict[str, Any]) -> dict[str, Any]:
    if setting["how"].endswith("network"):
        return {"accuracy": pair.accuracy(pair.models[0 if setting["how"].startswith("first") else 1])}
    start = time.perf_counter()
    model = pair.fused(setting["how"], setting["after"])
    return {"fuse_s": round(time.perf_counter() - start, 2), "accuracy": pair.accuracy(model)}


def run(records: Path, images: int, pairs: tuple[str, ...], only: int | None = None) -> None:
    for name in pairs:
        finished = finished_keys(read_records(records))
        count = min(images, 360) if name == "digits" else images
        todo = [s for s in settings(name, count) if key_of(EXPERIMENT, s) not in finished][:only]
        pair = Pair(name, count) if todo else None
        for setting in todo:
            assert pair is not None
            record = Record(EXPERIMENT, setting, measure(pair, setting))
            append_record(records, record)
            print(name, setting["how"], setting["after"], f"{record.result['accuracy']:.4f}", flush=True)


def table(records: Path) -> str:
    """Markdown: a row per pair and way of comparing, a column per treatment."""
    found = {
        (r.setting["pair"], r.setting["how"], r.setting["after"]): 100 * r.result["accuracy"]
        for r in read_records(records)
    }
    lines = ["| pair | compared by | averaged | rescaled | least squares |", "|---|---|---|---|---|"]
    for pair, how in dict.fromkeys((p, h) for p, h, _ in found):
        cells = [f"{found[pair, how, a]:.1f}" if (pair, how, a) in found else "" for a in AFTER]
        lines.append(f"| {pair} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--pairs", nargs="+", default=("mnist", "digits"), choices=("mnist", "digits"))
    parser.add_argument("--table", action="store_true", help="print the table of the records and stop")
    parser.add_argument("--smoke", action="store_true", help="a few measurements, recorded nowhere")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        print(table(options.records))
        return
    pairs = tuple(p for p in options.pairs if p == "digits" or os.environ.get("INTRAFUSION_DATA"))
    if len(pairs) < len(options.pairs):
        print("without mnist: INTRAFUSION_DATA is not set; it names the folder with mnist.npz and models/.")
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder) / "smoke.jsonl", 100, pairs, only=5)
    else:
        run(options.records, options.images, pairs)


if __name__ == "__main__":
    main()
