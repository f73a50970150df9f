"""Claim: fusing channels keeps far more accuracy than pruning them, with no data and no training.

Per group and for the whole network, keep 0.9 to 0.3, pruned and fused, on the real CIFAR-10 test set (first --images
images). Setting of the authors' released code: l1 importance, `source` normalisation, biases left out of the
features, groups from the output backwards; `joint` records show our default order. Resumable: what is in the records
is not measured again. Records: benchmarks/records/datafree_cifar10.jsonl; tables: python benchmarks/tables.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _data import has_data
from rich.progress import track

from intrafusion import ChannelGraph, IntraFusion, ModelError, Recipe, Select, apply, decide, inspect
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy

RECORDS = Path(__file__).parent / "records" / "datafree_cifar10.jsonl"
EXPERIMENT = "datafree_cifar10"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
GROUP_KEEPS = (0.9, 0.7, 0.5, 0.3)
METHODS = {"pruned": Select(), "fused": IntraFusion(bias=False)}
NETWORKS = ("cifar10_resnet20", "cifar10_vgg11_bn", "cifar10_resnet20_pad")
WHOLE, INNER = "whole network", "block-inner channels"


def settings(network: str, graph: ChannelGraph, images: int) -> Iterator[dict[str, Any]]:
    """Whole network in both orders first, then its inner channels, then one group after another from the output."""
    base = {"network": network, "images": images}
    groups = sorted((g for g in graph.reducible if g.is_channel), key=lambda g: g.depth or 0)
    scopes = [(WHOLE, "backward", KEEPS), (WHOLE, "joint", KEEPS), (INNER, "backward", KEEPS)]
    scopes += [(g.name, "backward", GROUP_KEEPS) for g in groups]
    for scope, order, keeps in scopes:
        for keep in keeps:
            for method in METHODS:
                yield {**base, "group": scope, "order": order, "keep": keep, "method": method}


def scope_of(graph: ChannelGraph, group: str) -> dict[str, Any]:
    """Which layers a scope means; an inner group is one that no shortcut adds to, so one layer produces it."""
    if group == WHOLE:
        return {}
    if group == INNER:
        return {"include": [g.producers[0] for g in graph.reducible if len(g.producers) == 1]}
    return {"include": [graph[group].producers[0]]}


def measure(network: str, setting: dict[str, Any], model: Any, graph: ChannelGraph, data: zoo.Images) -> Record | None:
    """Accuracy after one compression; None where the scope leaves nothing to reduce."""
    start = time.perf_counter()
    recipe = Recipe.of(
        keep=setting["keep"],
        reducer=METHODS[setting["method"]],
        importance={"name": "l1", "folded": True},
        order=setting["order"],
        **scope_of(graph, setting["group"]),
    )
    example = zoo.example_input(network)
    small = apply(model, decide(model, graph, recipe), example, graph=graph)
    seconds = time.perf_counter() - start
    result = {
        "accuracy": accuracy(small.model, data.images, data.labels),
        "params": small.after.params,
        "macs": small.after.macs,
        "params_before": small.before.params,
        "macs_before": small.before.macs,
        "left_alone": sum(d.reason is not None for d in small.plan.decisions),
        "compress_s": round(seconds, 3),
    }
    return Record(EXPERIMENT, setting, result)


def run(network: str, images: int, records: Path, limit: int | None = None) -> None:
    model = zoo.build(network, pretrained=True).eval()
    data = zoo.load_data(network, "test", limit=images)
    graph = inspect(model, zoo.example_input(network))
    baseline = {
        "network": network,
        "images": images,
        "group": "none",
        "order": "none",
        "keep": 1.0,
        "method": "original",
    }
    finished = finished_keys(read_records(records))
    if key_of(EXPERIMENT, baseline) not in finished:
        append_record(records, Record(EXPERIMENT, baseline, {"accuracy": accuracy(model, data.images, data.labels)}))
    todo = [s for s in settings(network, graph, images) if key_of(EXPERIMENT, s) not in finished][:limit]
    for setting in track(todo, network):
        try:
            record = measure(network, setting, model, graph, data)
        except ModelError as error:
            print(f"{setting['group']}: {error}")
            continue
        if record is not None:
            append_record(records, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--limit", type=int, help="measure this many settings and stop")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="two compressions on 100 images, recorded nowhere")
    options = parser.parse_args()
    if not has_data():
        return
    if options.smoke:
        smoke()
        return
    for network in options.networks:
        run(network, options.images, options.records, options.limit)


def smoke() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "smoke.jsonl"
        run("cifar10_resnet20", 100, records, limit=2)
        for record in read_records(records):
            print(record.setting["method"], f"{record.result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
