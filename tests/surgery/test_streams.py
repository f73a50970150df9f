"""Streams of pre-norm networks: rotated where the function stays, with what is lost known from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.graph import ChannelGroup
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.observe.moments import measure_moments
from intrafusion.reduce import ReductionMap
from intrafusion.reduce.rotation import rotation_map
from intrafusion.restore import LeastSquares
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.streams import fold_streams_, is_turned
from intrafusion.surgery.write import write_weights_

WIDTH = 16


class RMS(nn.Module):
    """Written out, as in many language models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


class PlusOne(RMS):
    """As in Gemma: the gain is 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)) * (1.0 + self.weight.to(x))


class Scaled(nn.Module):
    """A layer of which each output is scaled, as LayerScale does; without a bias, or with one."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(inputs, outputs, bias=bias), nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gamma


class Layer(nn.Module):
    def __init__(self, norm: Any, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.up, self.down = nn.Linear(WIDTH, 24, bias=bias), nn.Linear(24, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PreNorm(nn.Module):
    """A small language model; with `last` None its head reads the stream without a norm."""

    def __init__(self, norm: Any, *, bias: bool, last: Any = None) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, WIDTH), nn.Parameter(torch.zeros(1, 6, WIDTH))
        self.layers = nn.Sequential(*(Layer(norm, bias) for _ in range(2)))
        self.last = nn.Identity() if last is None else last(WIDTH)
        self.head = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.layers(self.tokens(x) + self.places)))


