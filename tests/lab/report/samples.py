"""Records as experiments write them, with numbers that are easy to check."""

from __future__ import annotations

from collections.abc import Sequence

from intrafusion.lab.bench import Record

ENVIRONMENT = {
    "time": "2026-01-02T03:04:05+00:00",
    "python": "3.11.7",
    "versions": {"torch": "2.9", "numpy": "2.0"},
    "machine": "x86_64",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "command": "intrafusion experiment data-free -o r.jsonl",
}
SETTING = {"network": "net", "weights": "0123abcd", "images": 100, "criterion": "l1", "order": "joint", "seed": 0}


def reduction(
    group: str, keep: float, method: str, accuracy: float, experiment: str = "data-free", **setting: object
) -> Record:
    result = {
        "accuracy": accuracy,
        "params": round(1000 * keep**2),
        "macs": round(5000 * keep**2),
        "params_before": 1000,
        "macs_before": 5000,
        "sizes": {"conv1": [16, round(16 * keep)], "conv2": [32, round(32 * keep)]},
        "recipe": f"keep: {keep}\nreducer: {method}\n",
    }
    if group != "whole network":
        result["sizes"] = {group: [16, round(16 * keep)]}
    return Record(
        experiment, {**SETTING, "group": group, "keep": keep, "method": method, **setting}, result, ENVIRONMENT
    )


def original(experiment: str = "data-free", network: str = "net") -> Record:
    setting = {
        "network": network,
        "weights": "0123abcd",
        "images": 100,
        "group": "none",
        "keep": 1.0,
        "method": "original",
    }
    return Record(experiment, setting, {"accuracy": 0.9, "params": 1000, "macs": 5000}, ENVIRONMENT)


def drifting(method: str, counts: Sequence[int], mean: float) -> Record:
    result = {"mean": mean, "median": mean, "edges": [0.0, 1.0, 2.0, 3.0], "counts": list(counts), "accuracy": 0.5}
    return Record("output-drift", {**SETTING, "group": "conv1", "keep": 0.5, "method": method}, result, ENVIRONMENT)


def row_of_plane(row: int, points: int = 3) -> Record:
    result = {
        "y": float(row),
        "x": [0.0, 1.0, 2.0],
        "accuracy": [0.1 * (row + i) for i in range(3)],
        "loss": [1.0 * row, 2.0, 3.0],
        "corners": [[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]],
        "corner_names": ["original", "select", "intrafusion"],
        "recipe": "keep: 0.7\n",
    }
    both = {"group": "whole network", "keep": 0.7, "method": "select | intrafusion", "points": points, "row": row}
    return Record("landscape", {**SETTING, **both}, result, ENVIRONMENT)


def trained(method: str, end: float) -> Record:
    result = {
        "accuracy": end,
        "accuracy_reduced": 0.3,
        "stages": [
            {"stage": "original", "epoch": 0, "accuracy": 0.9},
            {"stage": "step 1: reduced", "epoch": 0, "accuracy": 0.3},
            {"stage": "fine-tuned", "epoch": 1, "accuracy": end},
        ],
        "params": 250,
        "params_before": 1000,
    }
    setting = {**SETTING, "group": "whole network", "keep": 0.5, "method": method}
    return Record("fine-tune", setting, result, ENVIRONMENT)


def some_of_every_experiment() -> list[Record]:
    found = [original()]
    for keep, pruned, fused in ((0.9, 0.8, 0.85), (0.5, 0.2, 0.6)):
        for group in ("whole network", "conv1", "conv2"):
            found.append(reduction(group, keep, "select", pruned))
            found.append(reduction(group, keep, "intrafusion", fused - (0.5 if group == "conv2" else 0)))
    uniform, softmax = (f"intrafusion:source_marginal={name}" for name in ("uniform", "softmax"))
    for i, network in enumerate(("net", "other", "third")):
        found.append(reduction("conv1", 0.5, uniform, 0.5 + 0.01 * i, "marginals", network=network))
        found.append(reduction("conv1", 0.5, softmax, 0.6 + 0.01 * i, "marginals", network=network))
    found += [trained("select", 0.7), trained("intrafusion", 0.8)]
    found += [drifting("select", (10, 60, 20, 10), 1.7), drifting("intrafusion", (50, 50, 0, 0), 1.0)]
    return found + [row_of_plane(row) for row in range(3)]
