"""Networks in wrappers, in inference mode, with gradients inside; and what is no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from breadth import spread
from torch import Tensor, nn

import intrafusion
from intrafusion import FolderError, ModelError, compress, compress_in_steps, inspect, load
from intrafusion.errors import NoInputsError
from intrafusion.factorize import factorize
from intrafusion.network.wrappers import unwrap
from intrafusion.observe.observe import observe
from intrafusion.restore import calibrate

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "both": lambda net: nn.DataParallel(compiled(net)),
}


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_network_comes_back_wrapped_with_plain_names(wrapper: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    model = WRAPPERS[wrapper](net)
    plain, small = compress(net, X, 0.5, restore=None), compress(model, X, 0.5, restore=None)
    assert type(small.model) is type(model)
    assert small.plan.shapes == plain.plan.shapes
    assert torch.equal(small.model(X), plain.model(X))
    assert net.a.out_features == 32
    small.save(tmp_path / "s")
    for target in (Net, lambda: WRAPPERS[wrapper](Net())):
        assert torch.equal(load(tmp_path / "s", target).eval()(X), plain.model(X))
    in_place = compress(model, X, 0.5, restore=None, inplace=True)
    assert in_place.model is model
    assert torch.equal(model(X), plain.model(X))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_module_in_a_wrapper_stays_in_its_mode(wrapper: str) -> None:
    """A fresh wrapper trains, whatever is in it; a frozen norm in a network that trains does not."""
    net = Net().eval()
    model = WRAPPERS[wrapper](net)
    net.b.train()
    small = compress(model, X, 0.5, restore=None).model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert not unwrap(small).a.training


def test_other_functions_unwrap_too() -> None:
    model = nn.DataParallel(Net().eval())
    graph = inspect(model, X)
    assert [g.name for g in graph.reducible] == ["a", "b"]
    plan = intrafusion.decide(model, graph, intrafusion.Recipe.of(restore=None))
    assert type(intrafusion.apply(model, plan, X).model) is nn.DataParallel
    assert type(compress_in_steps(model, X, 0.5, 2, restore=None).model) is nn.DataParallel
    assert intrafusion.trace.trace(model, X)["a"].size == 32
    assert type(factorize(model, X).model) is Net


def test_compiled_parts_run_eagerly() -> None:
    model = Net().eval()
    model.compile(backend="eager")
    model(X)
    assert compress(model, X, 0.5, restore=None).model.a.out_features == 16


def test_distributed_wrappers_are_left_off(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net().eval())
        small = compress(model, X, 0.5, restore=None)
        assert type(small.model) is Net
        assert "wrap it again in every process" in small.notes[-1]
        with pytest.raises(ModelError, match="pass the network inside it"):
            compress(model, X, 0.5, restore=None, inplace=True)
    finally:
        torch.distributed.destroy_process_group()


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Net, r"got the class Net; that is a class; make an object of it, Net\(...\)"),
        (lambda: Net().state_dict(), "got .*; build the network, and call load_state_dict"),
        (lambda: "net.pt", "got 'net.pt'; build the network, and load its weights"),
        (lambda: None, "got None; pass the network"),
        (scripted, "is TorchScript, .* expected an eager network"),
        (lambda: nn.Sequential(scripted(), nn.ReLU()), r"'0' \(RecursiveScriptModule\) is TorchScript"),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)), "'0.weight' is not initialised yet"),
        (lambda: nn.LazyBatchNorm1d(), "not initialised yet, it belongs to a lazy module; run the network once"),
    ],
    ids=["class", "state", "path", "none", "script", "script inside", "lazy", "lazy norm"],
)
def test_what_is_no_network(make: Callable[[], Any], message: str) -> None:
    functions = (compress, inspect, intrafusion.trace.trace, compress_in_steps, factorize)
    for function in functions:
        with pytest.raises(ModelError, match=message):
            function(make(), X)
    with pytest.raises(ModelError, match=message):
        intrafusion.fuse([make(), make()], X)


def test_a_network_in_shards_is_refused() -> None:
    sharded = type("FullyShardedDataParallel", (Net,), {})
    with pytest.raises(ModelError, match="is in shards; gather it"):
        unwrap(nn.Sequential(sharded()))


# ---- inference mode, gradients inside -------------------------------------------------------------------------------


class Inferring(Net):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Normed(Net):
    """Has a batch norm, so that images would be made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("where", ["weights", "forward", "norm", "call"])
def test_inference_mode(where: str, inplace: bool) -> None:
    with torch.inference_mode(where in ("weights", "call")):
        model = {"forward": Inferring, "norm": Normed}.get(where, Net)().eval()
    with torch.inference_mode(where == "call"):
        small = compress(model, X, 0.5, reducer="select", inplace=inplace)
        assert torch.is_inference_mode_enabled() == (where == "call")
    assert small.model.a.out_features == 16
    assert (small.model is model) == inplace
    with torch.no_grad():
        assert small.model(X).shape == (16, 3)
    if where == "norm":
        assert "its forward takes no gradients" in str(small.restored[0].note)


