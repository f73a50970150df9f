"""Write the tables of benchmarks/README.md, of docs/ and of the README from the records; no number is typed.

python benchmarks/tables.py            write
python benchmarks/tables.py --check    fail if a file is not what the records say
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from _losses import CLOSE, group_rivals, latest, list_latencies, list_losses, read_latest, read_rivals
from compatibility import write_table
from export import list_broken
from growth import METHODS as GROWING
from restoration_cifar10 import REDUCERS, RESTORERS, RIVALS
from rivals import LEFT, METHODS

from intrafusion.io.atomic import atomic_file
from intrafusion.lab.bench import Record, read_records

HERE = Path(__file__).parent
RECORDS = HERE / "records"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def by_network(records: list[Record], table: Callable[[list[Record]], str]) -> str:
    """For each network and number of test images its original accuracy, and a table of the reductions."""
    records = latest(records)
    parts = []
    for network, images in dict.fromkeys((r.setting["network"], r.setting["images"]) for r in records):
        own = [r for r in records if (r.setting["network"], r.setting["images"]) == (network, images)]
        original = next((r.result["accuracy"] for r in own if r.setting["method"] == "original"), None)
        reduced = table([r for r in own if r.setting["method"] != "original"])
        parts.append(f"`{network}`, {images:,} test images, original {percent(original)} %\n\n{reduced}")
    return "\n\n".join(parts)


def network_table(records: list[Record]) -> str:
    """A row per group and method, a column per keep."""
    keeps = sorted({r.setting["keep"] for r in records}, reverse=True)
    line = lambda r: (r.setting["group"], r.setting["order"], r.setting["method"])  # noqa: E731
    value = {(line(r), r.setting["keep"]): percent(r.result["accuracy"]) for r in records}
    rows = [[*key, *(value.get((key, keep), "") for keep in keeps)] for key in dict.fromkeys(map(line, records))]
    return markdown(["group", "order", "method", *(f"keep {k:g}" for k in keeps)], rows)


def paper_table(records: list[Record]) -> str:
    """A row per reducer and repair, a column per scope and keep."""
    columns = list(dict.fromkeys((r.setting["group"], r.setting["keep"]) for r in records))
    value = {(r.setting["method"], r.setting["group"], r.setting["keep"]): r.result["accuracy"] for r in records}
    lines = sorted({method for method, *_ in value}, key=paper_rank)
    rows = [[*named(line), *(percent(value.get((line, *column))) for column in columns)] for line in lines]
    return markdown(["reducer", "then", *(f"{group.split()[0]} {keep:g}" for group, keep in columns)], rows)


def drawn(records: list[Record]) -> str:
    """Means over the seeds, a row per scope and keep, a column per method."""
    reduced = [r for r in latest(records) if r.setting["method"] != "original"]
    line = lambda r: (r.setting["group"], r.setting["keep"])  # noqa: E731
    methods = list(dict.fromkeys(r.setting["method"] for r in reduced))
    rows = []
    for group, keep in dict.fromkeys(map(line, reduced)):
        own = [r for r in reduced if line(r) == (group, keep)]
        found = [[r.result["accuracy"] for r in own if r.setting["method"] == method] for method in methods]
        rows.append([group, f"{keep:g}", str(len(found[0])), *(percent(sum(f) / len(f)) for f in found)])
    return markdown(["reduced", "keep", "draws", *methods], rows)


def named(method: str) -> tuple[str, str]:
    """Reducer and repair of, for instance, `intrafusion:normalization=source+repair`."""
    reducer, _, repair = method.partition("+")
    return reducer.replace(":normalization=", ", ").replace(":raw=false", ", folded"), repair or "nothing"


def paper_rank(method: str) -> tuple[int, int]:
    reducer, repair = named(method)
    reducers = ("select", *(f"intrafusion, {n}" for n in ("source", "target", "function")), "fold, folded")
    return reducers.index(reducer), ("nothing", "closed_form", "reestimate", "repair").index(repair)


def speed(records: list[Record]) -> str:
    rows = []
    for r in latest(records):
        s, found = r.setting, r.result
        what = s["what"] + (f", {s['reducer']}, keep {s['keep']}" if "reducer" in s else "")
        forward = f"{found['forward_s']:.3f}" if "forward_s" in found else ""
        times = (f"{found['ours_s']:.3f}", f"{found['theirs_s']:.3f}", forward, f"**{found['ratio']:.2f}**")
        rows.append([what, s["network"], str(s["pixels"]), *times])
    return markdown(["what", "network", "pixels", "ours, s", "peer, s", "one forward, s", "ratio"], rows)


def wide(records: list[Record]) -> str:
    """Rows per reducer: processor time and peak memory at each size, growth, and the time on two threads."""
    records = latest(records)
    sizes = sorted({r.setting["n"] for r in records})
    columns = (
        (1, "cpu_s", "processor, s", "{:.0f}"),
        (1, "peak_mb", "peak, GB", "{:.2f}"),
        (2, "seconds", "two threads, on the clock, s", "{:.0f}"),
    )
    rows = []
    for reducer, (threads, key, words, form) in product(dict.fromkeys(r.setting["what"] for r in records), columns):
        own = [r for r in records if (r.setting["what"], r.setting["threads"]) == (reducer, threads)]
        values = {r.setting["n"]: r.result[key] / (1024 if key == "peak_mb" else 1) for r in own}
        if values:
            shown = [form.format(values[n]) if n in values else "" for n in sizes]
            rows.append([reducer, words, *shown, fit_growth(values)])
    return markdown(["reducer", "", *(f"n = {n:,}" for n in sizes), "growth"], rows)


def memory(records: list[Record]) -> str:
    """A row per network and size of image: the peak at each number of images."""
    records = latest(records)
    counts = sorted({r.setting["images"] for r in records})
    rows = []
    for network, pixels in dict.fromkeys((r.setting["network"], r.setting["pixels"]) for r in records):
        own = [r for r in records if (r.setting["network"], r.setting["pixels"]) == (network, pixels)]
        found = {r.setting["images"]: f"{r.result['peak_mb'] / 1024:.2f}" for r in own}
        rows.append([network, str(pixels), *(found.get(count, "") for count in counts)])
    return markdown(["network", "pixels", *(f"{count:,} images" for count in counts)], rows)


def imagenet(records: list[Record]) -> str:
    """A row per cut and method: what is left of the MACs and the parameters, and what of the accuracy."""
    rows = []
    for r in latest(records):
        cuts = [f"{name} {r.setting[name]:g}" for name in ("keep", "macs", "params") if name in r.setting]
        left = [f"{r.result[kind]:.2f}" for kind in ("macs", "params")]
        error = f"{r.result['held_out_error']:.3f}" if "held_out_error" in r.result else ""
        found = (percent(r.result["accuracy"]), error, f"{r.result['cpu_s']:.0f}")
        rows.append([*(cuts or ["nothing"]), r.setting["method"], *left, *found])
    return markdown(["cut", "method", "MACs", "parameters", "accuracy, %", "held-out error", "processor, s"], rows)


def ranks(records: list[Record]) -> str:
    """A row per network and share of the MACs: accuracy and held-out error of each way, and layers that became two."""
    found = {(r.setting["network"], r.setting["macs"], r.setting["way"]): r.result for r in latest(records)}
    rows = []
    cuts = dict.fromkeys((network, macs) for network, macs, way in found if way != "original")
    names = list(dict.fromkeys(network for network, _ in cuts))
    for network, macs in sorted(cuts, key=lambda cut: (names.index(cut[0]), -cut[1])):
        own = {way: found.get((network, macs, way), {}) for way in ("widths", "ranks", "both")}
        errors = [f"{r['held_out_error']:.4f}" if r else "" for r in own.values()]
        original = percent(found.get((network, 1.0, "original"), {}).get("accuracy"))
        split = str(len(own["both"]["ranks"])) if own["both"] else ""
        shown = [percent(result.get("accuracy")) for result in own.values()]
        rows.append([network, f"{macs:g}", original, *shown, split, *errors])
    ways = ("widths", "ranks", "both")
    return markdown(["network", "MACs", "original, %", *ways, "layers as two", *(f"error, {w}" for w in ways)], rows)


def distillation(records: list[Record]) -> str:
    """A row per network, keep, inputs and number of steps, with what each took of the processor."""
    rows = []
    where = lambda s: (s["network"], -s["keep"], s["inputs"])  # noqa: E731
    for r in sorted(latest(records), key=lambda r: (*where(r.setting), r.setting["distilled_steps"])):
        setting, result, steps = r.setting, r.result, r.setting["distilled_steps"]
        done = f"solved, then {steps} steps" if steps else "solved"
        named = [f"`{setting['network']}`", f"{setting['keep']:g}", setting["inputs"], done]
        rows.append([*named, percent(result["accuracy"]), f"{result['held_out_error']:.3f}", f"{result['cpu_s']:.0f}"])
    return markdown(["network", "keep", "inputs", "done", "accuracy, %", "held-out error", "processor, s"], rows)


def export(records: list[Record]) -> str:
    """How many networks export and compile before and after; then each one of which that changed."""
    found = {r.setting["network"]: r.result for r in latest(records) if r.experiment == "export"}
    known = {name: result for name, result in found.items() if "before" in result}
    both = {name: result for name, result in known.items() if "after" in result}
    rows = []
    for ending, words in ((".onnx", "ONNX, in onnxruntime"), (".pt2", "program of torch.export")):
        counts = [sum("failed" not in r[side][ending] for r in both.values()) for side in ("before", "after")]
        off = max((r["after"][ending].get("difference", 0.0) for r in both.values()), default=0.0)
        free = sum(bool(r["after"][ending].get("any_batch")) for r in both.values())
        rows.append([words, *map(str, counts), str(free), f"{off:.0e}"])
    whole = [sum(r[side]["breaks"] == 0 for r in both.values()) for side in ("before", "after")]
    rows.append(["torch.compile without a break", *map(str, whole), "", ""])
    lost = [f"`{n}`: {', '.join(broken)}" for n, r in both.items() if (broken := list_broken(r))]
    broken = "; ".join(lost) or "none"
    head = f"{len(found)} networks, {len(both)} of which were made smaller. Broken by compression: {broken}."
    table = markdown(["", "original", "smaller", "of these any batch size", "largest difference"], rows)
    unmeasured = [f"- `{name}`: {r['verdict']}, {r['why']}" for name, r in found.items() if name not in known]
    return "\n\n".join([head, table, "\n".join(["The originals' own failures:", "", *list_own(known), *unmeasured])])


def list_own(known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each reason why originals do not export or compile whole, with those that do not."""
    names: dict[str, list[str]] = {}
    for name, result in known.items():
        before = result["before"]
        for ending in (".onnx", ".pt2"):
            failed = before[ending].get("failed", "").removeprefix("export: ").partition(";")[0]
            failed = re.sub(r" \(.*?\)", "", failed).replace(name.rpartition(":")[2].partition(" ")[0], "it")
            if failed:
                names.setdefault(f"{ending}: {failed}", []).append(f"`{name}`")
        if before["breaks"] != 0:
            names.setdefault(f"torch.compile: {show_breaks(before['breaks'])}", []).append(f"`{name}`")
    return [f"- {reason}: {', '.join(those)}" for reason, those in names.items()] or ["- none"]


