"""Claim: a restored network needs the fewest steps, and few trained parameters, to get its accuracy back.

cifar10_resnet20 with all channels cut to keep 0.5, three starts: pruned (l1), fused (Intra-Fusion), and restored
(pivoting, least squares on 256 unlabelled training images). From each, for every number of steps a training of its own
(batch 128, AdamW, 10 % warm-up, linear decay to 0, flips and shifts, labels of 10,000 training images) of: the norms
and biases, the head too, low-rank changes too, or everything. Accuracy on the first --images test images (standard
error about 1 point at 70 % for 2,000), measured once, of the last weights: nothing is chosen.
Records: benchmarks/records/recovery.jsonl. Resumable: what is in the records is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _data import has_data
from rich.progress import track
from torch import Tensor, nn

from intrafusion import compress
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.train import Training, train_

RECORDS = Path(__file__).parent / "records" / "recovery.jsonl"
EXPERIMENT, NETWORK, KEEP = "recovery_cifar10", "cifar10_resnet20", 0.5
L1_FOLDED = {"name": "l1", "folded": True}  # of Theus et al. 2024
STARTS: dict[str, dict[str, Any]] = {
    "pruned": {"reducer": "select", "importance": L1_FOLDED, "restore": None},
    "fused": {"reducer": "intrafusion", "importance": L1_FOLDED, "restore": None},
    "restored": {"reducer": "pivot", "restore": "images"},
}
KINDS = {"norms+biases": 1e-2, "norms+biases+head": 1e-2, "norms+biases+lora": 3e-3, "full": 3e-3}  # learning rates
STEPS = (50, 200)
RANK = 4


class Case:
    """The network, its images, and the three starts."""

    def __init__(self, images: int, training: int) -> None:
        self.model: nn.Module = zoo.build(NETWORK, pretrained=True)
        self.example = zoo.example_input(NETWORK)
        self.test = zoo.load_data(NETWORK, "test", limit=images)
        self.train = zoo.load_data(NETWORK, "train", limit=training)
        self.starts: dict[str, tuple[nn.Module, float]] = {}

    @cached_property
    def original(self) -> float:
        return self.accuracy(self.model)

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.test.images, self.test.labels)

    def start(self, name: str) -> tuple[nn.Module, float]:
        """The smaller network, and the seconds that it took."""
        if name not in self.starts:
            begun = time.perf_counter()
            options = STARTS[name]
            images = self.train.images[:256] if options["restore"] else None
            small = compress(self.model, self.example, keep=KEEP, images=images, **options)
            self.starts[name] = small.model, time.perf_counter() - begun
        return self.starts[name]

    def measure(self, start: str, kind: str, steps: int) -> dict[str, Any]:
        if start == "original":
            return {"accuracy": self.original}
        model, seconds = self.start(start)
        result = {"params": sum(p.numel() for p in model.parameters()), "start_s": round(seconds, 1)}
        if not steps:
            return {**result, "accuracy": self.accuracy(model), "trained": 0}
        model = copy.deepcopy(model)
        how = Training(epochs=10**6, steps=steps, lr=KINDS[kind], trainable=kind, rank=RANK, alpha=RANK)
        begun = time.perf_counter()
        history = train_(model, self.train, how, augment=flipped_and_shifted)
        trained = {"trained": history.trained, "train_s": round(time.perf_counter() - begun, 1)}
        return {**result, **trained, "accuracy": self.accuracy(model)}


def flipped_and_shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and moved by up to four pixels over a border of zeros."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    corner = torch.randint(0, 9, (len(images), 2), generator=generator)
    rows, columns = (corner[:, k, None] + torch.arange(images.shape[2 + k]) for k in (0, 1))
    index = torch.arange(len(images))[:, None, None]
    return padded.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def settings(images: int, training: int, steps: Sequence[int], kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    base = {"network": NETWORK, "keep": KEEP, "test_images": images, "training_images": training}
    yield {**base, "start": "original", "trainable": "", "steps": 0}
    for start in STARTS:
        yield {**base, "start": start, "trainable": "", "steps": 0}
    for count in steps:
        for kind in kinds:
            for start in STARTS:
                yield {**base, "start": start, "trainable": kind, "steps": count, "lr": KINDS[kind]}


def run(
    records: Path, images: int, training: int, steps: Sequence[int], kinds: Sequence[str], only: int | None = None
) -> None:
    finished = finished_keys(read_records(records))
    todo = [s for s in settings(images, training, steps, kinds) if key_of(EXPERIMENT, s) not in finished][:only]
    if not todo:
        return
    case = Case(images, training)
    for setting in track(todo, NETWORK):
        result = case.measure(setting["start"], setting["trainable"], setting["steps"])
        append_record(records, Record(EXPERIMENT, setting, result))


def table(records: Path) -> str:
    """Markdown: a row per start and kind of parameters, a column per number of steps."""
    found = {(r.setting["start"], r.setting["trainable"], r.setting["steps"]): r.result for r in read_records(records)}
    steps = sorted({s for _, _, s in found if s})
    head = ["start", "trained", "parameters trained", "0 steps", *(f"{s} steps" for s in steps)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for start, kind in dict.fromkeys((a, k) for a, k, s in found if s):
        results = [found.get((start, "", 0)), *(found.get((start, kind, s)) for s in steps)]
        cells = ["" if r is None else f"{100 * r['accuracy']:.1f}" for r in results]
        trained = next(r["trained"] for r in results[1:] if r)
        lines.append(f"| {start} | {kind} | {trained:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--training", type=int, default=10_000)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--kinds", nargs="+", default=tuple(KINDS), choices=KINDS)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--table", action="store_true", help="print the table of the records and stop")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few images, recorded nowhere")
    options = parser.parse_args()
    if options.table:
        print(table(options.records))
        return
    if not has_data():
        return
    torch.set_num_threads(1)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder) / "smoke.jsonl"
            run(records, 100, 256, (1,), tuple(KINDS), only=5)
            print(table(records))
    else:
        run(options.records, options.images, options.training, options.steps, options.kinds)


if __name__ == "__main__":
    main()
