"""Claim: on an accelerator the same networks come out as on the CPU, sooner, and they are faster there.

Four stages, each of which may fail without costing the others; one record a measurement, with the card's name:
  correctness  every reducer, then every restorer, on four networks in float32, on the CPU and on the accelerator from
               the same inputs: the share of the output channels that both plans keep, the relative difference (2-norm)
               of what both small networks give, and each one's output error against the original. The reduced networks
               in half precision beside them, against the original in float32. Without TF32.
  seconds      of each step of a compression (trace, choice, surgery, least squares on --images images) on a ResNet-50
               and a ViT at 224 pixels, on the accelerator and on the CPU of the same machine.
  latency      medians of one forward pass before and after at keep 0.5, sizes as cut and rounded to multiples of 32;
               in eager mode and compiled, fp32 and bf16 (channels last), at three batch sizes.
  train        the paper's VGG11-BN and ResNet-18 on CIFAR-10 (random crops and mirror images, SGD with Nesterov
               momentum 0.9, one cycle, bf16) for --seconds each, weights kept in half precision in --checkpoints; then
               both without training at keep 0.9 to 0.5, on all test images, for several reducers and restorers.
Without an accelerator, and with --smoke, small networks go through the same code on the CPU; --smoke records nothing.
Needs `pip install intrafusion[timm]`; correctness and train also INTRAFUSION_DATA.
Records: benchmarks/records/gpu.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import intrafusion
from intrafusion import Compressed, Recipe
from intrafusion.cli.models import resolve
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record
from intrafusion.lab.zoo import Images
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.drift import output_error
from intrafusion.measure.latency import latencies_ms
from intrafusion.network.inputs import Inputs
from intrafusion.restore import LeastSquares

RECORDS = Path(__file__).parent / "records" / "gpu.jsonl"
CHECKED = ("cifar10_resnet20", "cifar10_resnet20_pad", "cifar10_densenet100", "cifar10_vit")
REDUCERS = ("select", "intrafusion", "fold", "pivot")
RESTORERS = ("closed_form", "noise", "reestimate", "repair", "least_squares")
SIZED = {"timm:resnet50": 224, "timm:vit_small_patch16_224": 224}  # and pixels
TRAINED = ("vgg11_bn", "resnet18")
KEEPS = (0.9, 0.8, 0.7, 0.5)
METHODS = (
    ("select", None, 0),
    ("intrafusion", None, 0),
    ("fold", None, 0),
    ("pivot", "noise", 0),
    ("pivot", "auto", 256),
)


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    device: torch.device
    images: int = 256
    repeats: int = 30
    batches: tuple[int, ...] = (1, 32, 256)
    seconds: float = 60.0
    smoke: bool = False

    @property
    def card(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

    def record(self, setting: dict[str, Any], **result: Any) -> Record:
        return Record("gpu", {**setting, "device": self.card}, result)


def seconds(action: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What it gives, and how long it took to the end on the device."""
    start = time.perf_counter()
    given = action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return given, round(time.perf_counter() - start, 4)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- correctness


def correctness(scale: Scale) -> Iterator[Record]:
    if not os.environ.get("INTRAFUSION_DATA"):
        print("skipped: correctness reads trained networks from INTRAFUSION_DATA, which is not set.")
        return
    torch.backends.cudnn.allow_tf32 = False
    for name in CHECKED[: 1 if scale.smoke else None]:
        seen, unseen = zoo.load_data(name, "train", limit=2 * scale.images).images.split(scale.images)
        ways = [(reducer, None) for reducer in REDUCERS] + [("pivot", restorer) for restorer in RESTORERS]
        for reducer, restorer in ways[-1:] if scale.smoke else ways:
            yield compare_devices(scale, name, reducer, restorer, seen, unseen)


def compare_devices(
    scale: Scale, name: str, reducer: str, restorer: str | None, seen: Tensor, unseen: Tensor
) -> Record:
    original = zoo.build(name, pretrained=True).eval()
    expected = run(original, unseen)

    def compress(device: torch.device) -> Compressed:
        images = None if restorer in (None, "closed_form", "noise") else seen
        model, x = copy.deepcopy(original).to(device), seen[:2].to(device)
        return intrafusion.compress(model, x, keep=0.7, reducer=reducer, restore=restorer, images=images)

    ours, taken = seconds(lambda: compress(scale.device), scale.device)
    theirs, on_cpu = seconds(lambda: compress(torch.device("cpu")), torch.device("cpu"))
    here, there = run(ours.model, unseen), run(theirs.model, unseen)
    half = run(copy.deepcopy(ours.model).to(scale.device, half_of(scale.device)), unseen)
    setting = {"what": "correctness", "network": f"zoo:{name}", "reducer": reducer, "restore": restorer, "keep": 0.7}
    return scale.record(
        setting,
        same_channels=round(agreement(ours, theirs), 4),
        difference=relative(here, there),
        error=output_error([here], [expected]),
        error_on_cpu=output_error([there], [expected]),
        error_in_half=output_error([half], [expected]),
        seconds=taken,
        seconds_on_cpu=on_cpu,
    )