class Branching(nn.Module):
    """A norm, a sum, and a weight that a function multiplies with; on the way, perhaps, in inference mode."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.norm, self.b = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
        self.w, self.head = nn.Parameter(torch.randn(32, 24) / 6), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(self.mode != "plain"):
            x = F.relu(self.norm(self.a(x)))
        with torch.inference_mode(self.mode == "inside"):
            x = x.clone()
            x = x + self.b(x)
            return self.head(F.relu(x @ self.w))


def make_branching(mode: str) -> nn.Module:
    torch.manual_seed(0)
    return Branching(mode).eval()


class InferringLoader:
    def __iter__(self) -> Iterator[Tensor]:
        with torch.inference_mode():
            yield from (2 * part for part in IMAGES.split(25))


IMAGES = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
GIVEN: dict[str, Callable[[], Any]] = {
    "plain": lambda: 2 * IMAGES,
    "made there": lambda: 2 * IMAGES,
    "loader": InferringLoader,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "keep": {"keep": 0.5},
    "target": {"target": {"macs": 0.5}},
    "eliminate": {"keep": 0.5, "reducer": "eliminate"},
    "little memory": {"keep": 0.5, "memory": "200KB"},
    "contribution": {"keep": 0.5, "importance": "contribution", "reducer": "select"},
    "chip": {"keep": 0.5, "importance": "chip", "reducer": "select", "restore": "repair"},
}


MODES = [
    *(("inside", "plain", False), ("first", "plain", False), ("plain", "made there", False)),
    *(("plain", "loader", False), ("plain", "plain", True), ("inside", "loader", True)),
]


@pytest.mark.parametrize(("mode", "options"), spread(MODES, [*OPTIONS]))
def test_inference_mode_anywhere_changes_no_number(mode: tuple[str, str, bool], options: str) -> None:
    how, (made, given, called) = OPTIONS[options], mode
    images = [2 * part for part in IMAGES.split(25)] if given == "loader" else 2 * IMAGES
    plain = compress(make_branching("plain"), X, inputs=images, **how)
    with torch.inference_mode(given != "plain"):
        inputs = GIVEN[given]()
    with torch.inference_mode(called):
        small = compress(make_branching(made), X, inputs=inputs, **how)
    assert small.plan.sizes == plain.plan.sizes != {}
    for name, tensor in small.model.state_dict().items():
        assert not tensor.is_inference()
        assert torch.allclose(tensor, plain.model.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize("called", [False, True])
def test_other_functions_in_inference_mode(called: bool) -> None:
    net = make_branching("first")
    with torch.inference_mode(called):
        graph = intrafusion.trace.trace(net, X)
        seen = calibrate(net, X, images=2 * IMAGES)
        assert seen.moments_of(graph).keys() >= {"a"}
        assert observe(net, graph, graph.groups, IMAGES, ["activations", "contributions"])["a"].activations is not None
        assert factorize(net, X).model(X).shape == (16, 3)
        fused = intrafusion.fuse([net, make_branching("plain")], X)
        assert not any(t.is_inference() for t in fused.model.parameters())
        with pytest.raises(NoInputsError, match="its forward takes no gradients"):
            calibrate(net, X, "synthetic")


class Forces(nn.Module):
    """The gradient of an energy with respect to the input is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = torch.tanh(self.net(x))[:, 0]
            return energy, -torch.autograd.grad(energy.sum(), x)[0]


@pytest.mark.parametrize("restore", ["auto", "images", "repair"])
def test_a_forward_that_differentiates_itself(restore: str) -> None:
    model = Forces().eval()
    with torch.no_grad():
        for layer in (model.net.a, model.net.b):
            layer.weight[16:] = 0
            layer.bias[16:] = 0
        for layer in (model.net.b, model.net.c):
            layer.weight[:, 16:] = 0
    images = None if restore == "auto" else torch.randn(64, 6)
    small = compress(model, X, 0.5, images=images, restore=restore, reducer="select")
    assert small.model.net.b.out_features == 16
    for ours, theirs in zip(model(X), small.model(X), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_a_class_that_needs_arguments(tmp_path: Path) -> None:
    class Wide(Net):
        def __init__(self, width: int, classes: int) -> None:
            super().__init__(width)

    compress(Wide(32, 3), X, 0.5, restore=None).save(tmp_path / "s")
    with pytest.raises(
        ModelError, match=r"'Wide' cannot be called without .*; give a factory, lambda: Net\(...\), or an"
    ):
        load(tmp_path / "s", Wide)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="expected a network, its class or a factory of it, got a int"):
        load(tmp_path / "s", 3)  # type: ignore[arg-type]
    assert load(tmp_path / "s", lambda: Wide(32, 3)).a.out_features == 16


def test_missing_folders_are_named_first(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="nothing"):
        load(tmp_path / "nothing", Net)
