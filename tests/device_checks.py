"""What `test_device.py` runs. On machines without a GPU on a device that every machine has (`elsewhere.py`), which
computes on the CPU and refuses, as a GPU does, what mixes devices; with one, there too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import intrafusion
import intrafusion.restore.calibration as calibration
from intrafusion import Compressed, Recipe, compress, compress_in_steps
from intrafusion.errors import ModelError
from intrafusion.factorize import factorize
from intrafusion.graph import ChannelGraph
from intrafusion.importance import IMPORTANCES
from intrafusion.io.folder import load_plan, save_plan
from intrafusion.lab.zoo import Images
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.drift import drift
from intrafusion.measure.latency import latency_ms
from intrafusion.reduce import REDUCERS
from intrafusion.restore import LEVELS, RESTORERS, Distill, Synthesis, calibrate, load_images, save_images
from intrafusion.train import Training, train_

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 5


class Network(nn.Module):
    """A stream with a block, a depthwise convolution, a norm of its own kind, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.inner_norm = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.outer, self.outer_norm = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.point = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 10, 1)
        self.hidden, self.layer_norm, self.classifier = nn.Linear(10, 14), nn.LayerNorm(14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer_norm(self.outer(self.inner_norm(self.inner(x)).relu()))
        x = nn.functional.gelu(self.point(self.depthwise(x).relu()))
        return self.classifier(nn.functional.silu(self.layer_norm(self.hidden(x.mean((2, 3))))))


class Place:
    """A device, and how networks get there."""

    def __init__(self, device: torch.device, move: Callable[[nn.Module], nn.Module]) -> None:
        self.device, self.move = device, move

    def network(self) -> nn.Module:
        return self.move(network())


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@functools.cache
def graph() -> ChannelGraph:
    """Of every network here, on whatever device: it holds no tensors."""
    return intrafusion.inspect(network(), X)


@dataclass(frozen=True)
class FewImages(Synthesis):
    images: int = 8
    steps: int = 2


@pytest.fixture(params=["elsewhere", GPU])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(calibration, "Synthesis", FewImages)
    if request.param == "cuda":
        yield Place(torch.device("cuda", 0), lambda model: model.cuda())
    else:
        with elsewhere.computing(monkeypatch) as device:
            yield Place(device, elsewhere.moved_)


def check_same(place: Place, here: nn.Module, there: nn.Module) -> None:
    """The network is still there, and gives what the one that was made on the CPU gives."""
    tensors = [*there.parameters(), *there.buffers()]
    assert {t.device for t in tensors} == {place.device}
    found, expected = there(X.to(place.device)).cpu().detach(), here(X).detach()
    close = 1e-6 if place.device.type == elsewhere.NAME else 1e-2
    assert float((found - expected).abs().max() / expected.abs().max()) < close


def check_compressed(place: Place, **options: Any) -> Compressed:
    there = {k: v.to(place.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    here = compress(network(), X, **options)
    small = compress(place.network(), X.to(place.device), **there)
    check_same(place, here.model, small.model)
    return small


def check_decided(place: Place, **options: Any) -> None:
    """The maps are those that are found on the CPU, from the same weights and images."""
    recipe, found = Recipe.of(keep=0.5, **options), []
    for model, device in ((network(), torch.device("cpu")), (place.network(), place.device)):
        images = IMAGES.to(device)
        calibration = calibrate(model, X.to(device), "images", images) if recipe.needs_moments else None
        found.append(intrafusion.decide(model, graph(), recipe, images=images, calibration=calibration))
    close = 1e-5 if place.device.type == elsewhere.NAME else 1e-2
    for name, expected in found[0].maps.items():
        for part in ("merge", "unmerge", "shift", "scale"):
            here, there = getattr(expected, part), getattr(found[1].maps[name], part)
            assert (here is None) == (there is None)
            if there is not None:
                torch.testing.assert_close(there.cpu(), here, atol=close, rtol=close)


def test_the_device_refuses_tensors_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere.computing(monkeypatch) as device:
        model, x = elsewhere.moved_(network()), X.to(device)
        assert model(x).device == device
        assert torch.zeros(3, device=device).device == device
        assert torch.zeros(3).device.type == "cpu"
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            model(X)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            X + x
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            x.numpy()
        assert torch.equal(model(x).cpu(), network()(X))


def test_an_example_of_the_cpu_is_an_error_that_says_so(place: Place) -> None:
    told = "does not run on the example inputs .* (on (one|the same) device|should be the same)"
    with pytest.raises(ModelError, match=told):
        compress(place.network(), X, 0.5)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_reducers(place: Place, reducer: str) -> None:
    check_decided(place, reducer=reducer)


@pytest.mark.parametrize("restore", LEVELS)
def test_levels_of_restoring(place: Place, restore: str) -> None:
    given = {"images": IMAGES} if restore in ("images", "mirrored") else {}
    small = check_compressed(place, keep=0.5, restore=restore, **given)
    assert small.restored


@pytest.mark.parametrize("name", [name for name in RESTORERS if name not in LEVELS])
def test_restorers(place: Place, name: str) -> None:
    reducer = "select" if name == "lbyl" else "intrafusion"  # it makes up for channels that are gone
    plan, restored = intrafusion.decide(network(), graph(), Recipe.of(keep=0.5, reducer=reducer)), []
    for model, device in ((network(), torch.device("cpu")), (place.network(), place.device)):
        restored.append(intrafusion.apply(model, plan, X.to(device), graph=graph()))
        restorer = Distill(steps=8) if name == "distill" else RESTORERS[name]()
        restorer(restored[-1], model, graph(), IMAGES.to(device))
    check_same(place, restored[0].model, restored[1].model)
    assert not torch.equal(restored[0].model(X), intrafusion.apply(network(), plan, X, graph=graph()).model(X))


def test_images_of_the_cpu_go_where_the_network_is(place: Place) -> None:
    options: dict[str, Any] = {"reducer": "select", "include": "inner"}
    here = compress(network(), X, 0.5, images=IMAGES, **options)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)
    check_same(place, here.model, compress(place.network(), X.to(place.device), 0.5, images=loader, **options).model)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_importances(place: Place, importance: str) -> None:
    check_decided(place, reducer="select", importance=importance, exclude=["hidden", "point"])


def short() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()


def test_targets(place: Place) -> None:
    options: dict[str, Any] = {"target": {"params": 0.6, "macs": 0.6}}
    here = compress(short(), X, images=IMAGES, **options)
    there = compress(place.move(short()), X.to(place.device), images=IMAGES.to(place.device), **options)
    check_same(place, here.model, there.model)


def test_a_latency_target(place: Place) -> None:
    target = {"latency_ms": 1e-3}
    small = compress(place.move(short()), X.to(place.device), target=target, restore=None)
    assert {p.device for p in small.model.parameters()} == {place.device}


def test_fusing_two_networks(place: Place) -> None:
    def other() -> nn.Module:
        torch.manual_seed(1)
        return Network().eval()

    here = intrafusion.fuse([network(), other()], X, using="activations", images=IMAGES)
    there = intrafusion.fuse(
        [place.network(), place.move(other())], X.to(place.device), using="activations", images=IMAGES.to(place.device)
    )
    check_same(place, here.model, there.model)


def test_low_rank(place: Place) -> None:
    here = factorize(network(), X, "share")
    check_same(place, here.model, factorize(place.network(), X.to(place.device), "share").model)


def test_saved_and_loaded(place: Place, tmp_path: Path) -> None:
    small = compress(place.network(), X.to(place.device), 0.5, restore="noise")
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", network())
    assert {t.device.type for t in loaded.parameters()} == {"cpu"}
    check_same(place, loaded, small.model)


def test_a_plan_is_carried_out_on_another_device(place: Place, tmp_path: Path) -> None:
    plan = compress(place.network(), X.to(place.device), 0.5, reducer="fold", restore=None).plan
    save_plan(plan, tmp_path / "plan")
    read = load_plan(tmp_path / "plan")
    here = intrafusion.apply(network(), plan, X)
    check_same(place, here.model, intrafusion.apply(place.network(), read, X.to(place.device)).model)


def test_made_images_are_saved(place: Place, tmp_path: Path) -> None:
    images = Synthesis(images=4, steps=1)(place.network(), X.to(place.device))
    assert images.device == place.device
    save_images(images, tmp_path / "images.safetensors")
    assert torch.equal(load_images(tmp_path / "images.safetensors"), images.cpu())


def test_training(place: Place) -> None:
    here, there = network(), place.network()
    how = Training(epochs=1, steps=2, batch_size=20, lr=1e-3)
    train_(here, Images(IMAGES, LABELS), how)
    train_(there, Images(IMAGES, LABELS), how)
    check_same(place, here, there)


def test_steps(place: Place) -> None:
    options: dict[str, Any] = {"steps": 2, "restore": None, "include": "inner"}
    here = compress_in_steps(network(), X, 0.5, **options)
    check_same(place, here.model, compress_in_steps(place.network(), X.to(place.device), 0.5, **options).model)


def test_measures(place: Place) -> None:
    there = place.network()
    assert accuracy(there, IMAGES, LABELS) == accuracy(network(), IMAGES, LABELS)
    assert drift(there, place.network(), IMAGES.to(place.device)).abs().max() == 0
    latency_ms(there, X.to(place.device), repeats=1, warmup=0)
