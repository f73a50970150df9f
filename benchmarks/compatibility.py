"""Claim: networks of every kind are understood, or left alone with the reason; beside what Torch-Pruning makes of them.

A row a family (`families/`), in a small configuration with random weights, in float64, every group at keep 0.5:
  ours  the default reducer without restoring: groups found, reduced, left alone and the main reason, parameters left,
        the largest error that a proof of function let pass, seconds of processor time as a multiple of one forward
        pass. The verdict is of plain selection of the same groups.
  peer  Torch-Pruning as in its examples, see `families/peer.py`.
The verdict on either is `families/judge.py`'s, which knows no tracer. Every measurement has a process, a limit of
processor time and a limit of memory of its own. Records: benchmarks/records/compatibility.jsonl; what is recorded is
not measured again, unless `--again`. `python benchmarks/tables.py` writes docs/compatibility.md from them.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from families.family import Call, Family, Skipped, as_double, call, count_parameters, randomise_
from families.judge import EXACT, EXACT_SINGLE, Unjudged, find_error
from families.peer import prune
from torch import nn

import intrafusion
from intrafusion import ModelError, Recipe
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.network.held_out import Split
from intrafusion.network.inputs import Inputs
from intrafusion.network.sources import import_transformers
from intrafusion.pipeline import reduce_and_restore
from intrafusion.plan import Decision
from intrafusion.surgery.proof import FunctionCheck

EXPERIMENT = "compatibility"
RECORDS = Path(__file__).parent / "records" / "compatibility.jsonl"
KEEP, LIMIT_S, LIMIT_BYTES = 0.5, 40, 4 << 30
SMOKE = (
    "torchvision:mobilenet_v2", "timm:test_resnet", "timm:test_convnext", "hf:XLNetForSequenceClassification",
    "hf:FNetForSequenceClassification", "hf:MambaForCausalLM", "hf:RwkvForCausalLM", "by hand:U-Net",
    "by hand:diffusion U-Net", "by hand:FCOS", "by hand:GCN", "by hand:mixture of experts", "by hand:WaveNet",
)  # fmt: skip
OUTPUT = "output of the network"


# ---- one family ------------------------------------------------------------------------------------------------------


class Subject:
    """A network of a family with two calls of it, in float64."""

    def __init__(self, family: Family) -> None:
        torch.manual_seed(0)
        self.family = family
        try:
            model = family.build().eval()
        except Exception as error:
            raise Skipped(f"cannot be built here: {_describe(error)}") from error
        self.model: nn.Module = randomise_(model.float() if family.single else model.double())
        self.calls: list[Call] = [f if family.single else as_double(f) for f in (family.inputs(), family.inputs())]
        self.params = count_parameters(self.model)

    def time_forward(self) -> float:
        with torch.no_grad():
            call(self.model, self.calls[0])
            return max(_seconds(lambda: [call(self.model, self.calls[0]) for _ in range(10)]), 1e-3) / 10


def measure_ours(family: Family) -> dict[str, Any]:
    subject, passed = Subject(family), _note_proofs()
    forward, inputs, start = subject.time_forward(), Inputs.of(subject.calls[0]), time.process_time()
    graph = intrafusion.inspect(subject.model, inputs)

    def reduce(**options: Any) -> intrafusion.Compressed:
        recipe = Recipe.of(keep=KEEP, restore=None, **options)
        return reduce_and_restore(recipe, subject.model, graph, inputs, Split(None))

    try:
        small = reduce()
        seconds = time.process_time() - start
    except ModelError as error:
        if "no channel group to reduce" not in str(error):
            raise
        return {"verdict": "nothing reduced", "left": 1.0, "params": subject.params, "why": str(error)}
    decisions = [d for d in small.plan.decisions if d.n > 1]
    return {
        **judge(subject, reduce(reducer="select").model, wanted_only=False),
        "left": count_parameters(small.model) / subject.params,
        "params": subject.params,
        "groups": len(decisions),
        "reduced": sum(d.reduced for d in decisions),
        "reasons": _count_reasons(decisions),
        "proof_error": max(passed, default=None),
        "seconds": round(seconds, 3),
        "forwards": round(seconds / forward, 1),
    }


def measure_peer(family: Family) -> dict[str, Any]:
    subject, start = Subject(family), time.process_time()
    original = copy.deepcopy(subject.model)
    small = prune(subject.model, subject.calls[0], family, 1 - KEEP)
    seconds = time.process_time() - start
    subject.model = original
    left = count_parameters(small) / subject.params
    if left == 1.0:
        return {"verdict": "nothing reduced", "left": left}
    return {**judge(subject, small, wanted_only=True), "left": left, "seconds": round(seconds, 3)}


SIDES: Mapping[str, Callable[[Family], dict[str, Any]]] = {"ours": measure_ours, "peer": measure_peer}


def judge(subject: Subject, small: nn.Module, *, wanted_only: bool) -> dict[str, Any]:
    """Whether a smaller network is the original without what it lacks, see `families/judge.py`."""
    try:
        error = find_error(subject.model, small, subject.calls, subject.family, wanted_only=wanted_only)
    except Unjudged as why:
        return {"verdict": "not judged", "why": str(why)}
    except Exception as why:
        return {"verdict": "wrong", "why": _describe(why)}
    exact = error <= (EXACT_SINGLE if subject.family.single else EXACT)
    return {"verdict": "exact" if exact else "wrong", "error": error}


def _note_proofs() -> list[float]:
    """A list that fills with the errors that proofs of function let pass."""
    passed: list[float] = []
    passes = FunctionCheck.passes

    def noting(self: FunctionCheck, error: float) -> bool:
        if passes(self, error):
            passed.append(error)
        return passes(self, error)

    FunctionCheck.passes = noting
    return passed


def _count_reasons(decisions: Iterable[Decision]) -> dict[str, int]:
    """Channels by the reason why they stay, most first."""
    counts: Counter[str] = Counter()
    for decision in decisions:
        if decision.reason is not None:
            counts[decision.reason] += decision.n
    return dict(counts.most_common(8))


def _seconds(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


# ---- a process for each ----------------------------------------------------------------------------------------------


def measure_apart(measure: Callable[[Any], dict[str, Any]], subject: Any, limit_s: int = LIMIT_S) -> dict[str, Any]:
    """What was found in a process of its own; whatever happens to it is the result.

    Args:
        measure: of the subject.
        limit_s: of processor time; ten times as many by the clock, for a process that sleeps.
    """
    context = multiprocessing.get_context("fork")  # packages are imported once, here
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(measure, subject, theirs, limit_s), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(10 * limit_s) else _over(f"{limit_s} s")
    except EOFError:
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        found = _over(f"{limit_s} s") if slow else {"verdict": "crash", "why": f"the process died ({process.exitcode})"}
    process.kill()
    process.join()
    return found


def _over(what: str) -> dict[str, Any]:
    return {"verdict": "over the limit", "why": f"more than {what}"}


def _work(measure: Callable[[Any], dict[str, Any]], subject: Any, pipe: Connection, limit_s: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    try:
        pipe.send(measure(subject))
    except (Skipped, ModuleNotFoundError) as why:
        pipe.send({"verdict": "skipped", "why": _describe(why)})
    except MemoryError:
        pipe.send(_over(f"{LIMIT_BYTES >> 30} GiB"))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send({"verdict": "crash", "why": _describe(error), "at": f"{Path(frame.filename).name}:{frame.lineno}"})


# ---- the table -------------------------------------------------------------------------------------------------------


def write_table(records: Sequence[Record]) -> str:
    """Bad news first, then a row for each family."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record.setting["family"], {})[record.setting["side"]] = record.result
    rows = {name: sides for name in FAMILIES if SIDES.keys() <= (sides := found.get(name, {})).keys()}
    return "\n\n".join([_list_misses(rows), _tally(rows), *_write_packages(rows)])


