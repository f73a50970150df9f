"""Tracing leaves the network, and PyTorch, exactly as they were found, and works on networks in any state."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gallery.core import Wired, conv_bn, image, pooled
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import intrafusion
from intrafusion.errors import ModelError
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.drift import output_rows
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import Memory, preserve_state
from intrafusion.trace import trace


def network() -> Any:
    """Batch norms with statistics, dropout, attention, a recurrent layer, a frozen layer, and a buffer that counts."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        net.calls += 1
        x = F.max_pool2d(net.drop(F.relu(net.b(F.relu(net.a(x))))), 4)
        x = net.layer(x.flatten(2).mT)
        return net.head(net.rnn(x)[0][:, -1])

    layer = nn.TransformerEncoderLayer(8, 2, 10, 0.2, batch_first=True)
    parts = {"a": conv_bn(3, 6), "b": conv_bn(6, 8), "drop": nn.Dropout(0.5), "layer": layer}
    net = Wired(wiring, **parts, rnn=nn.GRU(8, 5, batch_first=True), head=nn.Linear(5, 2), calls=torch.zeros(1))
    net.a.requires_grad_(False)
    return net


def broken() -> nn.Module:
    """Runs its batch norms, then raises."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        net.a(x)
        raise ZeroDivisionError("broken on purpose")

    return Wired(wiring, a=conv_bn(3, 6))


def attempt(model: nn.Module, x: Tensor | None = None) -> None:
    """Trace; a network that cannot run is refused."""
    x = image() if x is None else x
    if hasattr(model, "head"):
        trace(model, x)
    else:
        with pytest.raises(ModelError):
            trace(model, x)


def snapshot_of_values(model: nn.Module) -> list[tuple[Any, ...]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        (name, id(t), t.data_ptr(), t.dtype, t.stride(), t.requires_grad, t.grad is None, t.detach().clone())
        for name, t in tensors
    ]


def snapshot_of_hooks(model: nn.Module) -> list[Any]:
    names = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"]
    own = [(name, key, id(hook)) for m in model.modules() for name in names for key, hook in getattr(m, name).items()]
    shared = [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
    return [*own, *[sorted(d) for d in shared]]


def snapshot_of_modules(model: nn.Module) -> list[Any]:
    return [(name, id(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()]


def snapshot_of_torch() -> dict[str, Any]:
    backends = ("flash", "math", "mem_efficient", "cudnn")
    return {
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "sdp": [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in backends],
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "modes": len(_get_current_dispatch_mode_stack()),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.fixture(params=[network, broken], ids=["runs", "raises"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values_and_identities_stay(model: nn.Module, training: bool) -> None:
    model.train(training)
    before = snapshot_of_values(model)
    attempt(model)
    after = snapshot_of_values(model)
    assert [b[:-1] for b in before] == [a[:-1] for a in after]
    assert all(torch.equal(b[-1], a[-1]) for b, a in zip(before, after, strict=True))


def test_training_flags_stay_per_module(model: Any) -> None:
    model.train()
    model.a[1].eval()  # a frozen batch norm inside a network in training
    before = snapshot_of_modules(model)
    attempt(model)
    assert snapshot_of_modules(model) == before


def test_hooks_stay(model: Any) -> None:
    calls: list[str] = []
    model.a[0].register_forward_hook(lambda *_: calls.append("after"))
    model.a[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    model.a[0].register_full_backward_hook(lambda *_: None)
    before = snapshot_of_hooks(model)
    attempt(model)
    assert snapshot_of_hooks(model) == before
    assert calls[:2] == ["after", "before"]


def test_global_flags_and_random_numbers_stay(model: nn.Module) -> None:
    x = image()
    before = snapshot_of_torch()
    attempt(model, x)
    assert snapshot_of_torch() == before


def test_unusual_global_flags_stay() -> None:
    fast, grad = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.set_grad_enabled(False)
    try:
        models, x = [network(), broken()], image()
        before = snapshot_of_torch()
        for model in models:
            attempt(model, x)
        assert snapshot_of_torch() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.cuda.enable_flash_sdp(True)
        torch.set_grad_enabled(grad)


def test_gradients_stay() -> None:
    model = network().train()
    model(image()).sum().backward()
    gradients = {n: (id(p.grad), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 5
    trace(model, image())
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            assert id(parameter.grad) == gradients[name][0]
            assert torch.equal(parameter.grad, gradients[name][1])
        else:
            assert parameter.grad is None


def test_the_input_stays() -> None:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return net.head(F.relu_(net.a(x)))

    net = Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2))
    x = torch.randn(4, 3)
    before = x.clone()
    trace(net, x)
    assert torch.equal(x, before)


def test_a_network_can_still_be_trained() -> None:
    model = network().train()
    trace(model, image())
    loss = model(image()).square().sum()
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert model.a[1].num_batches_tracked == 1


def test_outputs_are_the_same_before_and_after() -> None:
    model, x = network().eval(), image()
    before = model(x)
    trace(model, x)
    assert torch.equal(model(x), before)


# ---- networks in every state give the same graph --------------------------------------------------------------------


def plain() -> nn.Module:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        return net.head(net.drop(pooled(F.relu(net.b(F.relu(net.a(x))) + x))))

    convs = {"stem": conv_bn(3, 8), "a": conv_bn(8, 6), "b": conv_bn(6, 8)}
    return Wired(wiring, **convs, drop=nn.Dropout(0.3), head=nn.Linear(8, 2))


def groups_of(model: nn.Module, x: Any) -> list[Any]:
    groups = trace(model, x).groups
    return [(g.name, g.size, g.reason, [(m.tensor, m.dim, sorted(m.roles)) for m in g.members]) for g in groups]


STATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "frozen": lambda m: m.requires_grad_(False),
    "half frozen": lambda m: (m.stem.requires_grad_(False), m)[1],
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
}


@pytest.mark.parametrize("state", STATES)
def test_the_graph_does_not_depend_on_the_state(state: str) -> None:
    expected = groups_of(plain(), image())
    assert len(expected) == 3
    model = STATES[state](plain())
    assert groups_of(model, image().to(next(model.parameters()).dtype)) == expected


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_graph_does_not_depend_on_the_mode(context: Callable[[], Any]) -> None:
    expected = groups_of(plain(), image())
    with context():
        assert groups_of(plain(), image()) == expected


def test_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = plain(), image()
    assert groups_of(model, x) == groups_of(plain(), image())


def test_an_input_that_requires_gradients() -> None:
    x = image().requires_grad_()
    assert groups_of(plain(), x) == groups_of(plain(), image())
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_unusual_default_dtype(dtype: torch.dtype) -> None:
    model, x = plain(), image()
    expected = groups_of(model, x)
    torch.set_default_dtype(dtype)
    try:
        assert groups_of(model, x) == expected
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [(1, 3, 12, 12), (3, 3, 12, 12), (1, 3, 7, 9)])
def test_the_graph_does_not_depend_on_the_example(size: tuple[int, ...]) -> None:
    expected = groups_of(plain(), image())
    assert groups_of(plain(), torch.zeros(size)) == expected
    assert groups_of(plain(), torch.randn(size)) == expected


def test_tracing_twice_gives_the_same_graph() -> None:
    model = network()
    assert groups_of(model, image()) == groups_of(model, image())


class Named(nn.Module):
    """A forward with a named argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(F.relu(self.a(x)) * scale)


