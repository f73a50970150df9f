"""Claim: at equal multiply-accumulates, a budget that may lower ranks as well as widths is at least as good as one for
widths alone.

Measures VGG11-BN, ResNet-20 and a ViT on CIFAR-10 at MACs .7 and .5, restored on 256 unlabelled training images: fewer
channels alone, lower ranks alone, and both (`ranks=True`, which takes what is better on images that nothing was solved
on). What there was to choose was chosen by the accuracy on 1,000 other training images, which is recorded too; the
table shows that on the first 2,000 test images (standard error about 0.7 points). Also recorded: ranks, processor time.
Resumable: what is in the records is not measured again.
Records: benchmarks/records/ranks.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _data import has_data
from rich.progress import track

from intrafusion import Recipe
from intrafusion.inspection import inspect
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.pipeline import Prepared

RECORDS = Path(__file__).parent / "records" / "ranks.jsonl"
EXPERIMENT = "ranks"
NETWORKS = ("cifar10_vit", "cifar10_resnet20", "cifar10_vgg11_bn")
FRACTIONS = (0.7, 0.5)
WAYS: Mapping[str, Any] = {"widths": False, "ranks": "only", "both": True}
SEEN, UNSEEN, TEST = 256, 1000, 2000


class Case:
    """One network with everything that is computed once for it."""

    def __init__(self, network: str, images: int, test: int) -> None:
        self.network, self.images, self.test = network, images, test

    @cached_property
    def prepared(self) -> Prepared:
        model, example = zoo.build(self.network, pretrained=True), zoo.example_input(self.network)
        seen = zoo.load_data(self.network, "train", limit=self.images).images
        prepared = Prepared.of(recipe := self.recipe(0.5, "widths"), model, inspect(model, example), example, seen)
        return prepared.calibrated(recipe)

    def recipe(self, fraction: float, way: str) -> Recipe:
        return Recipe.of(target={"macs": fraction}, ranks=WAYS[way])

    def measure(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        if setting["way"] == "original":
            return self.judge(self.prepared.whole)
        prepared, start = self.prepared, time.process_time()
        small = prepared.carry_out(self.recipe(setting["macs"], setting["way"]))
        seconds = time.process_time() - start
        held = None if small.comparison is None else small.comparison.held_out
        return {
            **self.judge(small.model),
            "macs": small.after.macs / small.before.macs,
            "params": small.after.params / small.before.params,
            "ranks": small.plan.ranks,
            "held_out_error": None if held is None else held.after.error,
            "cpu_s": round(seconds, 1),
        }

    def judge(self, model: torch.nn.Module) -> dict[str, float]:
        unseen = zoo.load_data(self.network, "train", start=self.images, limit=min(self.test, UNSEEN))
        test = zoo.load_data(self.network, "test", limit=self.test)
        return {
            "unseen_accuracy": accuracy(model, unseen.images, unseen.labels),
            "accuracy": accuracy(model, test.images, test.labels),
        }


def settings(network: str, test: int, fractions: Sequence[float], ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    base = {"network": network, "test_images": test}
    yield {**base, "macs": 1.0, "way": "original"}
    for fraction in fractions:
        for way in ways:
            yield {**base, "macs": fraction, "way": way}


def run(
    records: Path,
    networks: Sequence[str] = NETWORKS,
    fractions: Sequence[float] = FRACTIONS,
    images: int = SEEN,
    test: int = TEST,
    ways: Sequence[str] = tuple(WAYS),
) -> None:
    for network in networks:
        finished = finished_keys(read_records(records))
        todo = [s for s in settings(network, test, fractions, ways) if key_of(EXPERIMENT, s) not in finished]
        case = Case(network, images, test)
        for setting in track(todo, network):
            append_record(records, Record(EXPERIMENT, setting, case.measure(setting)))


def smoke() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(records := Path(folder) / "smoke.jsonl", ["cifar10_vit"], [0.5], images=40, test=50, ways=["ranks"])
        for record in read_records(records):
            print(record.setting["way"], f"{record.result['accuracy']:.3f}", record.result.get("ranks", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="only these")
    parser.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS, help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="one size of one network on 50 images, recorded nowhere")
    options = parser.parse_args()
    if not has_data():
        return
    torch.set_num_threads(options.threads)
    if options.smoke:
        smoke()
    else:
        run(options.records, options.networks, options.fractions)


if __name__ == "__main__":
    main()
