"""Claim: with their statistics repaired, fused networks beat pruned and folded ones; which normalisation is best?

Pruned, Intra-Fusion with each normalisation, and folded; each alone and with each repair of the statistics; the whole
network and its block-inner channels; on the full test sets of CIFAR-10 and CIFAR-100. Nothing is trained. `closed_form`
needs no data; `reestimate` and `repair` look at 256 unlabelled training images. Importance is l1; groups are described
by the original weights ("joint"), norms folded (what the authors of folding run themselves: rivals.py). Resumable: what
is in the records is not measured again.
Records: benchmarks/records/paper_cifar.jsonl; `intrafusion report` shows them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _data import has_data, load_apart
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from intrafusion.errors import IntrafusionError
from intrafusion.lab import zoo
from intrafusion.lab.bench import Cluster, read_records, sweep
from intrafusion.lab.bench.records import INNER, WHOLE
from intrafusion.lab.experiments import Options, Subject
from intrafusion.lab.experiments.reduction import measure_reduction, original_setting, reduction_settings
from intrafusion.lab.experiments.subject import Measurement
from intrafusion.lab.zoo import Images
from intrafusion.network.inputs import Inputs

RECORDS = Path(__file__).parent / "records" / "paper_cifar.jsonl"
EXPERIMENT = "paper_cifar"
NETWORKS = ("cifar10_resnet20", "cifar10_resnet32", "cifar100_resnet20", "cifar10_densenet100")
SCOPES = {WHOLE: (0.9, 0.8, 0.7), INNER: (0.7, 0.5)}
NORMALIZATIONS = ("source", "target", "function")
ALONE = ("select", *(f"intrafusion:normalization={name}" for name in NORMALIZATIONS), "fold:raw=false")
REPAIRS = ("", "+closed_form", "+reestimate", "+repair")
SEEN = 512  # training images to load; the first 256 are looked at


def subject(network: str, images: int | None) -> Subject:
    test, seen = load_apart(network, images, SEEN)
    return Subject(
        network,
        zoo.build(network, pretrained=True),
        Inputs.of(zoo.example_input(network)),
        channels_last(test),
        channels_last(seen),
    )


def channels_last(data: Images) -> Images:
    """The same images in the layout in which these networks run fastest on a CPU (by a fifth to two fifths)."""
    return replace(data, images=data.images.to(memory_format=torch.channels_last))


def settings(network: Subject, repairs: Sequence[str] = REPAIRS) -> Iterator[dict[str, Any]]:
    """The original, then each scope and keep with all methods."""
    methods = tuple(reducer + repair for reducer in ALONE for repair in repairs)
    yield original_setting(network)
    for scope, keeps in SCOPES.items():
        options = Options(keep=keeps, method=methods)
        yield from (s for s in reduction_settings(network, options, [scope]) if s["group"] == scope)


def run(
    networks: Sequence[str], images: int | None, records: Path, cluster: Cluster | None, only: int | None = None
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for name in networks:
        network = subject(name, images)
        with Progress(*columns) as bar:
            task = bar.add_task(name, total=None)

            def show(_: str, done: int, total: int, task: Any = task, bar: Progress = bar) -> None:
                bar.update(task, completed=done, total=total)

            wanted = list(settings(network))[:only]
            run_one = Measurement({name: network}, measure_reduction)
            try:
                sweep(EXPERIMENT, wanted, run_one, records, cluster=cluster, progress=show)
            except IntrafusionError as error:  # says which settings failed; the others are recorded
                print(f"{name}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--images", type=int, help="test images; all of them by default")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ray", metavar="ADDRESS", help='run on Ray: "local", or the address of a cluster')
    parser.add_argument("--smoke", action="store_true", help="six measurements on 50 images, recorded nowhere")
    options = parser.parse_args()
    if not has_data():
        return
    torch.set_num_threads(options.threads)
    if options.smoke:
        smoke()
        return
    run(options.networks, options.images, options.records, Cluster(options.ray) if options.ray else None)


def smoke() -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "smoke.jsonl"
        run(("cifar10_resnet20",), 50, records, None, only=6)
        for record in read_records(records):
            print(record.setting["keep"], record.setting["method"], f"{record.result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
