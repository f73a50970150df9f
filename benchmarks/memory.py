"""Claim: what `compress` takes of memory grows far less than the images that it is given.

`intrafusion.compress` at keep .9 with everything that it does (trace, proof, choice on the images, surgery, solving
layers, errors on held-out images), on noise images that a loader makes as they are read: the largest resident set
(VmHWM) above what the process held before, imports and the network left out. Each run is a process of its own, with
one thread.
  tf_efficientnet_lite0  with its ImageNet weights where the package is installed (benchmarks/imagenet.py), else random
                         ones: 64, 256 and 1,024 images of 96 pixels, 256 of 224.
  resnet50               of timm, random weights: 256 images of 224 pixels.
Resumable: what is in the records is not measured again. Records: benchmarks/records/memory.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagenet
import torch
from large import read_status
from torch import Tensor, nn
from torch.utils.data import DataLoader

import intrafusion
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.network.sources import find_timm

RECORDS = Path(__file__).parent / "records" / "memory.jsonl"
EXPERIMENT, KEEP, BATCH = "memory", 0.9, 32
LITE, RESNET = imagenet.NETWORK, "resnet50"
CASES = ((LITE, 96, 64), (LITE, 96, 256), (LITE, 96, 1024), (LITE, 224, 256), (RESNET, 224, 256))
SMOKE = (("resnet18", 64, 64),)


@dataclass
class NoiseImages:
    """A data set of which nothing is kept."""

    count: int
    pixels: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, self.pixels, self.pixels, generator=generator)


def make_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == LITE and imagenet.find_package():
        with torch.no_grad():
            return imagenet.load_network()
    return find_timm(name).create_model(name).eval()


def run_inside(name: str, pixels: int, count: int) -> dict[str, Any]:
    """Of this process: what one reduction took."""
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    intrafusion.compress(tiny, torch.zeros(1, 3, 16, 16), 0.5, inputs=torch.randn(64, 3, 16, 16))  # imports
    model = make_network(name)
    images: Any = DataLoader(NoiseImages(count, pixels), batch_size=BATCH)  # type: ignore[arg-type]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    base, start = read_status("VmRSS"), time.process_time()
    intrafusion.compress(model, torch.zeros(1, 3, pixels, pixels), KEEP, inputs=images)
    seconds = time.process_time() - start
    return {"peak_mb": round(read_status("VmHWM") - base), "base_mb": round(base), "cpu_s": round(seconds, 1)}


def measure(*what: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--inside", *map(str, what)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def settings(cases: tuple[tuple[str, int, int], ...]) -> Iterator[dict[str, Any]]:
    for network, pixels, images in cases:
        yield {"network": network, "pixels": pixels, "images": images, "keep": KEEP}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--only", nargs="+", default=None, metavar="NETWORK:PIXELS:IMAGES")
    parser.add_argument("--smoke", action="store_true", help="a small network, recorded nowhere")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if importlib.util.find_spec("timm") is None:
        print("skipped: timm is not installed; pip install intrafusion[timm].")
        return
    if options.inside:
        torch.set_num_threads(1)
        name, *numbers = options.inside
        print(json.dumps(run_inside(name, *map(int, numbers))))
        return
    finished = set() if options.smoke else finished_keys(read_records(options.records))
    for setting in settings(SMOKE if options.smoke else CASES):
        name = ":".join(str(setting[part]) for part in ("network", "pixels", "images"))
        if key_of(EXPERIMENT, setting) in finished or (options.only is not None and name not in options.only):
            continue
        record = Record(EXPERIMENT, setting, measure(*(setting[part] for part in ("network", "pixels", "images"))))
        print(record.setting, record.result, flush=True)
        if not options.smoke:
            append_record(options.records, record)


if __name__ == "__main__":
    main()