def show_breaks(breaks: int | str) -> str:
    return breaks if isinstance(breaks, str) else "no graph" if breaks < 0 else f"{breaks} breaks"


def fit_growth(values: Mapping[int, float]) -> str:
    """The power of n that values by size n grow with, fitted."""
    logs = [(math.log(n), math.log(value)) for n, value in values.items()]
    return f"n^{statistics.linear_regression(*zip(*logs, strict=True)).slope:.1f}" if len(logs) > 1 else ""


def restoration(records: list[Record]) -> str:
    """One table per network: a row per reducer and restorer, a column per keep; then sizes at equal MACs."""
    records = latest(records)
    parts = []
    for place in dict.fromkeys(where(r) for r in records):
        network, scope, images = place
        own = [r for r in records if where(r) == place]
        original = next((r.result["accuracy"] for r in own if r.setting["reducer"] == "none"), None)
        head = f"`{network}`, {scope}, {images:,} test images, original {percent(original)} %"
        kept = [r for r in own if "keep" in r.setting and r.setting["reducer"] != "none"]
        sized = [r for r in own if "macs" in r.setting]
        tables = [restored_table(kept)] if kept else []
        tables += [sizes_table(sized)] if sized else []
        parts.append("\n\n".join([head, *tables]))
    return "\n\n".join(parts)


