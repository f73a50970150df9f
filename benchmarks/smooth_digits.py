"""Claim: penalties on the weights while training make layers of low rank cost less accuracy afterwards.

digits_resnet trained from scratch (10 epochs, SGD) with no penalty, the nuclear norm, or first or second differences of
filters, for several seeds; then factorised by the "global" rule to fractions of the parameters of its layers, without
data or fine-tuning. The weight of each penalty is the largest of --weights whose validation accuracy before factorising
is within one point of the best; only the test accuracy (360 images, standard error 2 points at 85 %) of that weight is
shown.
Records: benchmarks/records/smooth.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track
from torch import nn

from intrafusion.factorize import Global, Smooth, factorize
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.train import Training, train_

RECORDS = Path(__file__).parent / "records" / "smooth.jsonl"
EXPERIMENT, NETWORK = "smooth_digits", "digits_resnet"
PENALTIES = ("none", "nuclear", "first", "second")
WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FRACTIONS = (1.0, 0.5, 0.4, 0.3, 0.2)
SEEDS = (0, 1)
TOLERANCE = 0.01


def trained(penalty: str, weight: float, seed: int, epochs: int) -> nn.Module:
    model = zoo.build(NETWORK, seed=seed)
    how = Training(epochs=epochs, batch_size=64, optimizer="sgd", lr=0.05, decay="cosine", warmup=0.0, seed=seed)
    term = None if penalty == "none" else Smooth(**{penalty: weight})
    train_(model, zoo.load_data(NETWORK, "train"), how, penalty=term)
    return model


def measured(model: nn.Module, split: str, fractions: Sequence[float]) -> dict[str, float]:
    data, x = zoo.load_data(NETWORK, split), zoo.example_input(NETWORK)
    found = {}
    for fraction in fractions:
        small = model if fraction == 1.0 else factorize(model, x, Global(fraction)).model
        found[f"{split}_{fraction:g}"] = accuracy(small, data.images, data.labels)
    return found


def run(records: Path, weights: Sequence[float], seeds: Sequence[int], epochs: int) -> None:
    settings: list[dict[str, Any]] = [
        {"network": NETWORK, "penalty": penalty, "weight": weight, "seed": seed, "epochs": epochs}
        for penalty in PENALTIES
        for weight in ((0.0,) if penalty == "none" else weights)
        for seed in seeds
    ]
    finished = finished_keys(read_records(records))
    for setting in track([s for s in settings if key_of(EXPERIMENT, s) not in finished], NETWORK):
        model = trained(setting["penalty"], setting["weight"], setting["seed"], epochs)
        result = {**measured(model, "validation", (1.0,)), **measured(model, "test", FRACTIONS)}
        append_record(records, Record(EXPERIMENT, setting, result))


def table(records: Path) -> str:
    """Markdown: mean test accuracy over the seeds; the weight of each penalty is chosen on validation images."""
    found: dict[tuple[str, float], list[dict[str, float]]] = {}
    for r in read_records(records):
        found.setdefault((r.setting["penalty"], r.setting["weight"]), []).append(dict(r.result))
    average = {key: {k: mean(x[k] for x in results) for k in results[0]} for key, results in found.items()}
    best = max(result["validation_1"] for result in average.values())
    lines = [f"| penalty | weight | {' | '.join(f'{f:.0%}' for f in FRACTIONS)} |", f"|{'---|' * (2 + len(FRACTIONS))}"]
    for penalty in dict.fromkeys(name for name, _ in average):
        own = {w: result for (name, w), result in average.items() if name == penalty}
        good = [w for w, result in own.items() if result["validation_1"] >= best - TOLERANCE] or [min(own)]
        cells = [f"{100 * own[max(good)][f'test_{f:g}']:.1f}" for f in FRACTIONS]
        lines.append(f"| {penalty} | {max(good):g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--table", action="store_true", help="print the table of the records and stop")
    parser.add_argument("--smoke", action="store_true", help="one epoch of each, recorded nowhere")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        print(table(options.records))
    elif options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder) / "smoke.jsonl", (1e-3,), (0,), 1)
            print(table(Path(folder) / "smoke.jsonl"))
    else:
        run(options.records, options.weights, options.seeds, 10)


if __name__ == "__main__":
    main()