def _write_packages(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterable[str]:
    header = (
        "family", "parameters", "groups", "reduced", "left alone, mainly because", "left", "proof", "forwards",
        "verdict", "Torch-Pruning left", "verdict",
    )  # fmt: skip
    for package in dict.fromkeys(FAMILIES[name].package for name in rows):
        own = [_write_row(name, sides) for name, sides in rows.items() if FAMILIES[name].package == package]
        lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in own)]
        yield f"### {package}\n\n" + "\n".join(lines)


def _write_row(name: str, sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ours, peer = sides["ours"], sides.get("peer", {})
    proof = ours.get("proof_error")
    return [
        name.partition(":")[2],
        f"{ours['params']:,}" if "params" in ours else "",
        str(ours.get("groups", "")),
        str(ours.get("reduced", "")),
        find_main_reason(ours),
        _percent(ours),
        "" if proof is None else f"{proof:.0e}",
        f"{ours['forwards']:.0f}" if "forwards" in ours else "",
        _show_verdict(ours),
        _percent(peer),
        _show_verdict(peer),
    ]


def find_main_reason(result: Mapping[str, Any]) -> str:
    """Why most of the channels stay that are not the network's own outputs."""
    counts: Counter[str] = Counter()
    for reason, channels in result.get("reasons", {}).items():
        counts[reason.partition(";")[0].replace("|", "/")] += channels * (OUTPUT not in reason)
    reason, channels = next(iter(counts.most_common(1)), ("", 0))
    return _shorten(reason) if channels else "only outputs" if counts else ""


def _shorten(text: str, most: int = 110) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _percent(result: Mapping[str, Any]) -> str:
    return f"{result['left']:.0%}" if "left" in result else ""


def _show_verdict(result: Mapping[str, Any]) -> str:
    if not result or result["verdict"] in ("exact", "nothing reduced"):
        return result.get("verdict", "")
    error = f" ({result['error']:.0e})" if "error" in result else ""
    return f"**{result['verdict']}**{error}"


def is_behind(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> bool:
    """Whether Torch-Pruning is exact and has fewer parameters left, by more than one in a hundred."""
    return peer.get("verdict") == "exact" and peer["left"] < ours.get("left", 1.0) - 0.01


def _list_misses(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Where an aim is missed."""
    lines = []
    for name, sides in rows.items():
        ours, peer = sides["ours"], sides.get("peer", {})
        if ours["verdict"] not in ("exact", "skipped"):
            lines.append(f"- {name}: {ours['verdict']}. {_shorten(ours.get('why', ''), 160)}".rstrip(". ") + ".")
        if is_behind(ours, peer):
            kept = f"{_percent(ours) or 'all'} of the parameters left, Torch-Pruning {_percent(peer)} and exact"
            lines.append(f"- {name}: {kept}. Mainly: {find_main_reason(ours) or 'sizes'}.")
    head = "Missed: a family that is not exact, or where Torch-Pruning is and has fewer parameters left."
    return "\n".join([head, "", *(lines or ["- nothing"])])


def _tally(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """How many families have which verdict."""
    counts = {s: Counter(r[s]["verdict"] for r in rows.values() if s in r) for s in SIDES}
    words = {side: ", ".join(f"{n} {verdict}" for verdict, n in c.most_common()) for side, c in counts.items()}
    return f"{len(rows)} families. intrafusion: {words['ours']}. Torch-Pruning: {words['peer']}."


# ---- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=["*"], help="names or patterns, all by default")
    parser.add_argument("--side", choices=list(SIDES), action="append")
    parser.add_argument("--again", action="store_true", help="measure what is recorded, too; the last record counts")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="a dozen small families, ours only, recorded nowhere")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of many networks, and the peer's of parameters that it cannot place
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the norms from the judge
    import_transformers()
    names = [n for n in (SMOKE if options.smoke else FAMILIES) if any(fnmatch(n, p) for p in options.families)]
    finished = set() if options.again or options.smoke else finished_keys(read_records(options.records))
    wrong = []
    for name in names:
        for side in ["ours"] if options.smoke else options.side or SIDES:
            setting = {"family": name, "side": side, "keep": KEEP}
            if Record(EXPERIMENT, setting, {}).key not in finished:
                result = measure_apart(SIDES[side], FAMILIES[name])
                print(name, side, {k: v for k, v in result.items() if k != "reasons"}, flush=True)
                wrong += [name] if side == "ours" and result["verdict"] in ("wrong", "crash") else []
                if not options.smoke:
                    append_record(options.records, Record(EXPERIMENT, setting, result))
    if options.smoke and wrong:
        raise SystemExit(f"wrong or crashed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