def where(record: Record) -> tuple[str, str, int]:
    return record.setting["network"], record.setting["group"], record.setting["test_images"]


def rivals(records: list[Record]) -> str:
    """One table per network: a row per method, those without data first, a column per keep."""
    parts = []
    for place in dict.fromkeys((r.setting["network"], r.setting["test_images"]) for r in records):
        own = [r for r in latest(records) if (r.setting["network"], r.setting["test_images"]) == place]
        value = {(r.setting["method"], r.setting["keep"]): percent(r.result.get("accuracy")) for r in own}
        keeps = sorted({keep for method, keep in value if method not in ("original", LEFT)}, reverse=True)
        rows = [
            [name, method.sees, *(value.get((name, keep), "") for keep in keeps)]
            for name, method in METHODS.items()
            if any((name, keep) in value for keep in keeps)
        ]
        left = {r.setting["keep"]: r.result for r in own if r.setting["method"] == LEFT}
        counted = (
            [f"{kind} left, %", "", *(percent(left[k][kind]) if k in left else "" for k in keeps)] for kind in KINDS
        )
        rows = [*counted, *rows]
        head = f"`{place[0]}`, {place[1]:,} test images, original {value['original', 1.0]} %"
        parts.append(f"{head}\n\n{markdown(['method', 'sees', *(f'keep {k:g}' for k in keeps)], rows)}")
    return "\n\n".join(parts)


