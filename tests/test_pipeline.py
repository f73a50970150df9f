"""compress(): what survives, what is refused, and what the smaller network can still do."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from bare import compress
from gallery import CASES
from gallery.core import Wired, conv_bn
from torch import Tensor, nn
from torch.nn.utils import prune

import intrafusion
from intrafusion import BudgetError, IntraFusion, ModelError, Select
from intrafusion.errors import RecipeError
from intrafusion.graph import ChannelGroup
from intrafusion.importance import Random
from intrafusion.reduce import REDUCERS

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def residual(width: int = 8) -> nn.Module:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        return net.head(F.relu(net.b(F.relu(net.a(x))) + x).mean((2, 3)))

    parts = {"stem": conv_bn(3, width), "a": conv_bn(width, 6), "b": conv_bn(6, width), "head": nn.Linear(width, 4)}
    torch.manual_seed(0)
    return oracle.randomise_(Wired(wiring, **parts)).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", REDUCERS)
def test_keeping_everything_is_the_identity(reducer: str) -> None:
    model = residual()
    small = compress(model, X, 1.0, reducer=reducer)
    assert same(state(small.model), state(model))
    assert small.before == small.after
    assert small.repairs == ()


@pytest.mark.parametrize(
    ("reducer", "order"),
    [
        *((reducer, "joint") for reducer in REDUCERS),
        (IntraFusion("function", target_marginal="importance"), "joint"),
        ("fold", "backward"),
    ],
)
def test_the_same_seed_gives_the_same_bytes(reducer: Any, order: str) -> None:
    first, second = (
        compress(residual(), X, 0.5, reducer=reducer, importance="random", order=order, seed=3) for _ in range(2)
    )
    assert same(state(first.model), state(second.model))
    assert first.plan == second.plan
    assert not same(
        state(first.model), state(compress(residual(), X, 0.5, reducer=reducer, importance=Random(1)).model)
    )


_THREADS = """
import hashlib, torch, intrafusion
from intrafusion.lab import zoo
torch.manual_seed(0)
model, x = zoo.build("cifar10_resnet20").eval(), zoo.example_input("cifar10_resnet20")
print(torch.get_num_threads())
for reducer in ("select", "intrafusion"):
    small = intrafusion.compress(model, x, 0.5, reducer=reducer, restore=None)
    print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in small.model.state_dict().values())).hexdigest())
