"""Where we lose, in sentences made of the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compatibility import is_behind
from families import FAMILIES
from rivals import METHODS

from intrafusion.lab.bench import Record, read_records

RECORDS = Path(__file__).parent / "records"
RESTORED = {"none": "not restored"}
CLOSE = 0.15  # by how much a share of the time may be above that of the multiply-accumulates


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of every setting, in the order in which the settings first appeared."""
    return list({record.key: record for record in records}.values())


def read_latest(name: str) -> list[Record]:
    return latest(read_records(RECORDS / f"{name}.jsonl"))


def list_losses() -> str:
    parts = (_of_rivals, _of_choices, _of_attention, _of_time, _of_latency, _of_families)
    return "\n".join(f"- {line}" for part in parts for line in part())


def read_rivals() -> list[Record]:
    """Those on the fewest test images of each network, on which all methods are measured."""
    records = read_latest("rivals")
    fewest: dict[str, int] = {}
    for r in records:
        network, images = r.setting["network"], r.setting["test_images"]
        fewest[network] = min(images, fewest.get(network, images))
    return [r for r in records if r.setting["test_images"] == fewest[r.setting["network"]]]


def group_rivals() -> Iterator[tuple[str, str, float, float, float, str]]:
    """Network, what is seen, keep, our accuracy, the best other one and whose; of what sees as much, or nothing.

    What only we were measured on, as on fewer images, is no comparison.
    """
    found: dict[tuple[str, float], dict[str, float]] = {}
    for r in read_rivals():
        if "accuracy" in r.result:
            found.setdefault((r.setting["network"], r.setting["keep"]), {})[r.setting["method"]] = r.result["accuracy"]
    for (network, keep), own in found.items():
        for sees in dict.fromkeys(m.sees for m in METHODS.values()):
            ours = [a for name, a in own.items() if name.startswith("ours") and METHODS[name].sees == sees]
            others = {
                name: a
                for name, a in own.items()
                if name in METHODS and not name.startswith("ours") and METHODS[name].sees in ("no data", sees)
            }
            if ours and any(METHODS[name].sees == sees for name in others):
                best = max(others, key=lambda name, others=others: others[name])
                yield network, sees, keep, max(ours), others[best], best


def _tell_more(network: str, keep: float, rival: str) -> str:
    """The same comparison on more test images, where it was made."""
    ours = next(name for name, m in METHODS.items() if name.startswith("ours") and m.sees == METHODS[rival].sees)
    found: dict[int, dict[str, float]] = {}
    for r in read_latest("rivals"):
        if (r.setting["network"], r.setting["keep"]) == (network, keep) and r.setting["method"] in (rival, ours):
            found.setdefault(r.setting["test_images"], {})[r.setting["method"]] = 100 * r.result["accuracy"]
    images, own = max(found.items())
    return f" (on {images:,} images {own[rival]:.1f} and {own[ours]:.1f})" if len(found) > 1 else ""


def _of_rivals() -> Iterator[str]:
    cells = list(group_rivals())
    lost = [cell for cell in cells if cell[4] > cell[3]]
    where = "; ".join(
        f"`{network}`, {sees}, keep {keep:g}: {name} {100 * other:.1f}, ours {100 * ours:.1f} %"
        + _tell_more(network, keep, name)
        for network, sees, keep, ours, other, name in sorted(lost, key=lambda c: c[3] - c[4])
    )
    yield f"*Published methods* are ahead in {len(lost)} of {len(cells)} comparisons on whole networks" + (
        f": {where}." if lost else "."
    )