KINDS = ("parameters", "MACs")


def growth(records: list[Record]) -> str:
    """A row per source and number of images, a column per method and keep: the mean over the seeds, and their range."""
    found: dict[tuple[str, int], dict[tuple[str, float], list[float]]] = {}
    for r in latest(records):
        s = r.setting
        row = found.setdefault((s["source"], s["inputs"]), {})
        row.setdefault((s["method"], s["keep"]), []).append(100 * r.result["accuracy"])
    columns = sorted({c for row in found.values() for c in row}, key=lambda c: (-c[1], list(GROWING).index(c[0])))
    told = lambda a: f"{statistics.mean(a):.1f} ({min(a):.1f} to {max(a):.1f})" if a else ""  # noqa: E731
    rows = [[source, f"{n:,}", *(told(row.get(c, [])) for c in columns)] for (source, n), row in found.items()]
    return markdown(["images of", "number", *(f"{method}, keep {keep:g}" for method, keep in columns)], rows)


def restored_table(records: list[Record]) -> str:
    keeps = sorted({r.setting["keep"] for r in records}, reverse=True)
    line = lambda r: (r.setting["reducer"], r.setting["restorer"])  # noqa: E731
    value = {(line(r), r.setting["keep"]): percent(r.result["accuracy"]) for r in records}
    lines = sorted(set(map(line, records)), key=rank)
    rows = [[*key, *(value.get((key, keep), "") for keep in keeps)] for key in lines]
    return markdown(["reducer", "restored on", *(f"keep {k:g}" for k in keeps)], rows)


def rank(line: tuple[str, str]) -> tuple[int, int]:
    return list(REDUCERS).index(line[0]), (*RESTORERS, *RIVALS).index(line[1])


