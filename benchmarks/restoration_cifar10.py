"""Claim: a network cut to a fraction of its channels keeps most of its accuracy, without training, if its layers are
solved for what the original network gives.

Measures, on the first --images test images (standard error about 0.7 points for 2,000; also recorded: `--images 10000
--networks cifar10_resnet20`, 0.3 points): block-inner channels of cifar10_resnet20_pad at keep 0.7, 0.5, 0.3; all
channels of cifar10_resnet20 at keep 0.9, 0.8, 0.7, 0.5 and of other networks; reduced by pruning, Intra-Fusion, folding
(norms folded into the weights; rivals.py runs them as their authors do) or pivoting; restored with nothing, on noise
(no data, seconds), on 128 images made from the network and their mirror
images (no data, minutes), or on 64 or 256 unlabelled training images. Sizes are round(n * keep). The rival: the pruned
network fine-tuned on the same 256 images with their labels, for as many multiply-accumulates as restoring may cost (six
forward passes: 16 steps of 32 images, AdamW, flips and shifts), and for ten times as many; its learning rate was chosen
on held-out training images. And, at equal MACs, sizes chosen for a target against the same fraction everywhere and
against one global ranking by l1. Images made from a network are kept in `build` beside the records. Resumable: what is
in the records is not measured again.
Records: benchmarks/records/restoration.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _data import count_tested, has_data, load_apart
from recovery_cifar10 import flipped_and_shifted
from rich.progress import track
from torch import Tensor, nn

from intrafusion import ChannelGraph, Recipe
from intrafusion.budget.target import cost_of
from intrafusion.importance import Magnitude
from intrafusion.inspection import inspect
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.network.held_out import Split
from intrafusion.network.inputs import Inputs
from intrafusion.pipeline import reduce_and_restore
from intrafusion.planning import fold_weights
from intrafusion.restore import Calibration, Synthesis, calibrate, load_images, save_images
from intrafusion.train import Training, train_

RECORDS = Path(__file__).parent / "records" / "restoration.jsonl"
EXPERIMENT = "restoration_cifar10"
INNER, WHOLE = "block-inner channels", "whole network"
_L1_FOLDED = {"name": "l1", "folded": True}
REDUCERS: Mapping[str, Mapping[str, Any]] = {
    "select, l1 folded": {"reducer": "select", "importance": _L1_FOLDED},
    "intrafusion": {"reducer": "intrafusion", "importance": _L1_FOLDED},
    "fold, folded": {"reducer": {"name": "fold", "raw": False}},
    "pivot": {"reducer": "pivot"},
}
RESTORERS = ("none", "noise", "synthetic 128", "real 64", "real 256")
MADE = ("none", "noise", "synthetic 128", "real 256")
RIVALS = {"256 labels, trained": 16, "256 labels, trained x10": 160}  # steps
SIZES = ("uniform", "global l1", "target")
THRESHOLDS = torch.linspace(0, 3, 1001).tolist()
SYNTHESIS = Synthesis()


@dataclass(frozen=True)
class Plan:
    """What is measured on one network."""

    keeps: tuple[float, ...] = ()
    reducers: tuple[str, ...] = tuple(REDUCERS)
    restorers: tuple[str, ...] = ("none", "noise", "real 256")
    macs: tuple[float, ...] = ()
    rivals: tuple[str, ...] = tuple(RIVALS)


CASES: Mapping[tuple[str, str], Plan] = {
    ("cifar10_resnet20_pad", INNER): Plan((0.7, 0.5, 0.3), restorers=RESTORERS),
    ("cifar10_resnet20", WHOLE): Plan((0.9, 0.8, 0.7, 0.5), restorers=RESTORERS, macs=(0.6, 0.4)),
    ("cifar10_resnet32", WHOLE): Plan((0.9, 0.8, 0.7), restorers=MADE, macs=(0.6,)),
    ("cifar100_resnet20", WHOLE): Plan((0.9, 0.8, 0.7), restorers=MADE, macs=(0.6,)),
    ("imagenet_mobilenetv1_025", WHOLE): Plan((0.9, 0.8), restorers=MADE),
    ("cifar10_densenet100", WHOLE): Plan((0.9, 0.8), restorers=MADE),
}


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
        self.test, self.labelled = load_apart(self.network, self.images)
        self.calibrations: dict[str, Calibration] = {}

    @property
    def real(self) -> Tensor:
        """256 images that are not tested on, without their labels."""
        return self.labelled.images

    @cached_property
    def synthetic(self) -> Tensor:
        """128 images made from the network, once."""
        path = self.folder / f"{self.network}.synthetic.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_images(SYNTHESIS(self.model, self.example), path, SYNTHESIS)
        return load_images(path)

    def calibration(self, restorer: str) -> Calibration | None:
        """What the layers are solved on."""
        if restorer == "none":
            return None
        if restorer not in self.calibrations:
            kind, _, count = restorer.partition(" ")
            images = {"synthetic": lambda: self.synthetic, "real": lambda: self.real[: int(count)]}.get(kind)
            level = "noise" if images is None else "images"
            inputs = Inputs.of(self.example)
            self.calibrations[restorer] = calibrate(self.model, inputs, level, images and images())
        return self.calibrations[restorer]

    def measure(self, sizes: Mapping[str, int], reducer: str, restorer: str, **options: Any) -> dict[str, Any]:
        start, steps = time.perf_counter(), RIVALS.get(restorer)
        restorer = "none" if steps else restorer
        calibration = self.calibration(restorer)
        restore = None if restorer == "none" else "images" if restorer[:4] in ("real", "synt") else restorer
        if sizes:
            options["keep"] = {g.name: sizes[g.name] / g.size for g in self.graph.reducible if g.name in sizes}
        recipe = Recipe.of(restore=restore, **REDUCERS[reducer], **options)
        images = Split(None if calibration is None else calibration.images)
        inputs = Inputs.of(self.example)
        small = reduce_and_restore(recipe, self.model, self.graph, inputs, images, calibration=calibration)
        if steps:
            how = Training(epochs=steps, steps=steps, batch_size=32, lr=1e-3)
            train_(small.model, self.labelled, how, augment=flipped_and_shifted)
        seconds = time.perf_counter() - start
        return {
            "accuracy": accuracy(small.model, self.test.images, self.test.labels),
            "compress_and_restore_s": round(seconds, 2),
            "params": small.after.params,
            "params_before": small.before.params,
            "macs": small.after.macs,
            "macs_before": small.before.macs,
        }

    def uniform(self, keep: float) -> dict[str, int]:
        groups = [g for g in self.graph.reducible if g.is_channel]
        inner = self.scope == INNER
        return {g.name: max(1, round(g.size * keep)) for g in groups if not inner or len(g.producers) == 1}

    def at_macs(self, how: str, fraction: float) -> dict[str, int]:
        """Sizes that cost about this fraction of the MACs: one keep for all, or one threshold for all l1 scores."""
        cost = cost_of(self.model, self.graph, Inputs.of(self.example), "macs")
        if how == "uniform":
            tried = [self.uniform(k / 1000) for k in range(1, 1001)]
        else:
            groups = [g for g in self.graph.reducible if g.is_channel]
            weights, score = fold_weights(self.model, self.graph, groups), Magnitude(p=1.0, folded=True)
            scores = {g.name: score(g, weights) for g in groups}  # of mean 1 in every group
            tried = [{name: max(1, int((x >= t).sum())) for name, x in scores.items()} for t in THRESHOLDS]
        return min(tried, key=lambda sizes: abs(cost(sizes) - fraction * cost({})))


def settings(network: str, scope: str, images: int, plan: Plan) -> Iterator[dict[str, Any]]:
    base = {"network": network, "group": scope, "test_images": images}
    yield {**base, "keep": 1.0, "reducer": "none", "restorer": "none"}
    for keep in plan.keeps:
        for reducer in plan.reducers:
            for restorer in plan.restorers:
                yield {**base, "keep": keep, "reducer": reducer, "restorer": restorer}
        for rival in plan.rivals:
            yield {**base, "keep": keep, "reducer": next(iter(REDUCERS)), "restorer": rival}
    for fraction in plan.macs:
        for how in SIZES:
            yield {**base, "macs": fraction, "sizes": how, "reducer": "pivot", "restorer": "real 256"}


def result_of(case: Case, setting: Mapping[str, Any]) -> dict[str, Any]:
    if setting["reducer"] == "none":
        return {"accuracy": accuracy(case.model, case.test.images, case.test.labels)}
    if "keep" in setting:
        return case.measure(case.uniform(setting["keep"]), setting["reducer"], setting["restorer"])
    if setting["sizes"] == "target":
        return case.measure({}, setting["reducer"], setting["restorer"], target={"macs": setting["macs"]}, round_to=1)
    return case.measure(case.at_macs(setting["sizes"], setting["macs"]), setting["reducer"], setting["restorer"])


def run(images: int, records: Path, cases: Mapping[tuple[str, str], Plan] = CASES, only: int | None = None) -> None:
    for (network, scope), plan in cases.items():
        finished, limit = finished_keys(read_records(records)), count_tested(network, images)
        todo = [s for s in settings(network, scope, limit, plan) if key_of(EXPERIMENT, s) not in finished][:only]
        if not todo:
            continue
        case = Case(network, scope, limit, records.parent / "build")
        for setting in track(todo, network):
            append_record(records, Record(EXPERIMENT, setting, result_of(case, setting)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--networks", nargs="+", default=None, help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two measurements on 100 images, recorded nowhere")
    options = parser.parse_args()
    if not has_data():
        return
    torch.set_num_threads(options.threads)
    if options.smoke:
        smoke()
    else:
        wanted = {case: plan for case, plan in CASES.items() if not options.networks or case[0] in options.networks}
        run(options.images, options.records, wanted)


def smoke() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "smoke.jsonl"
        run(
            100,
            records,
            {("cifar10_resnet20_pad", INNER): Plan((0.5,), ("pivot",), ("noise",), rivals=("256 labels, trained",))},
        )
        for record in read_records(records):
            print(record.setting["reducer"], record.setting["restorer"], f"{record.result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