def _of_choices() -> Iterator[str]:
    """Pivoting behind the same restoring on the same images, beside other choices of channels."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for r in read_latest("restoration"):
        s = r.setting
        if "keep" in s and s["reducer"] != "none":
            place = (s["network"], s["group"], s["test_images"], s["keep"], s["restorer"])
            found.setdefault(place, {})[s["reducer"]] = r.result["accuracy"]
    cells = {place: own for place, own in found.items() if "pivot" in own and len(own) > 1}
    gaps = {place: max(own.values()) - own["pivot"] for place, own in cells.items()}
    lost = [place for place, gap in gaps.items() if gap > 0]
    most = max(lost, key=lambda place: gaps[place])
    best = max(cells[most], key=lambda name: cells[most][name])
    small = sum(place[3] >= 0.8 for place in lost)
    yield (
        f"*Another choice of channels* than pivoting, restored alike, is ahead in {len(lost)} of {len(cells)} "
        f"comparisons, {small} of them at keep 0.8 and more; by {100 * gaps[most]:.1f} points at most (`{most[0]}`, "
        f"{most[1]}, keep {most[3]:g}, {RESTORED.get(most[4], f'restored on {most[4]}')}: {best})."
    )


_BETTER = {"accuracy": 1, "spearman": 1, "cosine": 1, "kl": -1, "nats": -1, "nats_next": -1}


def _of_attention() -> Iterator[str]:
    """Cuts of transformers at which a rival is ahead of what is solved, in one of the numbers."""
    ours = ("solved", "target, solved", "chosen, not solved")
    found: dict[tuple[Any, ...], dict[str, Mapping[str, float]]] = {}
    for r in read_latest("attention"):
        s = r.setting
        if s["method"] != "original" and (s["level"] == "data" or s["method"] == "l2"):
            found.setdefault((s["network"], s["cut"], round(r.result["ratio"], 2)), {})[s["method"]] = r.result
    lines = []
    for (network, cut, ratio), own in found.items():
        solved = next((own[name] for name in ours if name in own), {})
        for name, result in own.items() if solved else ():
            ahead = [key for key, sign in _BETTER.items() if key in result and sign * (result[key] - solved[key]) > 0]
            if name not in ours and ahead:
                numbers = ", ".join(f"{key} {result[key]:.4g} against {solved[key]:.4g}" for key in ahead)
                lines.append(f"`{network}`, {cut} at {ratio:g}: {name} ({numbers})")
    if lines:
        yield f"*Transformers*: {'; '.join(lines)}."


def _of_time() -> Iterator[str]:
    against = [r for r in read_latest("speed") if r.setting["what"] in ("trace", "inspect", "compress")]
    slow = [r for r in against if r.result["ratio"] > 1]
    told = "; ".join(
        f"{r.setting['what']}{' ' + r.setting['reducer'] if 'reducer' in r.setting else ''} on "
        f"{r.setting['network'].rpartition(':')[2]} {r.result['ratio']:.1f}"
        for r in sorted(slow, key=lambda r: -r.result["ratio"])
    )
    yield f"*Time*: Torch-Pruning, which proves nothing, takes less. Ours over theirs: {told}."


def list_latencies() -> Iterator[tuple[str, str, str, float, float, float]]:
    """Network, mode, batch, milliseconds of the original, share of the time, share of the multiply-accumulates."""
    for r in read_latest("export"):
        if r.experiment == "export latency" and "macs" in r.result:
            for batch, (before, after) in ((b, r.result[b]) for b in r.result if b.isdigit()):
                yield r.setting["network"], r.setting["mode"], batch, before, after / before, r.result["macs"]


def _of_latency() -> Iterator[str]:
    found = list(list_latencies())
    late = [row for row in found if row[4] > row[5] + CLOSE]
    if found:
        modes = Counter(f"{mode}, batch {batch}" for _, mode, batch, *_ in late)
        told = ", ".join(f"{name} ({count})" for name, count in modes.most_common())
        yield (
            f"*What comes out is not as fast as its multiply-accumulates are few*: on one core {len(late)} of "
            f"{len(found)} times are more than {100 * CLOSE:.0f} points above their share: {told or 'none'}."
        )
    card = [r for r in read_latest("gpu") if r.setting["what"] == "latency"]
    shares = [(r, r.result["round_to None, ms"] / r.result["before, ms"]) for r in card]
    first = [(r, share) for r, share in shares if r.setting["batch"] == 1]
    if first:
        r, share = max(first, key=lambda pair: pair[1])
        yield (
            f"On a graphics card one image takes {share:.2f} of the time at {r.result['round_to None, MACs']:.2f} of "
            f"the multiply-accumulates (`{r.setting['network']}`): starting kernels is all the time there is."
        )


def _of_families() -> Iterator[str]:
    sides: dict[str, dict[str, Mapping[str, Any]]] = {}
    for r in read_latest("compatibility"):
        sides.setdefault(r.setting["family"], {})[r.setting["side"]] = r.result
    sides = {name: found for name, found in sides.items() if name in FAMILIES}
    ours = {name: s["ours"] for name, s in sides.items() if "ours" in s}
    missed = [f"{name} ({r['verdict']})" for name, r in ours.items() if r["verdict"] not in ("exact", "skipped")]
    behind = [name for name, s in sides.items() if {"ours", "peer"} <= s.keys() and is_behind(s["ours"], s["peer"])]
    named = f": {', '.join(missed)}" if missed else ""
    yield f"*Families of networks*: {len(missed)} of {len(ours)} are not exact{named}."
    if behind:
        yield f"Families of which Torch-Pruning, exact, leaves fewer parameters: {', '.join(behind)}."
