"""Draw the pictures of docs/restore.md: what accuracy each level keeps, from the records, and what it solves layers on.

The images are those of the zoo's digits network, so the second picture needs no file; the first reads
benchmarks/records/restoration.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tables import HEADLINE, latest, where

from intrafusion.io.atomic import atomic_file
from intrafusion.lab import zoo
from intrafusion.lab.bench import read_records
from intrafusion.lab.report.plot import accuracy_plot
from intrafusion.lab.report.sheet import contact_sheet, png
from intrafusion.restore import Noise, Synthesis

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "restoration.jsonl"
PICTURES = HERE.parent / "docs" / "pictures"
LEVELS = {
    "256 unlabelled images": ("pivot", "real 256"),
    "128 images made from the network": ("pivot", "synthetic 128"),
    "noise": ("pivot", "noise"),
    "pruned, not restored": ("select, l1 folded", "none"),
}


def levels(path: Path) -> None:
    """Accuracy against the fraction of channels kept, a line per level."""
    own = [r for r in latest(read_records(RECORDS)) if where(r) == HEADLINE and "keep" in r.setting]
    accuracy = {(r.setting["reducer"], r.setting["restorer"], r.setting["keep"]): r.result["accuracy"] for r in own}
    original = accuracy["none", "none", 1.0]
    keeps = sorted({keep for *_, keep in accuracy if keep < 1}, reverse=True)
    curves = {name: [(1.0, original), *((k, accuracy[*level, k]) for k in keeps)] for name, level in LEVELS.items()}
    network, _, images = HEADLINE
    title = f"{network}, all channels, {images:,} test images, no training"
    accuracy_plot(path, curves, original=original, title=title)


def sheets(path: Path, shown: int = 16, zoom: int = 6, steps: int = 250) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="draw them into a folder that is deleted")
    if parser.parse_args().smoke:
        with tempfile.TemporaryDirectory() as folder:
            levels(Path(folder) / "levels.png")
            sheets(Path(folder) / "images.png", steps=2)
        print("pictures: ok")
        return
    PICTURES.mkdir(exist_ok=True)
    levels(PICTURES / "levels.png")
    sheets(PICTURES / "images.png")


if __name__ == "__main__":
    main()