def sizes_table(records: list[Record]) -> str:
    rows = [
        [
            f"{r.setting['macs']:.0%}",
            r.setting["sizes"],
            *(f"{r.result[what] / r.result[f'{what}_before']:.1%}" for what in ("macs", "params")),
            percent(r.result["accuracy"]),
        ]
        for r in records
    ]
    return markdown(["MACs asked for", "sizes", "MACs", "parameters", "accuracy"], rows)


def gpu_correctness(records: list[Record]) -> str:
    """Of each network the worst difference between the devices, and errors of each way."""
    rows = []
    for r in records:
        f = r.result
        ways = r.setting["reducer"] + (f" + {r.setting['restore']}" if r.setting["restore"] else "")
        errors = [f"{f[key]:.4f}" for key in ("error_on_cpu", "error", "error_in_half")]
        rows.append([r.setting["network"], ways, f"{f['same_channels']:.0%}", f"{f['difference']:.0e}", *errors])
    header = ["network", "method", "same channels", "difference", "error, CPU", "error, card", "error, card, half"]
    return markdown(header, rows)


def gpu_seconds(records: list[Record]) -> str:
    steps = ("forward", "trace", "decide", "apply", "restore")
    rows = [[r.setting["network"], r.setting["device"], *(f"{r.result[f'{s}_s']:.2f}" for s in steps)] for r in records]
    return markdown(["network", "device", *steps], rows)


def gpu_latency(records: list[Record]) -> str:
    rows = []
    for r in records:
        s, f = r.setting, r.result
        ratio = lambda key, f=f: f"{f[f'round_to {key}, ms'] / f['before, ms']:.2f}"  # noqa: E731
        how = "compiled" if s["compiled"] else "eager"
        macs = f"{f['round_to None, MACs']:.2f}"
        rows.append([s["network"], str(s["batch"]), s["dtype"], how, f"{f['before, ms']:.1f}", macs, ratio("None")])
    return markdown(["network", "batch", "precision", "mode", "before, ms", "MACs", "time"], rows)


def gpu_trained(records: list[Record]) -> str:
    parts = []
    for network in dict.fromkeys(r.setting["network"] for r in records):
        own = [r for r in records if r.setting["network"] == network]
        trained = next(r.result for r in own if r.setting["what"] == "train")
        cut = [r for r in own if r.setting["what"] == "cut"]
        keeps = sorted({r.setting["keep"] for r in cut}, reverse=True)
        line = lambda r: (r.setting["reducer"], r.setting["restore"] or "nothing", r.setting["images"])  # noqa: E731
        value = {(line(r), r.setting["keep"]): percent(r.result["accuracy"]) for r in cut}
        lines = dict.fromkeys(map(line, cut))
        rows = [[*map(str, key), *(value.get((key, keep), "") for keep in keeps)] for key in lines]
        head = f"`{network}`, {trained['epochs']:.0f} epochs, original {percent(trained['accuracy'])} %"
        parts.append(f"{head}\n\n{markdown(['reducer', 'restore', 'images', *(f'keep {k:g}' for k in keeps)], rows)}")
    return "\n\n".join(parts)


def gpu(records: list[Record]) -> str:
    """Four tables, one for each stage of the script."""
    of = lambda *what: [r for r in latest(records) if r.setting["what"] in what]  # noqa: E731
    tables = gpu_correctness(of("correctness")), gpu_seconds(of("seconds")), gpu_latency(of("latency"))
    return "\n\n".join([*tables, gpu_trained(of("train", "cut"))])


METRICS = {
    "accuracy": ("accuracy, %", "{:.2%}"),
    "kl": ("KL", "{:.4f}"),
    "spearman": ("Spearman", "{:.4f}"),
    "cosine": ("cosine", "{:.3f}"),
    "nats": ("nats, first 5", "{:.3f}"),
    "nats_next": ("nats, next 80", "{:.3f}"),
}


