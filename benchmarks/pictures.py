"""Draw the pictures that show what was measured, from the records: of the README, docs/restore.md and docs/export.md.

The digits beside noise and made images are those of the zoo's digits network, so that picture needs no record.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from _losses import list_latencies, read_latest, read_rivals
from families import FAMILIES
from rivals import METHODS
from tables import HEADLINE, where

from intrafusion.io.atomic import atomic_file
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record
from intrafusion.lab.report.plot import COLOURS, FAINT, GREY, INK, accuracy_plot, drawing
from intrafusion.lab.report.sheet import contact_sheet, png
from intrafusion.restore import Noise, Synthesis

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
LEVELS = {
    "256 unlabelled images": ("pivot", "real 256"),
    "128 images made from the network": ("pivot", "synthetic 128"),
    "noise": ("pivot", "noise"),
    "pruned, not restored": ("select, l1 folded", "none"),
}
ORANGE, BLUE, GREEN, PURPLE = COLOURS


def draw_rivals(path: Path) -> None:
    """A panel for each network: accuracy against what is left of the channels, ours bold, every rival thin."""
    records = read_rivals()
    networks = list(dict.fromkeys(r.setting["network"] for r in records))
    columns = min(3, len(networks))
    rows = math.ceil(len(networks) / columns)
    with drawing(path, (4.1 * columns if columns > 1 else 6.4, 3.1 * rows + 0.5)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, network in zip(panels, networks, strict=False):
            _draw_network(axes, [r for r in records if r.setting["network"] == network], network)
        for axes in panels[len(networks) :]:
            axes.set_axis_off()
        shown = {words: line for axes in panels for line, words in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.supylabel("accuracy (%)", fontsize=10)
        place = {"loc": "outside lower center", "ncols": min(5, 2 * columns), "fontsize": 8}
        figure.legend(shown.values(), shown.keys(), title="channels kept (%), nothing trained", **place)


def _draw_network(axes, records: list[Record], network: str) -> None:
    original = next(r.result["accuracy"] for r in records if r.setting["method"] == "original")
    axes.axhline(100 * original, color=GREY, linewidth=1.0, linestyle=(0, (5, 3)))
    told: set[str] = set()
    for name, method in METHODS.items():
        points = sorted((r.setting["keep"], r.result["accuracy"]) for r in records if r.setting["method"] == name)
        if not points:
            continue
        blind, own = method.sees == "no data", name.startswith("ours")
        words = f"{'ours' if own else 'published methods'}, {method.sees}"
        style = {"linewidth": 2.4, "marker": "o", "zorder": 3} if own else {"linewidth": 0.8}
        colour = ORANGE if blind else GREEN if method.sees == "64 images" else BLUE
        x, y = zip(*((100 * keep, 100 * accuracy) for keep, accuracy in [*points, (1.0, original)]), strict=True)
        axes.plot(x, y, color=colour, label=None if words in told else words, clip_on=False, **style)
        told.add(words)
    axes.set(xlim=(103, 47), ylim=(0, 104))
    axes.set_title(network, loc="left", fontsize=10)
    axes.grid(axis="y", linewidth=0.6)


VERDICTS = {
    "exact": BLUE,
    "nothing reduced": FAINT,
    "not judged": GREY,
    "over the limit": PURPLE,
    "crash": ORANGE,
    "wrong": "#b3261e",
}


def draw_families(path: Path) -> None:
    """A bar for each side: families of networks by the judge's verdict."""
    found: dict[str, dict[str, str]] = {}
    for r in read_latest("compatibility"):
        if r.setting["family"] in FAMILIES:
            found.setdefault(r.setting["family"], {})[r.setting["side"]] = r.result["verdict"]
    both = [sides for sides in found.values() if {"ours", "peer"} <= sides.keys()]
    names = {"ours": "intrafusion", "peer": "Torch-Pruning"}
    with drawing(path, (8.2, 1.9)) as figure:
        axes = figure.subplots()
        left = dict.fromkeys(names, 0)
        for verdict, colour in VERDICTS.items():
            counts = {side: sum(sides[side] == verdict for sides in both) for side in names}
            shown, ink = [str(n) if n else "" for n in counts.values()], INK if colour == FAINT else "#ffffff"
            bars = axes.barh(list(names.values()), list(counts.values()), left=list(left.values()), color=colour)
            axes.bar_label(bars, shown, label_type="center", color=ink)
            bars.set_label(verdict) if any(counts.values()) else None
            left = {side: left[side] + counts[side] for side in names}
        axes.invert_yaxis()
        axes.set_title(f"{len(both)} families of networks, half of the channels", loc="left", fontsize=10)
        axes.set(xlim=(0, len(both) + 1))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(VERDICTS), fontsize=8)