def half_of(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def run(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs in float32 on the CPU, in evaluation mode."""
    first = next(model.parameters())
    with torch.inference_mode():
        return torch.cat([model.eval()(part.to(first)).float().cpu() for part in images.split(256)])


def agreement(a: Compressed, b: Compressed) -> float:
    """Share of the kept channels that both plans describe by the same channel, over all groups."""
    same = total = 0
    for name, mine in a.plan.maps.items():
        other = b.plan.maps.get(name)
        total += len(mine.merge)
        if other is not None and other.merge.shape == mine.merge.shape:
            same += int((strongest(mine.merge) == strongest(other.merge)).sum())
    return same / max(total, 1)


def strongest(matrix: Tensor) -> Tensor:
    return matrix.detach().cpu().abs().argmax(1)


# --- seconds of each step


def step_seconds(scale: Scale) -> Iterator[Record]:
    for name, pixels in sized(scale).items():
        for device in dict.fromkeys((scale.device, torch.device("cpu"))):
            yield time_steps(scale, name, pixels, device)


def sized(scale: Scale) -> dict[str, int]:
    return {"timm:resnet18": 64} if scale.smoke else SIZED


def time_steps(scale: Scale, name: str, pixels: int, device: torch.device) -> Record:
    model, x = resolve(name).build().eval().to(device), torch.randn(2, 3, pixels, pixels, device=device)
    images = torch.randn(scale.images, 3, pixels, pixels)
    recipe = Recipe.of(keep=0.5, restore=None)
    run(model, images[:2])
    _, forward = seconds(lambda: run(model, images), device)
    graph, traced = seconds(lambda: intrafusion.inspect(model, x), device)
    plan, chosen = seconds(lambda: intrafusion.decide(model, graph, recipe, Inputs.of(x)), device)
    small, applied = seconds(lambda: intrafusion.apply(model, plan, x, graph=graph), device)
    _, solved = seconds(lambda: LeastSquares()(small, model, graph, images), device)
    return Record(
        "gpu",
        {"what": "seconds", "network": name, "pixels": pixels, "images": scale.images, "device": named(device, scale)},
        {"forward_s": forward, "trace_s": traced, "decide_s": chosen, "apply_s": applied, "restore_s": solved},
    )


def named(device: torch.device, scale: Scale) -> str:
    return scale.card if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


# --- latency


def latency(scale: Scale) -> Iterator[Record]:
    for name, pixels in sized(scale).items():
        model, x = resolve(name).build().eval(), torch.randn(1, 3, pixels, pixels)
        small = {
            round_to: intrafusion.compress(model, x, keep=0.5, reducer="select", restore=None, round_to=round_to)
            for round_to in (None, 32)
        }
        macs = {key: found.after.macs / found.before.macs for key, found in small.items()}
        for dtype in (torch.float32, torch.bfloat16):
            for compiled in (False,) if scale.smoke else (False, True):
                nets = {"before": model, **{f"round_to {key}": found.model for key, found in small.items()}}
                yield from time_networks(scale, name, pixels, nets, macs, dtype, compiled)


def time_networks(
    scale: Scale,
    name: str,
    pixels: int,
    nets: dict[str, nn.Module],
    macs: dict[int | None, float],
    dtype: torch.dtype,
    compiled: bool,
) -> Iterator[Record]:
    ready = {key: prepare(net, scale.device, dtype, compiled) for key, net in nets.items()}
    for batch in scale.batches[-1:] if compiled else scale.batches:
        x = torch.randn(batch, 3, pixels, pixels).to(scale.device, dtype, memory_format=torch.channels_last)
        taken = dict(zip(ready, latencies_ms(list(ready.values()), x, repeats=scale.repeats), strict=True))
        setting = {"network": name, "pixels": pixels, "batch": batch, "dtype": str(dtype)[6:], "compiled": compiled}
        yield scale.record(
            {"what": "latency", **setting},
            **{f"{key}, ms": round(ms, 3) for key, ms in taken.items()},
            **{f"round_to {key}, MACs": round(ratio, 3) for key, ratio in macs.items()},
        )


def prepare(net: nn.Module, device: torch.device, dtype: torch.dtype, compiled: bool) -> nn.Module:
    net = copy.deepcopy(net).eval().to(device, dtype).to(memory_format=torch.channels_last)  # pyright: ignore
    if compiled:
        net.compile()
    return net


# --- training


def train(scale: Scale, checkpoints: Path) -> Iterator[Record]:
    if not os.environ.get("INTRAFUSION_DATA"):
        print("skipped: train reads CIFAR-10 from INTRAFUSION_DATA, which is not set.")
        return
    for name in ("cifar10_resnet20",) if scale.smoke else TRAINED:
        limit = 128 if scale.smoke else None
        data, test = (zoo.load_data(name, split, limit=limit) for split in ("train", "test"))
        model, result = fit(scale, name, data)
        result["accuracy"] = accuracy(model, test.images, test.labels, batch_size=1000)
        yield scale.record({"what": "train", "network": f"zoo:{name}", "images": len(data)}, **result)
        if not scale.smoke:
            checkpoints.mkdir(parents=True, exist_ok=True)
            state = {key: t.half().cpu().contiguous() for key, t in model.state_dict().items() if t.is_floating_point()}
            save_file(state, checkpoints / f"{name}.safetensors")
        yield from cut(scale, name, model, data.images[: scale.images], test)


def fit(scale: Scale, name: str, data: Images) -> tuple[nn.Module, dict[str, Any]]:
    """One cycle over as many steps of images as the first ones say that the time allows."""
    torch.manual_seed(0)
    model = zoo.build(name).to(scale.device).to(memory_format=torch.channels_last).train()  # pyright: ignore
    images, labels = data.images.to(scale.device), data.labels.to(scale.device)
    size = 32 if scale.smoke else 512
    optimizer = torch.optim.SGD(model.parameters(), 0.4, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step() -> None:
        index = torch.randint(len(images), (size,), device=scale.device)
        batch = augment(images[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(scale.device.type, torch.bfloat16, enabled=not scale.smoke):
            loss = nn.functional.cross_entropy(model(batch), labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for group in optimizer.param_groups:
        group["lr"] = 0.01
    warm = 1 if scale.smoke else 20
    for _ in range(warm):
        step()
    _, taken = seconds(lambda: [step() for _ in range(warm)], scale.device)
    steps = 2 if scale.smoke else max(int(scale.seconds * warm / taken), 50)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=steps, pct_start=0.2)

    def go() -> None:
        for _ in range(steps):
            step()
            cycle.step()

    _, taken = seconds(go, scale.device)
    return model.eval(), {"steps": steps, "epochs": round(size * steps / len(images), 1), "seconds": taken}


def augment(images: Tensor) -> Tensor:
    """Random crops out of a border of 4 pixels, one offset for each 64 images, and mirror images."""
    padded = nn.functional.pad(images, (4,) * 4)
    size = images.shape[-1]
    parts = []
    for part in padded.split(64):
        top, left = torch.randint(9, (2,)).tolist()
        parts.append(part[..., top : top + size, left : left + size])
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    cropped = torch.cat(parts)
    return torch.where(mirrored, cropped.flip(-1), cropped)


def cut(scale: Scale, name: str, model: nn.Module, seen: Tensor, test: Images) -> Iterator[Record]:
    for reducer, restorer, count in METHODS[-1:] if scale.smoke else METHODS:
        for keep in KEEPS[:1] if scale.smoke else KEEPS:
            images = seen[:count] if count else None
            small, taken = seconds(
                lambda r=reducer, k=keep, i=images, s=restorer: intrafusion.compress(
                    model, seen[:2].to(scale.device), keep=k, reducer=r, restore=s, images=i, progress=False
                ),
                scale.device,
            )
            setting = {"what": "cut", "network": f"zoo:{name}", "reducer": reducer, "restore": restorer}
            yield scale.record(
                {**setting, "images": count, "keep": keep},
                accuracy=accuracy(small.model, test.images, test.labels, batch_size=1000),
                macs=round(small.after.macs / small.before.macs, 4),
                seconds=taken,
            )


STAGES = ("correctness", "seconds", "latency", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--images", type=int, default=256, help="that restoration sees")
    parser.add_argument("--seconds", type=float, default=60, help="of training, each network")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/gpu"), help="folder of the trained weights")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="small networks, one repeat, recorded nowhere")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    scale = Scale(device, options.images, seconds=options.seconds)
    if device.type == "cpu":
        print("no accelerator: the same code on small networks on the CPU.")
        scale = Scale(device, 16, 1, (1,), 1.0, smoke=True)
    run_stage = {
        "correctness": lambda: correctness(scale),
        "seconds": lambda: step_seconds(scale),
        "latency": lambda: latency(scale),
        "train": lambda: train(scale, options.checkpoints),
    }
    failed = []
    for stage in options.stages:
        try:
            for record in run_stage[stage]():
                print(stage, record.setting, record.result, flush=True)
                if not scale.smoke:
                    append_record(options.records, record)
        except Exception:  # lent time is short: the other stages are still worth having
            traceback.print_exc()
            failed.append(stage)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see the traces above.")


if __name__ == "__main__":
    main()
