"""Claim: tracing costs about what Torch-Pruning's dependency graph costs; what a whole compression costs beside it.

Ratios of medians, both sides measured in turn in the same run on the same network and input:
  trace     intrafusion.trace (labels, groups, the forward pass included) against DependencyGraph.build_dependency plus
            get_all_groups (its forward pass included).
  inspect   intrafusion.inspect (the trace and the proof of every group, in float64, on two inputs) against the same,
            and the median of this ratio over all networks in families/ of which the peer gives a graph in time.
These two, and `restore`, in processor time with one thread; the others in time that passes.
  compress  intrafusion.compress (trace, proof by permutation, transport, surgery, second trace) and its share without
            transport, against Torch-Pruning's MagnitudePruner at the same ratio, on ResNet-18 at full width.
  choose    the maps of the reducer `pivot` without data (noise, its forward pass, all groups) against those of
            `intrafusion` (exact transport), on ResNet-18 at full width and on ResNet-50; and the closed form that
            makes up, without data or forward pass, for what that transport merged, against the transport.
  restore   least squares on 256 images, and on noise, against one forward pass of the original on 256 images.
Peers come with `pip install intrafusion[benchmarks,timm]`. Records: benchmarks/records/speed.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from families.family import Family
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.cli.models import resolve
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record
from intrafusion.network.inputs import Inputs
from intrafusion.restore import ClosedForm, LeastSquares, Noise, Restorer
from intrafusion.restore.steps import calibrate_for
from intrafusion.trace import trace

RECORDS = Path(__file__).parent / "records" / "speed.jsonl"
TRACED = {
    "zoo:cifar10_resnet20": 32, "timm:resnet50": 224, "timm:tf_efficientnet_lite0": 224, "timm:densenet121": 224,
    "timm:vit_tiny_patch16_224": 224,
}  # fmt: skip
CHOSEN = {"zoo:resnet18": 32, "timm:resnet50": 224}  # and pixels
RESTORED = {"zoo:cifar10_resnet20": 32, "timm:resnet50": 224, "timm:tf_efficientnet_lite0": 224}
LARGE, BATCH = 224, 32  # pixels from which a restoration is timed once, without warming up; images of a forward pass
SMOKE = {"zoo:resnet18": 32}
SMOKE_FAMILIES = ("torchvision:vit", "by hand:U-Net")
LIMIT_S = 5  # of processor time, for the peer's graph of one network


def seconds(action: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    action()
    return clock() - start


def compare(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = True,
) -> dict[str, Any]:
    """Medians of both, in turn, after one warm-up of each."""
    if warm:
        ours()
        theirs()
    pairs = [(seconds(ours, clock), seconds(theirs, clock)) for _ in range(repeats)]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ours_s": round(a, 4), "theirs_s": round(b, 4), "ratio": round(a / b, 2), "repeats": repeats}


def their_graph(model: nn.Module, x: Any, transform: Callable[[Any], Any] = lambda out: out) -> list[Any]:
    import torch_pruning as tp

    return list(tp.DependencyGraph().build_dependency(model, x, output_transform=transform).get_all_groups())


def their_pruner(model: nn.Module, x: Tensor, keep: float) -> None:
    import torch_pruning as tp

    model = copy.deepcopy(model)
    heads: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    importance = tp.importance.MagnitudeImportance(p=1)
    tp.pruner.MagnitudePruner(model, x, importance=importance, pruning_ratio=1 - keep, ignored_layers=heads).step()


def build(name: str) -> nn.Module:
    kind, _, short = name.partition(":")
    return (zoo.build(short) if kind == "zoo" else resolve(name).build()).eval()


def trace_records(networks: Mapping[str, int], repeats: int) -> list[Record]:
    records, clock = [], time.process_time
    for name, pixels in networks.items():
        model, x = build(name), torch.randn(1, 3, pixels, pixels)
        with torch.no_grad():
            model(x)
            forward = min(seconds(lambda m=model, v=x: m(v), clock) for _ in range(3))
        for what, ours in (("trace", trace), ("inspect", intrafusion.inspect)):
            found = compare(
                lambda m=model, v=x, f=ours: f(m, v), lambda m=model, v=x: their_graph(m, v), repeats, clock
            )
            setting = {"what": what, "network": name, "pixels": pixels}
            records.append(Record("speed", setting, {**found, "forward_s": round(forward, 4)}))
    return records


def family_records(names: Iterable[str], repeats: int) -> list[Record]:
    """One row: the median of all."""
    found = [one for name in names if (one := compare_family(FAMILIES[name], repeats)) is not None]
    middle = {key: round(statistics.median(one[key] for one in found), 4) for key in ("ours_s", "theirs_s", "ratio")}
    ratios = [one["ratio"] for one in found]
    setting = {"what": "inspect", "network": "families, median", "pixels": ""}
    spread = {"families": len(found), "lowest": min(ratios), "highest": max(ratios)}
    return [Record("speed", setting, {**middle, **spread, "repeats": repeats})]


class _TooSlow(BaseException):  # nothing inside is to catch it
    pass


def _stop(*_: Any) -> None:
    raise _TooSlow


def compare_family(family: Family, repeats: int) -> dict[str, Any] | None:
    """None where it cannot be built here, or the peer has no graph of it, or none in time."""
    torch.manual_seed(0)
    signal.signal(signal.SIGPROF, _stop)
    add_up = lambda out: sum(t.sum() for t in family.wanted(out) if t.is_floating_point())  # noqa: E731
    try:
        model, x = family.build().eval(), family.inputs()
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        their_graph(model, x, add_up)
        signal.setitimer(signal.ITIMER_PROF, 0)
        return compare(
            lambda: intrafusion.inspect(model, x), lambda: their_graph(model, x, add_up), repeats, time.process_time
        )
    except (Exception, _TooSlow) as error:
        print(f"{family.name}: left out: {type(error).__name__}: {str(error)[:80]}")
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def compress_records(repeats: int, keep: float = 0.5) -> list[Record]:
    model, x = zoo.build("resnet18").eval(), zoo.example_input("resnet18")
    records = []
    for reducer in ("intrafusion", "select"):
        found = compare(
            lambda r=reducer: intrafusion.compress(model, x, keep=keep, reducer=r, restore=None),
            lambda: their_pruner(model, x, keep),
            repeats,
        )
        setting = {
            "what": "compress",
            "network": "zoo:resnet18",
            "reducer": reducer,
            "keep": keep,
            "pixels": x.shape[-1],
        }
        records.append(Record("speed", setting, found))
    return records


def choice_records(networks: Mapping[str, int], repeats: int, keep: float = 0.5) -> list[Record]:
    """What the data-free choice of channels with its unmerge costs beside the transport that it stands for."""
    records = []
    for name, pixels in networks.items():
        model, x = build(name), Inputs.of(torch.randn(1, 3, pixels, pixels))
        graph = intrafusion.inspect(model, x)

        def choose(reducer: str, model: nn.Module = model, graph: Any = graph, x: Inputs = x) -> None:
            recipe = Recipe.of(keep=keep, reducer=reducer, restore=None)
            intrafusion.decide(model, graph, recipe, x, calibration=calibrate_for(model, graph, x, recipe))

        found = compare(lambda c=choose: c("pivot"), lambda c=choose: c("intrafusion"), repeats)
        setting = {"what": "choose: pivot, peer intrafusion", "network": name, "keep": keep, "pixels": pixels}
        records.append(Record("speed", setting, found))
        plan = intrafusion.decide(model, graph, Recipe.of(keep=keep, reducer="intrafusion", restore=None), x)
        merged = iter([intrafusion.apply(model, plan, x, graph=graph) for _ in range(repeats + 1)])
        found = compare(
            lambda m=model, g=graph, merged=merged: ClosedForm()(next(merged), m, g),
            lambda c=choose: c("intrafusion"),
            repeats,
        )
        setting = {"what": "restore: closed_form, peer intrafusion", "network": name, "keep": keep, "pixels": pixels}
        records.append(Record("speed", setting, found))
    return records


def restore_records(networks: Mapping[str, int], repeats: int, count: int = 256) -> list[Record]:
    """Random weights, halved: what the weights are does not change the time."""
    records = []
    for name, pixels in networks.items():
        model, x = build(name), torch.randn(1, 3, pixels, pixels)
        images = torch.randn(count, *x.shape[1:])
        graph = intrafusion.inspect(model, x)
        plan = intrafusion.decide(model, graph, Recipe.of(keep=0.5, reducer="select"))
        restorers: dict[str, Restorer] = {"least_squares": LeastSquares(), "noise": Noise(images=count)}
        for restorer in restorers if pixels < LARGE else ("least_squares",):
            small = intrafusion.apply(model, plan, x, graph=graph)
            with torch.no_grad():
                found = compare(
                    lambda r=restorers[restorer], s=small, m=model, g=graph, i=images: r(
                        s, m, g, i if r.needs_data else None
                    ),
                    lambda m=model, i=images: [m(batch) for batch in i.split(BATCH)],
                    repeats if pixels < LARGE else 1,
                    time.process_time,
                    warm=pixels < LARGE,
                )
            setting = {"what": f"restore: {restorer}", "network": name, "images": count, "pixels": pixels}
            records.append(Record("speed", setting, found))
    return records


def on_one_thread(run: Callable[[], list[Record]]) -> list[Record]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--only", choices=("trace", "families", "compress", "choose", "restore"))
    parser.add_argument("--smoke", action="store_true", help="one small network, one repeat, recorded nowhere")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peer warns about parameters that it cannot place
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        print("skipped: torch-pruning is not installed; pip install intrafusion[benchmarks,timm].")
        return
    smoke, repeats = options.smoke, 1 if options.smoke else options.repeats
    parts: dict[str, Callable[[], list[Record]]] = {
        "trace": lambda: on_one_thread(lambda: trace_records(SMOKE if smoke else TRACED, repeats)),
        "families": lambda: on_one_thread(lambda: family_records(SMOKE_FAMILIES if smoke else FAMILIES, repeats)),
        "compress": lambda: compress_records(repeats),
        "choose": lambda: choice_records(SMOKE if smoke else CHOSEN, repeats),
        "restore": lambda: on_one_thread(
            lambda: restore_records(SMOKE, 1, 8) if smoke else restore_records(RESTORED, repeats)
        ),
    }
    records = [record for name, run in parts.items() if options.only in (None, name) for record in run()]
    for record in records:
        print(record.setting, record.result)
        if not options.smoke:
            append_record(options.records, record)


if __name__ == "__main__":
    main()