def test_example_inputs_of_every_form() -> None:
    model, x = Named(), torch.randn(4, 3)
    forms: list[Any] = [x, (x,), (x, 0.5), [x], {"x": x}, {"x": x, "scale": 2.0}]
    graphs = [groups_of(model, form) for form in forms]
    assert [(g[0], g[1]) for g in graphs[0] if g[2] is None] == [("a", 6)]
    assert all(g == graphs[0] for g in graphs)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (torch.randn(4, 7), [r"\[4, 7\]", "RuntimeError"]),
        ((torch.randn(4, 3), 1.0, 2.0), ["TypeError", "positional argument"]),
        ({"y": torch.randn(4, 3)}, ["TypeError", "'y'"]),
        (torch.zeros(4, 3, dtype=torch.long), ["int64", "RuntimeError"]),
        ("an image", ["example_inputs", "got 'an image'"]),
        (None, ["example_inputs", "got None"]),
    ],
    ids=["shape", "too many", "unknown name", "dtype", "no tensor", "nothing"],
)
def test_example_inputs_that_do_not_fit(inputs: Any, expected: list[str]) -> None:
    for text in expected:
        with pytest.raises(ModelError, match=text):
            trace(Named(), inputs)


def test_the_error_names_the_network_and_keeps_the_cause() -> None:
    with pytest.raises(ModelError, match=r"broken on purpose") as caught:
        trace(broken(), image())
    assert "Wired" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'1\.weight' is not initialised yet, .* lazy module; run the network once"):
        trace(nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)), torch.randn(1, 3))
    net = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ModelError, match="lazy module"):
        accuracy(net, torch.randn(4, 3), torch.zeros(4))
    assert net(torch.randn(4, 3)).shape == (4, 2)


