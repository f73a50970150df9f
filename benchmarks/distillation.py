"""Claim: a last step without labels, trained for what the original gives and what its layers read, keeps more than
solving the layers alone, in minutes.

Measures, on the first --images test images (standard error about 1 point for 2,000), all channels of the networks
at --keeps, pivoted: solved and then distilled, on 256 unlabelled training images or on 128 images made from the
network and their mirror images (no data). Steps are fixed, so that the numbers do not depend on the machine; what they
took is recorded, in seconds of the clock and of the processor. Everything was chosen on held-out training images.
Resumable: what is in the records is not measured again, and a distillation that was stopped goes on from its last 50
steps.
Records: benchmarks/records/distillation.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _data import count_tested, has_data, load_apart
from rich.progress import track
from rivals import NETWORKS as WHOLE

import intrafusion
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.restore import Distill

RECORDS = Path(__file__).parent / "records" / "distillation.jsonl"
EXPERIMENT = "distillation"
NETWORKS = (*WHOLE, "cifar10_vit")
KEEPS = (0.7, 0.5)
INPUTS = {"256 images": "images", "none": "synthetic"}


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    networks: Sequence[str]
    keeps: Sequence[float]
    inputs: Collection[str]
    images: int
    steps: int
    rate: float | None

    def list_settings(self) -> Iterator[dict[str, Any]]:
        for network, keep, inputs in itertools.product(self.networks, self.keeps, self.inputs):
            tested = count_tested(network, self.images)
            setting = {"network": network, "keep": keep, "test_images": tested, "inputs": inputs}
            yield {**setting, "distilled_steps": self.steps, "rate": self.rate or "chosen"}
            yield {**setting, "distilled_steps": 0}


def measure(setting: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    network = setting["network"]
    model, example = zoo.build(network, pretrained=True), zoo.example_input(network)
    test, seen = load_apart(network, setting["test_images"])
    given = seen.images if setting["inputs"] != "none" else None
    steps: list[Any] = [INPUTS[setting["inputs"]]]
    if setting["distilled_steps"]:
        chosen = {} if setting["rate"] == "chosen" else {"lr": setting["rate"]}
        steps.append(Distill(steps=setting["distilled_steps"], seconds=None, folder=str(folder), **chosen))
    start, work = time.perf_counter(), time.process_time()
    small = intrafusion.compress(model, example, setting["keep"], restore=steps, inputs=given)
    taken = time.perf_counter() - start, time.process_time() - work
    last = small.restored[-1]
    return {
        "accuracy": accuracy(small.model, test.images, test.labels),
        "held_out_error": last.error_after,
        "held_out_error_before": last.error_before,
        "note": last.note,
        "wall_s": round(taken[0], 1),
        "cpu_s": round(taken[1], 1),
        "macs": small.after.macs,
        "macs_before": small.before.macs,
    }


def run(asked: Asked, records: Path) -> None:
    finished = finished_keys(read_records(records))
    todo = [s for s in asked.list_settings() if key_of(EXPERIMENT, s) not in finished]
    for setting in track(todo, EXPERIMENT):
        append_record(records, Record(EXPERIMENT, setting, measure(setting, records.parent / "build")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=Distill().steps)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--rate", type=float, default=None, help="this learning rate: none are tried")
    parser.add_argument("--inputs", choices=INPUTS, nargs="+", default=[*INPUTS], help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two steps on 256 images, recorded nowhere")
    options = parser.parse_args()
    if not has_data():
        return
    torch.set_num_threads(options.threads)
    if options.smoke:
        smoke()
    else:
        what = options.networks, options.keeps, options.inputs, options.images, options.steps, options.rate
        run(Asked(*what), options.records)


def smoke() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "smoke.jsonl"
        run(Asked(NETWORKS[:3:2], KEEPS[-1:], ["256 images"], 100, 2, None), records)
        for record in read_records(records):
            print(record.setting["inputs"], record.setting["distilled_steps"], f"{record.result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