"""


@pytest.mark.slow
def test_two_threads_give_the_same_bytes_as_one_where_nothing_is_solved() -> None:
    run = [sys.executable, "-c", _THREADS]
    texts = [
        subprocess.run(run, env={**os.environ, "OMP_NUM_THREADS": n}, capture_output=True, text=True, check=True).stdout
        for n in ("1", "2")
    ]
    (_, *one), (threads, *two) = (text.split() for text in texts)
    assert len(one) == 2
    assert threads == "2"
    assert one == two


@pytest.mark.parametrize(
    "name", ["mlp", "residual_identity_and_projection", "conv_flatten_linear", "inverted_residual_squeeze_excite"]
)
@pytest.mark.parametrize(
    ("reducer", "order"),
    [(Select(), "joint"), (IntraFusion(), "joint"), (IntraFusion("function"), "joint"), (IntraFusion(), "backward")],
    ids=str,
)
def test_relabelling_channels_changes_nothing(name: str, reducer: Any, order: str) -> None:
    model, x = next(c for c in CASES if c.name == name).build()
    model, x = oracle.randomise_(model).double(), oracle.double(x)
    moved = copy.deepcopy(model)
    for group in intrafusion.trace.trace(model, x).reducible:
        oracle.permute_(moved, group.members, oracle.derangement(group.size, torch.Generator().manual_seed(5)))
    found, expected = (
        oracle.outputs_of(compress(net, x, 0.5, reducer=reducer, order=order).model, x) for net in (moved, model)
    )
    assert oracle.relative_difference(found, expected) <= 1e-9
    assert oracle.relative_difference(expected, oracle.outputs_of(model, x)) > 1e-3


@pytest.mark.parametrize(
    "name", ["mlp", "conv_bn_chain", "residual_identity_and_projection", "conv_flatten_linear", "swiglu", "gru"]
)
def test_twins_of_every_channel_fuse_without_a_trace(name: str) -> None:
    """n = 2m exact copies, means in and sums out: the function stays."""
    model, x = next(c for c in CASES if c.name == name).build()
    model, x = oracle.randomise_(model).double(), oracle.double(x)
    groups = [g for g in intrafusion.trace.trace(model, x).reducible if g.size % 2 == 0 and g.unmixable is None]
    assert groups
    for group in groups:
        for i in range(group.size // 2):
            for member in group.members:
                view = oracle.view_of(model, member)
                oracle.copy_channel_(view, member, i, i + group.size // 2)
    importance = lambda group, weights, seen: (torch.arange(group.size) < group.size / 2).double()  # noqa: E731
    include = [lambda layer, module: any(layer in g.producers for g in groups)]
    small = compress(model, x, 0.5, reducer=IntraFusion("function"), importance=importance, include=include)
    assert set(small.plan.sizes) == {g.name for g in groups}
    assert oracle.relative_difference(oracle.outputs_of(small.model, x), oracle.outputs_of(model, x)) <= 1e-9


def test_backward_order_of_one_group_at_a_time_is_what_compressing_step_by_step_gives() -> None:
    """Group by group from the output, each described by what the ones before left."""
    model = next(c for c in CASES if c.name == "mlp").build()[0].double()
    x = torch.randn(3, 6).double()
    step = compress(compress(model, x, {"b": 0.5}).model, x, {"a": 0.5}).model
    backward = compress(model, x, 0.5, order="backward").model
    joint = compress(model, x, 0.5).model
    for name, tensor in backward.named_parameters():
        torch.testing.assert_close(tensor, step.get_parameter(name))
    assert any(not torch.allclose(t, joint.get_parameter(n)) for n, t in backward.named_parameters())


# ---- what survives --------------------------------------------------------------------------------------------------


def test_the_input_model_is_not_touched() -> None:
    model = residual()
    model.train()
    model.get_submodule("a.1").eval()
    model.get_parameter("head.bias").requires_grad_(False)
    calls: list[int] = []
    handle = model.get_submodule("a").register_forward_hook(lambda *_: calls.append(1))
    flags = [(m.training, dict(m._forward_hooks)) for m in model.modules()]
    before, parameters = state(model), dict(model.named_parameters())
    small = compress(model, X, 0.5).model
    assert same(state(model), before)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert [(m.training, dict(m._forward_hooks)) for m in model.modules()] == flags
    assert [m.training for m in small.modules()] == [f for f, _ in flags]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert len(small.get_submodule("a")._forward_hooks) == 1
    calls.clear()
    small.eval()(X)
    assert calls == [1]
    handle.remove()


def test_in_place_writes_the_same_network_into_the_same_parameters() -> None:
    model, expected = residual(), compress(residual(), X, 0.5)
    parameters, modules = dict(model.named_parameters()), list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    small = compress(model, X, 0.5, inplace=True)
    assert small.model is model
    assert list(model.modules()) == modules
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert same(state(model), state(expected.model))
    assert small.repairs == expected.repairs
    assert model.get_submodule("a.0").out_channels == 3
    model(X).sum().backward()
    optimizer.step()
    assert not same(state(model), state(expected.model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_survives(dtype: torch.dtype) -> None:
    model = residual().to(dtype)
    small = compress(model, X.to(dtype), 0.5).model
    assert [t.dtype for t in small.state_dict().values()] == [t.dtype for t in model.state_dict().values()]
    assert small(X.to(dtype)).isfinite().all()


def test_a_frozen_network_without_gradients() -> None:
    model = residual().requires_grad_(False)
    with torch.no_grad():
        small = compress(model, X, 0.5).model
    assert not any(p.requires_grad for p in small.parameters())
    assert same(state(small), state(compress(residual(), X, 0.5).model))


def test_random_numbers_of_the_caller_are_not_drawn() -> None:
    before = torch.get_rng_state()
    compress(residual(), X, 0.5, importance="random")
    assert torch.equal(torch.get_rng_state(), before)


def test_ties_survive() -> None:
    model, x = next(c for c in CASES if c.name == "tied_square_layers").build()
    small = compress(model, x, 0.5).model
    assert small.get_parameter("b.weight") is small.get_parameter("c.weight")
    assert small.get_parameter("b.weight").shape == (3, 3)


# ---- what the smaller network can do --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return compress(residual(), X, 0.5).model


def test_sizes_are_what_was_asked_for(small: nn.Module) -> None:
    assert {n: tuple(p.shape) for n, p in small.named_parameters() if p.dim() > 1} == {
        "stem.0.weight": (4, 3, 3, 3),
        "a.0.weight": (3, 4, 3, 3),
        "b.0.weight": (4, 3, 3, 3),
        "head.weight": (4, 4),
    }


def test_params_and_macs_are_those_of_a_network_of_that_width() -> None:
    result = compress(residual(), X, 0.5)
    assert result.before.params == sum(p.numel() for p in residual().parameters())
    assert result.after.params == sum(p.numel() for p in result.model.parameters())
    macs = lambda w, a: 2 * (64 * 9 * (3 * w + 2 * w * a) + 4 * w)  # noqa: E731
    assert (result.before.macs, result.after.macs) == (macs(8, 6), macs(4, 3))
    assert f"{macs(8, 6):,} -> {macs(4, 3):,}" in str(result)


def test_it_can_be_compressed_again(small: nn.Module) -> None:
    again = compress(small, X, 0.5)
    assert again.model.get_parameter("a.0.weight").shape == (1, 2, 3, 3)
    assert again.model(X).shape == (2, 4)


def test_it_can_be_trained(small: nn.Module) -> None:
    model = copy.deepcopy(small).train()
    loss = lambda: F.cross_entropy(model(X), torch.tensor([0, 1]))  # noqa: E731
    optimizer, first = torch.optim.SGD(model.parameters(), 0.01), loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert loss().item() < first


def test_it_can_be_copied_and_exported(small: nn.Module) -> None:
    for other in (copy.deepcopy(small), torch.export.export(small, (X,)).module()):
        torch.testing.assert_close(other(X), small(X))


def test_in_and_outputs_of_any_form() -> None:
    def wiring(net: Any, image: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        h = F.relu(net.a(image)) * scale
        return {"pair": (net.head(h.mean((2, 3))), None), "n": 3}

    torch.manual_seed(0)
    model = Wired(wiring, a=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 2))
    by_name = compress(model, {"image": X, "scale": 0.5}, 0.5).model
    by_position = compress(model, (X,), 0.5).model
    assert by_name(image=X, scale=0.5)["pair"][0].shape == (2, 2)
    assert same(state(by_name), state(by_position))


def test_include_exclude_and_keep_by_pattern() -> None:
    sizes = lambda **options: compress(residual(), X, **{"keep": 0.5, **options}).plan.sizes  # noqa: E731
    assert sizes() == {"stem.0": 4, "a.0": 3}
    assert sizes(exclude="stem") == sizes(exclude="b:outputs") == sizes(exclude="head:inputs") == {"a.0": 3}
    assert sizes(include="a") == sizes(include="b:inputs") == {"a.0": 3}
    assert sizes(keep={"a.*": 0.2}) == {"a.0": 1}
    assert sizes(keep=0.7, round_to=2) == {"stem.0": 6, "a.0": 4}


def test_progress_counts_up_to_the_end_of_every_stage() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    compress(residual(), X, 0.5, progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    assert list(seen) == [
        "tracing the network",
        "proving channel groups",
        "choosing channels",
        "checking the smaller network",
        "restoring",
    ]
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert (steps[0][0], steps[-1][0]) == (0, steps[-1][1])


# ---- bad input ------------------------------------------------------------------------------------------------------


def poisoned(value: float) -> nn.Module:
    model = residual()
    with torch.no_grad():
        model.get_parameter("a.0.weight")[0, 0, 0, 0] = value
    return model


def headless(net: Any, x: Tensor) -> Tensor:
    return F.relu(net.a(x))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            lambda: poisoned(1.0).to("meta"),
            X.to("meta"),
            r"stem.0.weight: expected weights on the CPU or a GPU, got meta: it holds no values",
        ),
        (lambda: poisoned(float("nan")), X, "a.0.weight: expected finite weights, got NaN or infinity"),
        (lambda: poisoned(float("-inf")), X, "a.0.weight: expected finite weights"),
        (
            residual,
            torch.randn(2, 4, 8, 8),
            r"does not run on the example inputs \(float32\[2, 4, 8, 8\]\): RuntimeError",
        ),
        (residual, {"picture": X}, "does not run on the example inputs .*: TypeError"),
        (residual, "an image", "example_inputs: expected a tensor, .*, got 'an image'; pass what tokenizer"),
        (residual, (1, 3, 8, 8), r"These are numbers: torch.randn\(1, 3, 8, 8\) is an input of that shape."),
        (
            residual,
            ["an image"],
            r"(?s)example inputs .* Pass what tokenizer\(texts, padding=True, return_tensors='pt'\)",
        ),
        (residual, {"x": [[1, 2]]}, r"(?s)example inputs .* Pass tensors, such as what tokenizer\(texts"),
        (
            lambda: Wired(headless, a=nn.Linear(3, 6)),
            torch.randn(2, 3),
            "there is no channel group to reduce in this network. 'a': .*output",
        ),
        (lambda: nn.Sequential(nn.ReLU()), X, "the network has no weights that follow one another"),
    ],
)
def test_networks_and_inputs_that_cannot_be_used(model: Callable[[], nn.Module], inputs: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        compress(model(), inputs, 0.5)


def test_everything_excluded() -> None:
    with pytest.raises(ModelError, match=r"'stem.0': excluded \(stem\)"):
        compress(residual(), X, 0.5, exclude=["stem", "a"])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"reducer": "intrafusio"}, ValueError, "unknown reducer 'intrafusio'. Did you mean 'intrafusion'"),
        ({"importance": "randon"}, ValueError, "unknown importance 'randon'. Did you mean 'random'"),
        ({"order": "backwards"}, ValueError, "unknown order 'backwards'. Did you mean 'backward'"),
        ({"reducer": IntraFusion}, RecipeError, "expected a name, a mapping with a name or an object with `mixes`"),
        ({"keep": 1.2}, BudgetError, "keep: expected a fraction in"),
        ({"keep": X}, BudgetError, "keep: expected a fraction in .* got a tensor .*; images are said by name, inputs="),
        ({"keep": {"macs": 0.5}}, BudgetError, r"unknown group 'macs'.* said by name: target=\{'macs': 0.5\}"),
        ({"restore": True}, RecipeError, "got True; names are .*least_squares"),
        ({"keep": {"a.O": 0.5}}, BudgetError, "unknown group 'a.O'. Did you mean 'a.0'"),
        ({"exclude": "steem"}, BudgetError, "unknown layer 'steem'. Did you mean 'stem'"),
    ],
)
def test_unknown_options_name_the_nearest(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        compress(residual(), X, **options)


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (lambda n: torch.ones(n + 1), r"got a tensor float32\[9\]"),
        (lambda n: torch.ones(n, 1), r"got a tensor float32\[8, 1\]"),
        (lambda n: [1.0] * n, r"got \[1.0"),
        (lambda n: None, "got None"),
        (lambda n: torch.full((n,), torch.nan), "got NaN or infinity"),
    ],
)
def test_an_importance_must_answer_one_finite_score_per_channel(scores: Callable[[int], Any], got: str) -> None:
    def importance(group: ChannelGroup, weights: Any, observations: Any = None) -> Any:
        return scores(group.size)

    with pytest.raises(ValueError, match=f"importance: group 'stem.0': expected a tensor of 8 finite scores, {got}"):
        compress(residual(), X, 0.5, importance=importance)


def test_integer_and_differentiable_scores_are_scores() -> None:
    ranks = compress(
        residual(), X, 0.5, reducer="select", importance=lambda g, w, o: torch.arange(g.size).requires_grad_(False)
    )
    weighted = lambda g, w, o: torch.nn.Parameter(torch.arange(float(g.size)))  # noqa: E731
    assert same(state(ranks.model), state(compress(residual(), X, 0.5, reducer="select", importance=weighted).model))
    assert torch.equal(ranks.model.get_parameter("a.0.weight"), residual().get_parameter("a.0.weight")[3:, 4:])


def test_a_network_that_cannot_be_copied() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 4), b=nn.Linear(4, 2)))
    model.held = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match="cannot be copied: .*Remove what holds an open handle"):
        compress(model, torch.randn(1, 3), 0.5)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("norm", [prune.identity, nn.utils.weight_norm, nn.utils.spectral_norm])
def test_what_a_forward_with_gradients_left_behind_does_no_harm(norm: Callable[[nn.Module, str], Any]) -> None:
    """Old-style norms and pruning keep the weight that they computed, with its history; caches do, too."""
    torch.manual_seed(0)
    model, x = nn.Sequential(OrderedDict(a=nn.Linear(3, 4), b=nn.Linear(4, 6), c=nn.Linear(6, 2))), torch.randn(9, 3)
    norm(model.get_submodule("b"), "weight")
    fresh = compress(model.eval(), x, {"a": 0.5}, restore=None).model(x)
    model.cache = [model(x) * 2]  # type: ignore[assignment]
    assert torch.equal(compress(model, x, {"a": 0.5}, restore=None).model(x), fresh)