def test_a_network_without_an_output_is_refused() -> None:
    with pytest.raises(ModelError, match="no tensor"):
        trace(Wired(lambda net, x: None, a=nn.Linear(3, 4)), torch.randn(1, 3))


def test_a_network_without_parameters_has_no_groups() -> None:
    assert trace(nn.ReLU(), torch.randn(2, 3)).groups == ()


# ---- what a forward keeps -------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Keeps a hidden state, a queue, a cache, counters, an object, generators; and changes a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.h: Tensor | None = None
        self.scale = torch.ones(1)
        self.queue: deque[Tensor] = deque(maxlen=2)
        self.cache: dict[str, Any] = {"deep": [{}]}
        self.calls, self.names = 0, {"first"}
        self.record = SimpleNamespace(count=0, array=np.zeros(2))
        self.generator = torch.Generator().manual_seed(3)
        self.old, self.other = random.Random(1), np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        self.h = y if self.h is None else self.h + y
        self.scale.add_(1)
        self.queue.append(y)
        self.cache["deep"][0]["y"] = y
        self.calls += 1
        self.names.add(f"call {self.calls}")
        self.record.count += 1
        self.record.array += self.old.random() + self.other.random()
        self.late = torch.rand((), generator=self.generator) + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        self.a.weight.data.clamp_(-0.1, 0.1)
        self.b.bias.requires_grad_(False)
        return self.b(y)


def state_of(model: Stateful) -> list[Any]:
    objects = [model.h, model.calls, model.names, model.cache, list(model.queue), model.scale.tolist()]
    objects += [model.record.count, model.record.array.tolist(), model.generator.get_state().tolist()]
    objects += [model.old.getstate(), model.other.bit_generator.state, sorted(vars(model))]
    return copy.deepcopy([*objects, model.b.bias.requires_grad, model.a.weight.tolist()])


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def test_what_a_forward_stores_is_put_back() -> None:
    model = Stateful()
    queue, scale = model.queue, model.scale
    before, drawn = state_of(model), random_states()
    trace(model, torch.randn(4, 3))
    with preserve_state(model):
        model(torch.randn(4, 3))
    assert random_states()[1:] == drawn[1:]
    assert state_of(model) == before
    assert model.queue is queue
    assert model.scale is scale


def test_what_a_forward_stores_is_put_back_when_it_fails() -> None:
    model = Stateful()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), preserve_state(model):
        model(torch.randn(4, 3))
        raise ZeroDivisionError
    assert state_of(model) == before


def test_dicts_that_were_empty_are_empty_again() -> None:
    net: Any = nn.Linear(2, 2)
    found: OrderedDict[str, Any] = OrderedDict()
    net.cache, net.found = {}, found
    with preserve_state(net) as memory:
        assert not memory.rebound
        net.register_forward_hook(lambda *_: None)
        net.cache["x"] = 1
        found["y"] = 2
        found.mark = 3  # type: ignore[attr-defined]
        assert memory.rebound
    assert (net.cache, found, vars(found), dict(net._forward_hooks)) == ({}, OrderedDict(), {}, {})
    assert net.found is found


