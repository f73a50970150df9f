"""Claim: restored networks keep more than published methods leave, run as their authors run them, on the same data.

Whole networks, every group at round(n * keep) channels, accuracy on the first --images test images (standard error 1.5
points at 70 % for 1,000), nothing trained. Torch-Pruning is the installed package itself (MagnitudePruner with its
default MagnitudeImportance, the same sizes); Intra-Fusion in the setting of the released code (l1, norms folded, biases
left out, groups one after another from the output); folding as released (k-means of weights as they are, gamma and beta
beside them), alone, with Fold-AR and with statistics measured anew; GRAIL and LBYL on the channels that l2 keeps;
variance-based pruning; FLAP's score and bias. Then the default of `compress` without data, in seconds (noise), and on
the images, 64 or 256. "256 images" are training images (of ImageNet: validation images) that are not tested on, the
same for all, without labels. LBYL's ridge (.01, .1, 1 or 10) was chosen on unseen training images, nothing else was.
Transformers are measured in attention.py, larger networks in imagenet.py.
Resumable: what is in the records is not measured again. Records: benchmarks/records/rivals.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _data import count_tested, has_data, load_apart
from _reestimate import reestimate_
from rich.progress import track
from torch import nn

from intrafusion import Compressed, IntraFusion, Recipe
from intrafusion.inspection import inspect
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.size import size_of
from intrafusion.network.held_out import Split
from intrafusion.network.inputs import Inputs
from intrafusion.pipeline import reduce_and_restore
from intrafusion.restore import Calibration, calibrate, get_restorer

RECORDS = Path(__file__).parent / "records" / "rivals.jsonl"
EXPERIMENT = "rivals"
NETWORKS = (
    "cifar10_resnet20",
    "cifar10_resnet32",
    "cifar100_resnet20",
    "cifar10_vgg11_bn",
    "cifar10_densenet100",
    "imagenet_mobilenetv1_025",
)
KEEPS = (0.9, 0.8, 0.7, 0.5)
THEIRS = "Torch-Pruning"
IMAGES, FEW = "256 images", "64 images"
LEFT = "what is left"  # no method: the shares of parameters and multiply-accumulates that all of them leave


@dataclass(frozen=True)
class Method:
    """A row of the table: options of a recipe, restorers in order, and what they look at."""

    options: Mapping[str, Any]
    steps: tuple[str, ...] = ()
    sees: str = "no data"


_L2 = {"reducer": "select", "importance": "l2"}
_INTRAFUSION = {
    "reducer": IntraFusion(bias=False), "importance": {"name": "l1", "folded": True}, "order": "backward"
}  # fmt: skip
_AGAIN = ("reestimate",)
METHODS: Mapping[str, Method] = {
    THEIRS: Method({}),
    "Intra-Fusion": Method(_INTRAFUSION),
    "folding": Method({"reducer": "fold"}),
    "folding, Fold-AR": Method({"reducer": "fold"}, ("closed_form",)),
    "LBYL": Method(_L2, ("lbyl",)),
    "ours": Method({"restore": "noise"}),
    f"{THEIRS}, re-estimated": Method({}, _AGAIN, IMAGES),
    "Intra-Fusion, re-estimated": Method(_INTRAFUSION, _AGAIN, IMAGES),
    "folding, re-estimated": Method({"reducer": "fold"}, _AGAIN, IMAGES),
    "LBYL, re-estimated": Method(_L2, ("lbyl", *_AGAIN), IMAGES),
    "GRAIL": Method(_L2, ("grail",), IMAGES),
    "GRAIL, re-estimated": Method(_L2, ("grail", *_AGAIN), IMAGES),
    "variance-based": Method({"reducer": "variance"}, (), IMAGES),
    "variance-based, re-estimated": Method({"reducer": "variance"}, _AGAIN, IMAGES),
    "FLAP, re-estimated": Method({"reducer": "flap"}, _AGAIN, IMAGES),
    "ours, on 64 images": Method({"restore": "images"}, (), FEW),
    "ours, on images": Method({"restore": "images"}, (), IMAGES),
}


class Case:
    """One network with everything that is computed once for it."""

    def __init__(self, network: str, tested: int) -> None:
        self.model: nn.Module = zoo.build(network, pretrained=True)
        self.example = Inputs.of(zoo.example_input(network))
        self.graph = inspect(self.model, self.example)
        self.test, seen = load_apart(network, tested)
        self.images = seen.images
        self.known: dict[str, Calibration] = {}

    def sizes(self, keep: float) -> dict[str, int]:
        return {g.name: max(1, round(g.size * keep)) for g in self.graph.reducible if g.is_channel}

    def measure(self, name: str, keep: float) -> dict[str, Any]:
        if name == LEFT:
            before, after = (size_of(m, self.example) for m in (self.model, self.compress(Method(_L2), keep).model))
            return {"parameters": after.params / before.params, "MACs": after.macs / before.macs}
        model = self.model if name == "original" else self.reduce(METHODS[name], keep, by_them=name.startswith(THEIRS))
        params = sum(p.numel() for p in model.parameters())
        return {"accuracy": accuracy(model, self.test.images, self.test.labels), "params": params}

    def reduce(self, method: Method, keep: float, *, by_them: bool) -> nn.Module:
        if by_them:
            small = prune_by_them(self.model, self.example, self.fractions(keep))
            return reestimate_(small, self.images, 128) if method.steps else small
        small = self.compress(method, keep)
        for step in method.steps:
            get_restorer(step)(small, self.model, self.graph, self.images)
        return small.model

    def compress(self, method: Method, keep: float) -> Compressed:
        """By our engine, before the restorers."""
        sizes = self.sizes(keep)
        shares = {g.name: sizes[g.name] / g.size for g in self.graph.reducible if g.name in sizes}
        recipe = Recipe.of(**{"keep": shares, "restore": None, **method.options})
        seen = self.calibration(method) if recipe.needs_moments else None
        images = Split(None if seen is None else seen.images)
        return reduce_and_restore(recipe, self.model, self.graph, self.example, images, calibration=seen)

    def calibration(self, method: Method) -> Calibration:
        if method.sees not in self.known:
            images = {IMAGES: self.images, FEW: self.images[:64]}.get(method.sees)
            level = "noise" if images is None else "images"
            self.known[method.sees] = calibrate(self.model, self.example, level, images)
        return self.known[method.sees]

    def fractions(self, keep: float) -> dict[str, float]:
        """The share that goes, by the name of each layer that gives channels; a little less, as they round down."""
        sizes = self.sizes(keep)
        return {
            layer: 1 - (sizes[g.name] + 0.01) / g.size
            for g in self.graph.reducible
            if g.name in sizes
            for layer in g.producers
        }


def prune_by_them(model: nn.Module, example: Inputs, fractions: Mapping[str, float]) -> nn.Module:
    """A copy that Torch-Pruning has pruned."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    ratios: Any = {small.get_submodule(name): ratio for name, ratio in fractions.items()}
    heads: Any = [m for n, m in small.named_modules() if isinstance(m, nn.Linear) and n not in fractions]
    how: dict[str, Any] = {"importance": tp.importance.MagnitudeImportance(), "ignored_layers": heads}
    given: Any = example.args
    tp.pruner.MagnitudePruner(small, given, pruning_ratio_dict=ratios, pruning_ratio=0.0, **how).step()
    return small.eval()


