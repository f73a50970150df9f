"""What the README's example prints of `cifar10_resnet20` on 256 training images, without what depends on the machine.

Records: benchmarks/records/example.jsonl; `python benchmarks/tables.py` puts the last one into the README.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from _data import has_data

import intrafusion
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record

RECORDS = Path(__file__).parent / "records" / "example.jsonl"
NETWORK, MACS = "cifar10_resnet20", 0.5


def show_summary(printed: str) -> list[str]:
    """The lines of what is printed, down to that on restoring, without times."""
    head = printed.partition("\n\n")[0]
    head = re.sub(r"^(latency|warning).*\n(?: .*\n)*", "", head + "\n", flags=re.MULTILINE)
    return re.sub(r", [\d.]+ s,", ",", head).splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="an untrained network on noise, recorded nowhere")
    options = parser.parse_args()
    if not options.smoke and not has_data():
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    example = zoo.example_input(NETWORK)
    images = torch.randn(64, *example.shape[1:]) if options.smoke else zoo.load_data(NETWORK, "train", limit=256).images
    model = zoo.build(NETWORK, pretrained=not options.smoke)
    small = intrafusion.compress(model, example, target={"macs": MACS}, inputs=images, progress=False)
    lines = show_summary(str(small))
    print("\n".join(lines))
    if not options.smoke:
        setting = {"network": NETWORK, "macs": MACS, "images": len(images)}
        append_record(options.records, Record("example", setting, {"printed": lines}))


if __name__ == "__main__":
    main()
