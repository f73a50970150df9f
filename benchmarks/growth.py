"""Claim: restoring gains from every image it is given, needs few, and does not need those of the training set.

Measures, on the first --images test images (standard error 1 point near 70 % for 2,000), all channels of
cifar10_resnet20 at keep 0.7 and 0.5, as `compress` makes it by default with `inputs=`: 16, 64, 256 and 1,024 unlabelled
training images, each drawn anew for three seeds; as many CIFAR-100 images (32 x 32 photographs of other things), 256 at
a time; and, beside them, the strongest rival of rivals.py on the same images: GRAIL with statistics measured anew.
Resumable: what is in the records is not measured again. Records: benchmarks/records/growth.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _data import has_data
from rich.progress import track
from torch import Tensor, nn

import intrafusion
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy

RECORDS = Path(__file__).parent / "records" / "growth.jsonl"
EXPERIMENT = "growth"
NETWORK, OTHER = "cifar10_resnet20", "cifar100_resnet20"
KEEPS = (0.7, 0.5)
COUNTS = (16, 64, 256, 1024)
SOURCES = {"CIFAR-10": (NETWORK, "train", COUNTS), "CIFAR-100": (OTHER, "calibration", (256,))}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "GRAIL, re-estimated": {"reducer": "select", "importance": "l2", "restore": ["grail", "reestimate"]},
}


def settings(images: int, keeps: Sequence[float], counts: Sequence[int], seeds: int) -> Iterator[dict[str, Any]]:
    base = {"network": NETWORK, "test_images": images}
    for source, (_, _, own) in SOURCES.items():
        for count in (n for n in own if n in counts):
            for seed in range(seeds):
                for keep in keeps:
                    for method in METHODS:
                        yield {**base, "source": source, "inputs": count, "seed": seed, "keep": keep, "method": method}


def draw_images(source: str, count: int, seed: int) -> Tensor:
    """That many of the images that a source has, (n, 3, 32, 32), normalised for the network that is cut."""
    network, split, _ = SOURCES[source]
    images = zoo.load_data(network, split).images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    if len(order) < count:
        raise SystemExit(f"{source}: {count} images asked for, {len(images)} there")
    own, theirs = (
        [torch.tensor(values).view(-1, 1, 1) for values in (known.mean, known.std)]
        for known in (zoo.entry(NETWORK).normalisation, zoo.entry(network).normalisation)
    )
    return (images[order] * theirs[1] + theirs[0] - own[0]) / own[1]


def measure(model: nn.Module, test: zoo.Images, setting: Mapping[str, Any]) -> dict[str, Any]:
    images = draw_images(setting["source"], setting["inputs"], setting["seed"])
    options = METHODS[setting["method"]]
    small = intrafusion.compress(model, zoo.example_input(NETWORK), setting["keep"], inputs=images, **options)
    return {"accuracy": accuracy(small.model, test.images, test.labels), "params": small.after.params}


def run(records: Path, wanted: Sequence[dict[str, Any]]) -> None:
    finished = finished_keys(read_records(records))
    model = zoo.build(NETWORK, pretrained=True)
    for setting in track([s for s in wanted if key_of(EXPERIMENT, s) not in finished], NETWORK):
        test = zoo.load_data(NETWORK, "test", limit=setting["test_images"])
        append_record(records, Record(EXPERIMENT, setting, measure(model, test, setting)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="16 and 256 images once, recorded nowhere")
    options = parser.parse_args()
    if not has_data():
        return
    torch.set_num_threads(1)
    if not options.smoke:
        run(options.records, list(settings(options.images, KEEPS, COUNTS, options.seeds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "smoke.jsonl"
        run(records, list(settings(50, KEEPS[:1], COUNTS[:1], 1)))
        for record in read_records(records):
            print(record.setting["method"], record.result)


if __name__ == "__main__":
    main()