def settings(network: str, images: int, keeps: Sequence[float], methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    base = {"network": network, "test_images": images}
    yield {**base, "keep": 1.0, "method": "original"}
    for keep in keeps:
        for method in (LEFT, *methods):
            yield {**base, "keep": keep, "method": method}


def run(
    networks: Sequence[str], images: int, keeps: Sequence[float], records: Path, methods: Sequence[str] = (*METHODS,)
) -> None:
    for network in networks:
        finished, tested = finished_keys(read_records(records)), count_tested(network, images)
        todo = [s for s in settings(network, tested, keeps, methods) if key_of(EXPERIMENT, s) not in finished]
        if not todo:
            continue
        case = Case(network, tested)
        for setting in track(todo, network):
            result = case.measure(setting["method"], setting["keep"])
            append_record(records, Record(EXPERIMENT, setting, result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS, metavar="METHOD", help="rows")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="every method once on 50 images, recorded nowhere")
    options = parser.parse_args()
    if not has_data():
        return
    torch.set_num_threads(1)
    if not options.smoke:
        run(options.networks, options.images, options.keeps, options.records, options.methods)
        return
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "smoke.jsonl"
        run(NETWORKS[:1], 50, (0.9,), records)
        for record in read_records(records):
            print(record.setting["method"], record.result)


if __name__ == "__main__":
    main()