class PostNorm(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.v(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def strict_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-3)


def make_scaled(norm: Any, *, bias: bool, last: Any) -> PreNorm:
    model = PreNorm(norm, bias=bias, last=last)
    for layer in model.layers:
        layer.o, layer.down = Scaled(WIDTH, WIDTH, bias), Scaled(24, WIDTH, bias)  # type: ignore[assignment]
    return model


class Pooled(PreNorm):
    """As DINOv2: one head reads the first token beside the mean of all, both behind one norm."""

    def __init__(self, norm: Any, *, bias: bool, last: Any) -> None:
        super().__init__(norm, bias=bias, last=last)
        self.head = nn.Linear(2 * WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.layers(self.tokens(x) + self.places))
        return self.head(torch.cat([x[:, 0], x.mean(1)], dim=1))


NETWORKS = {
    "layer norm": lambda: PreNorm(strict_norm, bias=True, last=strict_norm),
    "no bias in readers": lambda: PreNorm(strict_norm, bias=False, last=strict_norm),
    "head without a norm": lambda: PreNorm(strict_norm, bias=True),
    "no gains": lambda: PreNorm(lambda w: nn.LayerNorm(w, elementwise_affine=False), bias=True, last=strict_norm),
    "torch rms": lambda: PreNorm(lambda w: nn.RMSNorm(w, eps=1e-3), bias=False, last=lambda w: nn.RMSNorm(w, eps=1e-3)),
    "rms written out": lambda: PreNorm(RMS, bias=True, last=RMS),
    "scaled branches": lambda: make_scaled(strict_norm, bias=True, last=strict_norm),
    "scaled branches without bias": lambda: make_scaled(RMS, bias=False, last=RMS),
    "one is added to gains": lambda: PreNorm(PlusOne, bias=False, last=PlusOne),
    "token and mean": lambda: Pooled(strict_norm, bias=True, last=strict_norm),
    "both": lambda: PreNorm(RMS, bias=True, last=strict_norm),
}
TOKENS = torch.arange(48).reshape(8, 6) % 11


def make(name: str) -> nn.Module:
    """With gains, shifts and everything else far from what they start as."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter.dim() == 1))
    return model


def find_stream(model: nn.Module) -> ChannelGroup:
    return intrafusion.inspect(model, TOKENS)["tokens"]


def rotate(model: nn.Module, m: int) -> tuple[nn.Module, ReductionMap]:
    """By hand: the moments, the map and the weights, without a plan."""
    graph = intrafusion.inspect(model, TOKENS)
    bare = measure_moments(model, graph, torch.randint(0, 11, (64, 6)))["tokens"].bare
    rotation = graph["tokens"].rotation
    assert bare is not None
    assert rotation is not None
    reduction = rotation_map(bare, m, centred=rotation.centred)
    small = copy_model(model)
    weights = {n: t.detach() for n, t in named_tensors(model).items()}
    write_weights_(small, reduce_weights(weights, graph, {"tokens": reduction}))
    for norm in (n for n in small.modules() if isinstance(n, nn.LayerNorm)):
        norm.normalized_shape = (m,)
    return small, reduction


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rotation_of_the_whole_stream_changes_nothing(name: str) -> None:
    model = make(name)
    assert find_stream(model).rotation is not None
    small, reduction = rotate(model, WIDTH)
    assert not torch.allclose(reduction.merge, torch.eye(WIDTH, dtype=torch.float64), atol=0.1)
    tensors = dict(small.named_parameters())
    assert not torch.allclose(tensors["layers.0.up.weight"], dict(model.named_parameters())["layers.0.up.weight"])
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-9, atol=1e-9)


def confine(model: nn.Module, rank: int, *, centred: bool) -> None:
    """Whatever is written into the stream lies in a random subspace."""
    basis = torch.linalg.qr(torch.randn(WIDTH, rank + 1, dtype=torch.float64))[0][:, :rank]
    if centred:
        basis = torch.linalg.qr(basis - basis.mean(0))[0]
    inside = basis @ basis.T
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name in ("tokens.weight", "places"):
            tensors[name].copy_(tensors[name] @ inside)
        for name in (n for n in tensors if n.rpartition(".")[0].endswith((".o", ".down"))):
            if not name.endswith("gamma"):
                tensors[name].copy_(inside @ tensors[name])
        for layer in (m for m in model.modules() if isinstance(m, Scaled)):
            rows = inside * layer.gamma / layer.gamma[:, None]  # what the scale gives lies in the subspace
            layer.linear.weight.copy_(rows @ layer.linear.weight)
            if layer.linear.bias is not None:
                layer.linear.bias.copy_(rows @ layer.linear.bias)


@pytest.mark.parametrize("name", NETWORKS)
def test_directions_in_which_nothing_lies_go_without_loss(name: str) -> None:
    """The eps of norms, and numbers that depend on the width, included."""
    model = make(name)
    rotation = find_stream(model).rotation
    assert rotation is not None
    confine(model, 6, centred=rotation.centred)
    small, _ = rotate(model, 7 if rotation.centred else 6)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "centred"),
    [
        ("layer norm", True),
        ("rms written out", False),
        ("both", True),
        ("scaled branches", True),
        ("scaled branches without bias", False),
        ("one is added to gains", False),
        ("token and mean", True),
    ],
)
def test_what_is_compressed_is_proved_rotated_saved_and_loaded(name: str, centred: bool, tmp_path: Any) -> None:
    model = make(name).float()
    inputs = torch.randint(0, 11, (64, 6))
    small = intrafusion.compress(model, TOKENS, keep={"tokens": 0.75, "*": 0.5}, images=inputs)
    (row,) = (d for d in small.plan.decisions if d.group == "tokens")
    assert (row.mixing, row.m, row.proof) == ("rotated", 12, "function")
    norm = small.model.get_submodule("layers.0.norm1")
    torch.testing.assert_close(norm.weight, torch.zeros(12) if "one is" in name else torch.ones(12))
    for scaled in (m for m in small.model.modules() if isinstance(m, Scaled)):
        torch.testing.assert_close(scaled.gamma.detach(), torch.ones(12))
    assert not centred or getattr(small.model.get_submodule("last"), "normalized_shape", (12,)) == (12,)
    small.save(tmp_path / "small")
    again = intrafusion.load(tmp_path / "small", NETWORKS[name])
    torch.testing.assert_close(again(TOKENS), small.model(TOKENS))
    anew = intrafusion.apply(model, small.plan, TOKENS)
    assert anew.plan == small.plan


def test_selection_can_be_asked_for() -> None:
    model = make("layer norm").float()
    inputs = torch.randint(0, 11, (64, 6))
    options = {"images": inputs, "reducer": {"name": "pivot", "rotate": False}, "restore": None}
    small = intrafusion.compress(model, TOKENS, keep={"tokens": 0.5, "*": 1.0}, **options)
    (row,) = (d for d in small.plan.decisions if d.group == "tokens")
    assert (row.mixing.partition(":")[0], row.m) == ("selected", 8)
    kept = small.plan.maps["tokens"].merge.argmax(1)
    torch.testing.assert_close(small.model.get_parameter("last.weight"), model.get_parameter("last.weight")[kept])


def test_a_target_cuts_streams_by_what_directions_hold() -> None:
    model = make("rms written out").float()
    confine(model.double(), 6, centred=False)
    small = intrafusion.compress(
        model.float(), TOKENS, target={"params": 0.6}, images=torch.randint(0, 11, (64, 6)), restore=None
    )
    assert small.plan.sizes.keys() == {"tokens"}  # nothing lies in the other directions
    torch.testing.assert_close(small.model(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_rotated_says_why() -> None:
    torch.manual_seed(0)
    shell = nn.Sequential(nn.Linear(3, WIDTH), PostNorm(strict_norm, True), nn.Linear(WIDTH, 2))
    group = intrafusion.inspect(shell, torch.randn(2, 4, 3))["0"]
    assert group.rotation is None
    assert "not rotated: what 1.norm1.weight gives goes elsewhere than into linear maps: add in 1" in str(
        group.unmixable
    )
    tied = make("rms written out")
    tied.head = nn.Linear(WIDTH, 11, bias=False)  # type: ignore[assignment]
    tied.head.weight = tied.tokens.weight  # type: ignore[union-attr, assignment]
    groups = intrafusion.inspect(tied.double(), TOKENS).groups
    (stream,) = (g for g in groups if g.size == WIDTH and "layers.0.o" in g.producers)
    assert stream.rotation is None
    assert "cannot go into one use of tokens.weight alone; untie=True (--untie)" in str(stream.unmixable)


def test_a_fold_leaves_the_readers_what_they_read() -> None:
    """Against the formula: W (g x + b) for x that a LayerNorm gives."""
    group = find_stream(make("layer norm"))
    model = make("layer norm")
    weights = {n: t.detach().clone() for n, t in named_tensors(model).items()}
    before = {n: t.clone() for n, t in weights.items()}
    fold_streams_(weights, [group])
    x = F.layer_norm(torch.randn(5, WIDTH, dtype=torch.float64), (WIDTH,))
    for layer in range(2):
        gain, shift = (before[f"layers.{layer}.norm2.{what}"] for what in ("weight", "bias"))
        expected = (x * gain + shift) @ before[f"layers.{layer}.up.weight"].T
        torch.testing.assert_close((x + 1) @ weights[f"layers.{layer}.up.weight"].T, expected)
        assert bool((weights[f"layers.{layer}.norm2.bias"] == 1).all())


def test_maps_that_pick_do_not_turn() -> None:
    group = find_stream(make("layer norm"))
    order = torch.eye(WIDTH, dtype=torch.float64)[torch.randperm(WIDTH)][:5]
    assert not is_turned(group, ReductionMap(order, order.T.contiguous()))
    mean = torch.full((2, WIDTH), 0.25, dtype=torch.float64)
    assert not is_turned(group, ReductionMap(mean, mean.T.contiguous()))
    turn = torch.linalg.qr(torch.randn(WIDTH, 5, dtype=torch.float64))[0].T.contiguous()
    assert is_turned(group, ReductionMap(3 * turn, turn.T.contiguous() / 3))
    assert not is_turned(replace(group, rotation=None), ReductionMap(turn, turn.T.contiguous()))


def test_an_optimizer_starts_anew_where_gains_went_elsewhere() -> None:
    model = make("layer norm").float()
    optimizer = torch.optim.Adam(model.parameters())
    model(TOKENS).square().sum().backward()
    optimizer.step()
    inputs = torch.randint(0, 11, (64, 6))
    small = intrafusion.compress(
        model, TOKENS, keep={"tokens": 0.75, "*": 1.0}, images=inputs, restore=None, inplace=True
    )
    assert any("their channels were rotated" in note for note in small.notes)
    assert model.get_parameter("layers.0.up.weight") not in optimizer.state
    assert model.get_parameter("layers.0.up.bias") in optimizer.state
    optimizer.zero_grad()
    model(TOKENS).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["layer norm", "scaled branches", "scaled branches without bias"])
def test_layers_are_solved_for_what_the_original_gives_scales_included(name: str) -> None:
    """Without loss there is nothing to make up for, so that solving must not change what the network gives."""
    model = make(name).double()
    rotation = find_stream(model).rotation
    assert rotation is not None
    confine(model, 6, centred=rotation.centred)
    inputs = torch.randint(0, 11, (64, 6))
    keep = {"tokens": 7 / WIDTH if rotation.centred else 6 / WIDTH, "*": 1.0}
    plan = intrafusion.compress(model, TOKENS, keep=keep, images=inputs, restore=None).plan
    solved, graph = intrafusion.apply(model, plan, TOKENS), intrafusion.inspect(model, TOKENS)
    LeastSquares()(solved, model, graph, inputs)
    torch.testing.assert_close(solved.model(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_a_scale_of_what_is_read_elsewhere_too_is_not_taken_in() -> None:
    """The proof finds it: the layer would give the sum without the scale something else."""

    class Twice(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y * self.gamma + y

    model = make("layer norm")
    model.layers[0].down = Twice(24, WIDTH, bias=True).double()  # type: ignore[union-attr, index]
    with torch.no_grad():
        model.get_parameter("layers.0.down.gamma").add_(torch.randn(WIDTH).double())
    group = find_stream(model)
    assert group.rotation is None
    assert "not rotated: that changes the output" in str(group.unmixable)


class Divided(nn.Module):
    """Channels of rank 7 in 16, divided by their length or by their root mean square, which some write as a length."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale = how, 4.0
        self.into, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.bank = nn.Buffer(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        if self.how == "root mean square":
            return self.out(x * x.square().mean(-1, keepdim=True).rsqrt())
        if self.how == "length times a power of the width":
            return self.out(x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5))
        if self.how == "length times a number":
            return self.out(F.normalize(x, dim=-1) * self.scale)
        return F.normalize(x, dim=-1) @ self.bank.T if self.how == "cosine" else self.out(F.normalize(x, dim=-1))


@pytest.mark.parametrize(
    "how", ["root mean square", "length times a power of the width", "length times a number", "length", "cosine"]
)
def test_channels_that_are_divided_by_their_length_are_rotated(how: str) -> None:
    """They hold 7 directions, so that 8 lose nothing."""
    torch.manual_seed(0)
    net, x = Divided(how).eval(), torch.randn(64, 6)
    small = intrafusion.compress(net, x[:4], 0.5, inputs=x)
    assert small.plan.sizes == {"into": 8}
    assert [d.proof for d in small.plan.decisions if d.reduced] == ["function"]
    assert not is_picking(small.plan.maps["into"].merge)
    assert small.restored[0].error_before == pytest.approx(0.0, abs=1e-6)


def is_picking(matrix: Tensor) -> bool:
    return bool((matrix.count_nonzero(1) == 1).all())


class Deviating(nn.Module):
    """A norm as it is often written out: by a deviation, which has n - 1 in it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gain, self.out = nn.Linear(6, 16), nn.Parameter(torch.rand(16) + 0.5), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3) * self.gain)


def test_a_rotation_that_depends_on_the_width_becomes_a_selection() -> None:
    torch.manual_seed(0)
    net, x = Deviating().eval(), torch.randn(64, 6)
    small = intrafusion.compress(net, x[:4], 0.5, inputs=x, restore=None)
    row = small.plan.decisions[0]
    assert (row.m, row.proof, row.mixing.partition(":")[0]) == (8, "symmetry", "selected")
    assert "not rotated: the smaller network is not the original without these channels; the output" in row.mixing
    kept = small.plan.maps["into"].merge.argmax(1)
    expected = Deviating()
    expected.into.weight.data, expected.into.bias.data = net.into.weight[kept].data, net.into.bias[kept].data
    expected.gain.data = net.gain[kept].data
    expected.out.weight.data, expected.out.bias.data = net.out.weight[:, kept].data, net.out.bias.data
    torch.testing.assert_close(small.model(x), expected(x))
    assert intrafusion.apply(net, small.plan, x[:4]).plan == small.plan
