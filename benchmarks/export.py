"""Claim: what can be exported and compiled before compression can be after it, in files that were read back.

For every network of the zoo, and one of each family of the compatibility table (`families/`, small, random weights),
before and after keep 0.5 without restoring: whether ONNX (in onnxruntime) and a program of torch.export give its
outputs on inputs that they were not made from, the size of the files, and how often torch.compile breaks its graph.
What the original fails at is told apart from what compression broke. `--latency` times networks of the zoo instead, in
eager mode, compiled and in onnxruntime, 1, 8 and 32 images: processor time of one thread, which waiting for other
programs does not enter, medians of original and smaller one in turn. `--mode` picks some of the modes.
Each network has a process and a limit of processor time of its own. Records: benchmarks/records/export.jsonl; what is
recorded is not measured again, unless `--again`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from compatibility import measure_apart
from families import FAMILIES
from families.family import Skipped, randomise_
from torch import nn

import intrafusion
from intrafusion import ModelError
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.network.inputs import Inputs
from intrafusion.network.sources import import_transformers

RECORDS = Path(__file__).parent / "records" / "export.jsonl"
KEEP, LIMIT_S, LATENCY_LIMIT_S = 0.5, 240, 1500
PLACE = re.compile(r"/\S*/(?=[^/\s]+/[^/\s]+\.py)")  # of a file: its folder is enough
ENDINGS = (".onnx", ".pt2")
BATCHES = (1, 8, 32)
TURNS, WARM, LONGEST_S = 40, 3, 12.0  # of both networks; no more of them than this long, but eight
TIMED = ("cifar10_resnet20", "cifar10_vgg11_bn", "cifar10_vit", "imagenet_mobilenetv1_025", "resnet50")
SMOKE = ("zoo:digits_resnet", "by hand:U-Net")
Subject = tuple[nn.Module, Inputs]


def open_network(name: str) -> Subject:
    kind, _, rest = name.partition(":")
    if kind == "zoo":
        return zoo.build(rest), Inputs.of(zoo.example_input(rest, batch=2))
    torch.manual_seed(0)
    family = FAMILIES[name]
    try:
        return randomise_(family.build().eval().float()), Inputs.of(family.inputs())
    except Exception as error:
        raise Skipped(f"cannot be built here: {error}") from error


def reduce(model: nn.Module, inputs: Inputs) -> nn.Module | None:
    """The network at half of its channels; None where nothing can be reduced."""
    try:
        return intrafusion.compress(model, inputs, keep=KEEP, restore=None, progress=False).model
    except ModelError as error:
        if "no channel group to reduce" not in str(error):
            raise
        return None


def measure(name: str) -> dict[str, Any]:
    model, inputs = open_network(name)
    small = reduce(model, inputs)
    found = {"before": measure_one(model, inputs)}
    return found if small is None else {**found, "after": measure_one(small, inputs)}


def measure_one(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    breaks = count_breaks(model, inputs)
    found: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters()), "breaks": breaks}
    with tempfile.TemporaryDirectory() as place:
        for ending in ENDINGS:
            try:
                told = intrafusion.export(model, inputs, Path(place) / f"net{ending}")
            except ModelError as error:
                found[ending] = {"failed": PLACE.sub("", str(error))[:300]}
            else:
                size = told.path.stat().st_size
                found[ending] = {"difference": told.difference, "any_batch": told.any_batch, "bytes": size}
    return found


def count_breaks(model: nn.Module, inputs: Inputs) -> int | str:
    """How often torch.compile has to leave the graph, or why it does not start."""
    torch._dynamo.reset()
    given = inputs.copied()
    try:
        with torch.no_grad():
            return torch._dynamo.explain(model)(*given.args, **(given.kwargs or {})).graph_break_count
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


# ---- latency ---------------------------------------------------------------------------------------------------------


def measure_latency(subject: tuple[str, str]) -> dict[str, Any]:
    """Median milliseconds of the original and the smaller network by batch, in one mode, and the share of the MACs.

    Of processor time, of the one thread that computes.
    """
    name, mode = subject[0].partition(":")[2], subject[1]
    model = zoo.build(name)
    example = zoo.example_input(name, batch=2)
    small = intrafusion.compress(model, example, keep=KEEP, restore=None, progress=False)
    found: dict[str, Any] = {"macs": small.after.macs / small.before.macs, "macs_before": small.before.macs / 2}
    for batch in BATCHES:
        inputs = zoo.example_input(name, batch=batch)
        found[str(batch)] = time_turns([MODES[mode](network, inputs) for network in (model, small.model)], inputs)
    return found


def run_eager(model: nn.Module, _: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    return model


def run_compiled(model: nn.Module, _: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def run_onnx(model: nn.Module, example: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as place:
        path = intrafusion.export(model, example, Path(place) / "net.onnx").path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # so that it computes in the thread that calls
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


MODES: Mapping[str, Callable[[nn.Module, torch.Tensor], Callable[[torch.Tensor], Any]]] = {
    "eager": run_eager,
    "compiled": run_compiled,
    "onnxruntime": run_onnx,
}


@torch.inference_mode()
def time_turns(runs: list[Callable[[torch.Tensor], Any]], inputs: torch.Tensor) -> list[float]:
    taken: list[list[float]] = [[] for _ in runs]
    begun = time.thread_time()
    for turn in range(TURNS + WARM):
        for run, times in zip(runs, taken, strict=True):
            start = time.thread_time()
            run(inputs)
            if turn >= WARM:
                times.append(1e3 * (time.thread_time() - start))
        if turn >= WARM + 8 and time.thread_time() - begun > LONGEST_S:
            break
    return [statistics.median(times) for times in taken]


# ---- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["*"], help="names or patterns, all by default")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--mode", choices=list(MODES), action="append", help="of the latency; all by default")
    parser.add_argument("--again", action="store_true", help="measure what is recorded, too; the last record counts")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="two small networks, recorded nowhere")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import_transformers()
    load_exporters()
    finished = set() if options.again or options.smoke else finished_keys(read_records(options.records))
    broken = []
    for record, measuring, subject in list_work(options):
        name = record.setting["network"]
        if record.key in finished or not any(fnmatch(name, p) for p in options.networks):
            continue
        found = measure_apart(measuring, subject, LATENCY_LIMIT_S if options.latency else LIMIT_S)
        print(subject, found, flush=True)
        broken += [name] if "before" in found and list_broken(found) else []
        if not options.smoke:
            append_record(options.records, Record(record.experiment, record.setting, found))
    if options.smoke and broken:
        sys.exit(f"broken by compression: {', '.join(broken)}")


def load_exporters() -> None:
    """Once for all processes, which are forked from this one: their packages take longer than most networks."""
    with tempfile.TemporaryDirectory() as place:
        for ending in ENDINGS:
            intrafusion.export(nn.Linear(2, 2), torch.zeros(2, 2), Path(place) / f"net{ending}")
    count_breaks(nn.Linear(2, 2), Inputs.of(torch.zeros(2, 2)))


def list_work(options: argparse.Namespace) -> Iterator[tuple[Record, Callable[[Any], dict[str, Any]], Any]]:
    """Records without a result, with what measures each and what that is given."""
    if options.latency:
        for name in TIMED:
            for mode in options.mode or MODES:
                setting = {"network": f"zoo:{name}", "keep": KEEP, "mode": mode}
                yield Record("export latency", setting, {}), measure_latency, (f"zoo:{name}", mode)
        return
    for name in SMOKE if options.smoke else (*(f"zoo:{n}" for n in zoo.names()), *FAMILIES):
        yield Record("export", {"network": name, "keep": KEEP}, {}), measure, name


def list_broken(found: Mapping[str, Any]) -> list[str]:
    """What the original can and the smaller network cannot."""
    before, after = found["before"], found.get("after", found["before"])
    lost = [e for e in ENDINGS if "failed" in after[e] and "failed" not in before[e]]
    compiled = isinstance(before["breaks"], int) and (
        not isinstance(after["breaks"], int) or after["breaks"] > before["breaks"]
    )
    return lost + ["torch.compile"] * compiled


if __name__ == "__main__":
    main()