def attention(records: list[Record]) -> str:
    """A table per network: a row per cut and method, the share of the blocks that it kept, and what was measured."""
    records = latest(records)
    parts = []
    for network in dict.fromkeys(r.setting["network"] for r in records):
        own = [r for r in records if r.setting["network"] == network]
        shown = [name for name in METRICS if name in own[0].result]
        rows = [
            [
                r.setting["cut"],
                r.setting["method"],
                r.setting["level"] if r.setting["method"] not in ("original", "l2") else "",
                f"{r.result['ratio']:.3f}",
                *(METRICS[name][1].format(r.result[name]).rstrip("%") for name in shown),
            ]
            for r in sorted(own, key=lambda r: (CUTS.index(r.setting["cut"]), -r.result["ratio"]))
        ]
        names = [METRICS[name][0] for name in shown]
        parts.append(f"`{network}`\n\n{markdown(['cut', 'method', 'sees', 'blocks kept', *names], rows)}")
    return "\n\n".join(parts)


def attention_headline(records: list[Record]) -> str:
    """Where sizes were chosen for a target: networks of which that was measured."""
    measured = {r.setting["network"] for r in records if r.setting["cut"] == "everything"}
    shown = [r for r in records if r.setting["cut"] in ("nothing", "everything") and r.setting["network"] in measured]
    return attention(shown)


CUTS = ("nothing", "everything", "MLPs", "every layer", "stream")
HEADLINE = ("cifar10_resnet20", "whole network", 10_000)


SHOWN = (("no data", 0.9), ("no data", 0.7), ("256 images", 0.9), ("256 images", 0.7), ("256 images", 0.5))


def headline() -> str:
    """A row per network: our accuracy, and that of the best rival that sees as much, the better one bold."""
    found = {(network, sees, keep): (ours, other) for network, sees, keep, ours, other, _ in group_rivals()}
    original = {r.setting["network"]: r.result["accuracy"] for r in read_rivals() if r.setting["method"] == "original"}
    rows = [
        [f"`{network}`", percent(original[network]), *(versus(found.get((network, *cell))) for cell in SHOWN)]
        for network in dict.fromkeys(network for network, *_ in found)
    ]
    return markdown(["network", "original", *(f"{sees}, keep {keep:g}" for sees, keep in SHOWN)], rows)


def versus(cell: tuple[float, float] | None) -> str:
    if cell is None:
        return ""
    ours, other = map(percent, cell)
    return f"**{ours}** / {other}" if cell[0] >= cell[1] else f"{ours} / **{other}**"


def example() -> str:
    """What the README's example printed."""
    return "\n".join(["```", *read_latest("example")[-1].result["printed"], "```"])


def latency() -> str:
    """A row per network and mode: milliseconds before, and the share of them that is left, by batch."""
    found = {(network, mode, batch): rest for network, mode, batch, *rest in list_latencies()}
    batches = sorted({batch for *_, batch in found}, key=int)
    rows = []
    names = list(dict.fromkeys(network for network, *_ in found))
    for network, mode in sorted(dict.fromkeys(key[:2] for key in found), key=lambda pair: names.index(pair[0])):
        own = {batch: found[network, mode, batch] for batch in batches if (network, mode, batch) in found}
        (_, _, macs), *_ = own.values()
        before = [f"{own[b][0]:.3g}" if b in own else "" for b in batches]
        shares = [share_of_time(own[b][1], macs) if b in own else "" for b in batches]
        rows.append([f"`{network}`", mode, *before, f"{macs:.2f}", *shares])
    names = [f"{what}, batch {b}" for what in ("before, ms", "time") for b in batches]
    half = len(batches)
    return markdown(["network", "mode", *names[:half], "MACs", *names[half:]], rows)


def share_of_time(time: float, macs: float) -> str:
    return f"{time:.2f}" if time <= macs + CLOSE else f"**{time:.2f}**"