def draw_latency(path: Path) -> None:
    """What is left of the time against what is left of the multiply-accumulates, by mode and batch."""
    found = list(list_latencies())
    networks = list(dict.fromkeys(network for network, *_ in found))
    modes = dict.fromkeys((mode, batch) for _, mode, batch, *_ in found)
    colours = dict(zip(dict.fromkeys(mode for mode, _ in modes), (ORANGE, BLUE, GREEN), strict=False))
    with drawing(path, (8.2, 3.2)) as figure:
        axes = figure.subplots()
        for place, (mode, batch) in enumerate(modes):
            own = {network: share for network, m, b, _, share, _ in found if (m, b) == (mode, batch)}
            x = [networks.index(network) + 0.12 * (place - (len(modes) - 1) / 2) for network in own]
            filled = colours[mode] if batch != "1" else "none"
            axes.bar(x, list(own.values()), 0.1, label=f"{mode}, batch {batch}", edgecolor=colours[mode], color=filled)
        for place, network in enumerate(networks):
            macs = next(macs for name, *_, macs in found if name == network)
            axes.plot((place - 0.45, place + 0.45), (macs, macs), color=INK, label=None if place else "MACs")
        axes.set_xticks(range(len(networks)), [n.partition(":")[2].replace("_", "\n", 1) for n in networks], fontsize=8)
        axes.set(ylabel="share of the original", ylim=(0, 1))
        axes.grid(axis="y")
        axes.legend(fontsize=8, ncols=4, loc="upper center")


def draw_levels(path: Path) -> None:
    """Accuracy against the fraction of channels kept, a line per level."""
    own = [r for r in read_latest("restoration") if where(r) == HEADLINE and "keep" in r.setting]
    accuracy = {(r.setting["reducer"], r.setting["restorer"], r.setting["keep"]): r.result["accuracy"] for r in own}
    original = accuracy["none", "none", 1.0]
    keeps = sorted({keep for *_, keep in accuracy if keep < 1}, reverse=True)
    curves = {name: [(1.0, original), *((k, accuracy[*level, k]) for k in keeps)] for name, level in LEVELS.items()}
    network, _, images = HEADLINE
    title = f"{network}, all channels, {images:,} test images, no training"
    accuracy_plot(path, curves, original=original, title=title)


def draw_sheets(path: Path, shown: int = 16, zoom: int = 6, steps: int = 250) -> None:
    """Noise, images made from the digits network, and digits that it never saw, side by side."""
    example = zoo.example_input("digits_resnet")
    noise = Noise(images=shown).make(example).tensors()[0]
    made = Synthesis(images=shown, mirrored=False, steps=steps)(zoo.train_digits(), example)
    real = zoo.load_data("digits_resnet", "test", limit=shown).images
    parts = [contact_sheet(images) for images in (noise, made, real)]
    gap = torch.full((len(parts[0]), 4, 3), 255, dtype=torch.uint8)
    picture = torch.cat([parts[0], gap, parts[1], gap, parts[2]], dim=1)
    with atomic_file(path) as temporary:
        temporary.write_bytes(png(picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)))


FROM_RECORDS: Mapping[str, Callable[[Path], None]] = {
    "rivals.svg": draw_rivals,
    "families.svg": draw_families,
    "latency.svg": draw_latency,
    "levels.svg": draw_levels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records-only", action="store_true", help="leave out the picture that needs no record")
    parser.add_argument("--smoke", action="store_true", help="draw them into a folder that is deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.smoke else PICTURES
        for name, draw in FROM_RECORDS.items():
            draw(folder / name)
        if not options.records_only:
            draw_sheets(folder / "images.png", steps=2 if options.smoke else 250)


if __name__ == "__main__":
    main()