def test_a_memory_puts_back_as_often_as_it_is_asked_to() -> None:
    net: Any = nn.Linear(2, 2)
    net.cache, net.words = {"x": 1}, OrderedDict(y=2)
    memory, weight = Memory(net), net.weight.detach().clone()
    for narrow in (True, False, False):
        with preserve_state(net, memory):
            net.cache.clear()
            net.words["z"] = 3
            net.weight.data = net.weight.data[:1] if narrow else net.weight.data
            net.weight.data.mul_(2)
        assert torch.equal(net.weight, weight)
        assert (net.cache, net.words) == ({"x": 1}, OrderedDict(y=2))


def test_random_numbers_inside_do_not_depend_on_those_outside() -> None:
    drawn, model = [], nn.Linear(1, 1)
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = random_states()
        with preserve_state(model):
            drawn.append([torch.rand(3).tolist(), random.random(), np.random.rand()])  # noqa: NPY002
        assert random_states() == before
    assert drawn[0] == drawn[1]


class Recurrent(nn.Module):
    """Its hidden state lives in an attribute from call to call; its width is read from a layer, or a literal."""

    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.literal = literal
        self.i, self.r, self.o, self.h = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2), None

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 16 if self.literal else self.i.out_features) if self.h is None else self.h
        self.h = torch.tanh(self.i(x) + self.r(h))
        return self.o(self.h)


@pytest.mark.parametrize("literal", [False, True])
def test_a_state_in_an_attribute_is_nobody_elses(literal: bool) -> None:
    model, x = Recurrent(literal).eval(), torch.randn(3, 4)
    small = intrafusion.compress(model, x, 0.5, images=torch.randn(64, 4))
    assert model.h is None
    assert small.model.h is None
    assert small.model.i.out_features == (16 if literal else 8)
    assert list(small.rolled_back) == (["i"] if literal else [])  # it would run only once
    for _ in range(3):
        assert small.model(x).shape == (3, 2)


def test_a_state_is_traced_over_two_calls() -> None:
    model = Recurrent(literal=False).eval()
    graph = trace(model, torch.randn(3, 4))
    assert graph.calls == 2
    assert any(
        {("i.weight", 0), ("r.weight", 0), ("r.weight", 1)} <= {(m.tensor, m.dim) for m in g.members}
        for g in graph.groups
    )
    assert trace(plain(), image()).calls == 1


class Normalising(nn.Module):
    """Writes into its inputs, also into those in containers and in objects."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        x.sub_(0.5)
        if more is not None:
            more["calls"].append(1)
            more["object"].count += 1
            more["y"].zero_()
        return self.b(F.relu(self.a(x)))


class Clean(Normalising):
    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        return super().forward(x.clone())


def test_inputs_and_images_stay_the_callers() -> None:
    model, x, images = Normalising(), torch.randn(2, 3), torch.randn(64, 3)
    more = {"calls": [], "object": SimpleNamespace(count=0), "y": torch.ones(2)}
    kept, given = x.clone(), images.clone()
    clean = Clean()
    clean.load_state_dict(model.state_dict())
    small = intrafusion.compress(model, (x, more), 0.5, images=[{"x": images, "more": more}])
    assert torch.equal(x, kept)
    assert torch.equal(images, given)
    assert (more["calls"], more["object"].count, more["y"].tolist()) == ([], 0, [1, 1])
    expected = intrafusion.compress(clean, x.clone(), 0.5, images=[images.clone()])
    for ours, theirs in zip(small.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    accuracy(model, images, torch.zeros(64, dtype=torch.long))
    output_rows(model, images)
    assert torch.equal(images, given)


def test_one_tensor_given_twice_stays_one() -> None:
    class Same(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return q * float(q is k)

    x = torch.ones(2)
    assert Inputs((x, x)).call(Same())[0].tolist() == [1, 1]
    assert Inputs((x, x.clone())).call(Same())[0].tolist() == [0, 0]