def robustness(records: list[Record]) -> str:
    """A row per thing that was tried, of the last run; of random networks one for each way of trying them."""
    last = records[-1]
    rows = []
    for what, counts in last.result.items():
        by_way: dict[str, dict[str, int]] = {}
        for name, count in counts.items():
            way, _, verdict = name.rpartition(": ")
            by_way.setdefault(way, {})[verdict] = count
        for way, found in by_way.items():
            tried = found.pop("tried", sum(found.values()) if way else None)
            head = f"{what}, {way}" if way else what
            said = ", ".join(f"{count:,} {verdict}" for verdict, count in found.items())
            rows.append([TRIED.get(head, head), "" if tried is None else f"{tried:,}", said])
    when, versions = last.environment["time"][:10], last.environment["versions"]
    times = f"N = {last.setting['times']} (`make fuzz` has N = 20)"
    head = f"{when}, PyTorch {versions['torch']}, {times}. Wrong or crashed: none."
    return f"{head}\n\n{markdown(['what', 'tried', 'found'], rows)}"


TRIED = {
    "random networks": "random networks: groups, those of them that cannot matter, exact copies",
    "random networks, dead": "random networks, channels that cannot matter are cut",
    "random networks, zeroed": "random networks, cut beside the original with zeros",
    "random networks, copies": "random networks, exact copies of channels merged",
    "random networks, round trip": "random networks compressed, saved and loaded",
    "networks": "saved folders, damaged, loaded onto their class",
    "networks that name themselves": "saved folders, damaged, loaded alone",
    "plans": "saved plans, damaged",
    "save": "processes killed while they save",
    "sweeps": "processes killed while they share a sweep",
    "training": "processes killed while they train",
}


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    HERE / "README.md": {
        "attention": lambda: attention(read_records(RECORDS / "attention.jsonl")),
        "datafree_cifar10": lambda: by_network(read_records(RECORDS / "datafree_cifar10.jsonl"), network_table),
        "paper_cifar": lambda: by_network(read_records(RECORDS / "paper_cifar.jsonl"), paper_table),
        "random_importance": lambda: drawn(read_records(RECORDS / "random_importance.jsonl")),
        "rivals": lambda: rivals(read_records(RECORDS / "rivals.jsonl")),
        "growth": lambda: growth(read_records(RECORDS / "growth.jsonl")),
        "restoration": lambda: restoration(read_records(RECORDS / "restoration.jsonl")),
        "distillation": lambda: distillation(read_records(RECORDS / "distillation.jsonl")),
        "export": lambda: export(read_records(RECORDS / "export.jsonl")),
        "latency": latency,
        "losses": list_losses,
        "robustness": lambda: robustness(read_records(RECORDS / "robustness.jsonl")),
        "imagenet": lambda: imagenet(read_records(RECORDS / "imagenet.jsonl")),
        "ranks": lambda: ranks(read_records(RECORDS / "ranks.jsonl")),
        "speed": lambda: speed(read_records(RECORDS / "speed.jsonl")),
        "memory": lambda: memory(read_records(RECORDS / "memory.jsonl")),
        "wide": lambda: wide(read_records(RECORDS / "wide.jsonl")),
        "gpu": lambda: gpu(read_records(RECORDS / "gpu.jsonl")),
    },
    HERE.parent / "docs" / "methods.md": {
        "attention_headline": lambda: attention_headline(read_records(RECORDS / "attention.jsonl")),
    },
    HERE.parent / "docs" / "compatibility.md": {
        "compatibility": lambda: write_table(latest(read_records(RECORDS / "compatibility.jsonl"))),
    },
    HERE.parent / "docs" / "limits.md": {"losses": list_losses},
    HERE.parent / "README.md": {"example": example, "headline": headline},
}


def filled(text: str, name: str, content: str) -> str:
    """The text with the block between its two markers replaced."""
    start, end = f"<!-- {name}: generated by benchmarks/tables.py -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        sys.exit(f"no block {name!r}: expected the lines {start!r} and {end!r}")
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the same as --check")
    options = parser.parse_args()
    for path, blocks in BLOCKS.items():
        text = old = path.read_text()
        for name, table in blocks.items():
            text = filled(text, name, table())
        if options.check or options.smoke:
            if text != old:
                sys.exit(f"{path.name} does not show what the records say; run python benchmarks/tables.py")
            continue
        with atomic_file(path) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
