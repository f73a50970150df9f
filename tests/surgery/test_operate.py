"""Proof: false groups fail with a reason and only they, and surgery that a network does not bear out is rolled back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from bare import compress
from gallery import CASES, Inputs
from gallery.core import Wired, conv_bn
from torch import Tensor, nn

import intrafusion
from intrafusion import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.errors import ModelError
from intrafusion.graph import families_of
from intrafusion.network.double import TOLERANCE, output_difference
from intrafusion.network.inputs import Inputs as Call
from intrafusion.reduce import ReductionMap, selection_map
from intrafusion.surgery import permute
from intrafusion.surgery.expect import find_siblings
from intrafusion.surgery.operate import operate
from intrafusion.surgery.permute import _PermutationCheck, random_derangement, verify_groups
from intrafusion.surgery.search import find_largest_passing
from intrafusion.trace import trace


def built(name: str) -> tuple[nn.Module, Inputs]:
    model, inputs = next(c for c in CASES if c.name == name).build()
    return oracle.randomise_(model), inputs


def reasons(graph: ChannelGraph) -> dict[str, str]:
    return {g.name: g.reason for g in graph.groups if g.is_channel and g.reason is not None}


def changed(graph: ChannelGraph, name: str, group: ChannelGroup) -> ChannelGraph:
    return replace(graph, groups=tuple(group if g.name == name else g for g in graph.groups))


def without_member(graph: ChannelGraph, name: str, tensor: str) -> ChannelGraph:
    group = graph[name]
    return changed(graph, name, replace(group, members=tuple(m for m in group.members if m.tensor != tensor)))


def halves(graph: ChannelGraph) -> dict[str, ReductionMap]:
    return {g.name: selection_map(torch.arange(max(1, g.size // 2)), g.size) for g in graph.reducible if g.is_channel}


# ---- before surgery -------------------------------------------------------------------------------------------------


def test_a_true_graph_passes_as_it_is() -> None:
    model, x = built("residual_identity_and_projection")
    graph = trace(model, x)
    assert reasons(verify_groups(model, graph, Call.of(x))) == reasons(graph) == {"head": graph["head"].reason}


@pytest.mark.parametrize(
    ("group", "tensor"),
    [
        ("a.0", "a.1.bias"),
        ("a.0", "b.0.weight"),
        ("c.0", "c.1.bias"),
        ("stem.0", "skip.0.weight"),
        ("d.0", "head.weight"),
    ],
)
def test_a_group_that_lacks_a_member_fails_and_no_other(group: str, tensor: str) -> None:
    model, x = built("residual_identity_and_projection")
    graph = trace(model, x)
    found = verify_groups(model, without_member(graph, group, tensor), Call.of(x))
    assert set(reasons(found)) == {group, "head"}
    assert (found[group].reason or "").startswith("permuting its channels changes the output by ")
    assert "(relative)" in (found[group].reason or "")


def test_two_false_groups_are_both_found() -> None:
    model, x = built("residual_identity_and_projection")
    graph = without_member(without_member(trace(model, x), "a.0", "b.0.weight"), "d.0", "head.weight")
    assert set(reasons(verify_groups(model, graph, Call.of(x)))) == {"a.0", "d.0", "head"}


def test_a_group_with_its_positions_in_another_order_fails() -> None:
    model, x = built("mlp")
    graph = trace(model, x)
    group = graph["b"]
    members = tuple(
        replace(m, positions=m.positions[::-1].copy()) if m.tensor == "head.weight" else m for m in group.members
    )
    found = verify_groups(model, changed(graph, "b", replace(group, members=members)), Call.of(x))
    assert set(reasons(found)) == {"b", "head"}


def test_twins_fail_together() -> None:
    model, x = built("grouped_unequal")
    graph = trace(model, x)
    first, second = (g.name for g in graph.reducible if g.producers == ("a",) and g.is_channel)
    assert graph[first].family == graph[second].family
    assert {first, second} <= set(reasons(verify_groups(model, without_member(graph, first, "a.bias"), Call.of(x))))


@pytest.mark.parametrize("name", ["bfloat16", "half_precision", "mixed_precision", "linear_in_autocast"])
def test_true_groups_of_low_precision_pass(name: str) -> None:
    model, x = built(name)
    graph = trace(model, x)
    assert reasons(verify_groups(model, graph, Call.of(x))) == reasons(graph)


def test_permutations_go_through_the_code_that_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built("mlp")
    seen: list[dict[str, ReductionMap]] = []
    original = permute.reduce_weights

    def spy(weights: Any, graph: Any, maps: Any) -> Any:
        seen.append(dict(maps))
        return original(weights, graph, maps)

    monkeypatch.setattr(permute, "reduce_weights", spy)
    verify_groups(model, trace(model, x), Call.of(x))
    assert [sorted(maps) for maps in seen] == [["a", "b"]] * len(seen)
    assert seen
    for name, n in (("a", 12), ("b", 10)):
        rows = seen[0][name].merge
        assert torch.equal(rows @ rows.T, torch.eye(n, dtype=torch.float64))
        assert rows.diagonal().count_nonzero() == 0


@pytest.mark.parametrize("n", [2, 3, 17])
def test_a_permutation_leaves_no_channel_where_it_was(n: int) -> None:
    for seed in range(5):
        rows = random_derangement(ChannelGroup("g", n, ()), np.random.default_rng(seed)).merge
        assert sorted(rows.argmax(1).tolist()) == list(range(n))
        assert rows.diagonal().count_nonzero() == 0


def test_halving_finds_every_failure_in_few_tries() -> None:
    groups = [ChannelGroup(str(i), 2, (), family=i) for i in range(64)]
    tries: list[int] = []

    def failure(some: list[ChannelGroup]) -> str | None:
        tries.append(len(some))
        return next((f"it is {g.name}" for g in some if g.name in ("5", "40")), None)

    passed, failed = find_largest_passing(families_of(groups), failure)
    assert {(g.name, why) for g, why in failed} == {("5", "it is 5"), ("40", "it is 40")}
    assert [g.name for g in passed] == [str(i) for i in range(64) if i not in (5, 40)]
    assert len(tries) <= 30


def blocks(count: int) -> list[ChannelGroup]:
    names = [f"blocks.{i}.{what}" for i in range(count) for what in ("attn", "mlp")]
    return [ChannelGroup(name, 2, (), family=i) for i, name in enumerate(names)]


def test_what_fails_in_every_block_is_not_tried_in_every_block() -> None:
    tries: list[int] = []

    def failure(some: list[ChannelGroup]) -> str | None:
        tries.append(len(some))
        return next((f"bad {g.name}" for g in some if "attn" in g.name), None)

    passed, failed = find_largest_passing(families_of(blocks(40)), failure, lambda g, why: f"like {g.name}: {why}")
    assert len(tries) < 20
    assert {g.name for g in passed} == {f"blocks.{i}.mlp" for i in range(40)}
    found = {g.name: why for g, why in failed}
    assert found["blocks.1.attn"] == "bad blocks.1.attn"
    assert found["blocks.39.attn"] == "like blocks.0.attn: bad blocks.0.attn"
    assert len(found) == 40


@pytest.mark.parametrize("bad", [(0, 1), (7, 9, 20)])
def test_others_of_a_kind_that_failed_twice_pass_all_the_same(bad: tuple[int, ...]) -> None:
    names = {f"blocks.{i}.attn" for i in bad}
    failure = lambda some: next((f"bad {g.name}" for g in some if g.name in names), None)  # noqa: E731
    passed, failed = find_largest_passing(families_of(blocks(40)), failure, lambda g, why: f"like {g.name}: {why}")
    assert {g.name for g, _ in failed} == names
    assert len(passed) == 80 - len(names)


def amplifying() -> nn.Module:
    """Reads large multiples of channels that are nearly equal: what is left holds much of their rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2)).double().eval()
    for tensor in net[0].parameters():
        tensor.data[16:] = tensor.data[:16] + 1e-9 * torch.randn_like(tensor[16:])
    net[2].weight.data *= 1e9
    net[2].weight.data[:, 16:] = -net[2].weight.data[:, :16]
    return net


def test_a_network_that_amplifies_rounding_is_held_to_what_rounding_does() -> None:
    model, x = amplifying(), torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    graph = trace(model, x)
    check = _PermutationCheck(model, graph, [Call.of(x)])
    assert check.error(graph.reducible) > TOLERANCE, "a case that the fixed tolerance refuses is needed"
    assert set(reasons(verify_groups(model, graph, Call.of(x)))) == {"2"}
    false = without_member(graph, "0", "0.bias")
    assert set(reasons(verify_groups(model, false, Call.of(x)))) == {"0", "2"}


def deep_sines(depth: int, gain: float) -> nn.Module:
    """No norms, random weights: each layer makes small differences larger, rounding too."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k in range(depth):
        layer = nn.Linear(16 if k else 6, 16)
        nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
        layers += [layer, Wired(lambda n, x: x.sin())]
    return nn.Sequential(*layers, nn.Linear(16, 3)).eval()


@pytest.mark.parametrize(("depth", "gain"), [(9, 12.0), (12, 8.0), (14, 6.0)])
def test_deep_networks_of_random_weights_are_held_to_what_rounding_does(depth: int, gain: float) -> None:
    model, x = deep_sines(depth, gain), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(model, x)
    inputs = Call.of(x)
    check = _PermutationCheck(model, graph, (inputs, inputs.varied(seed=1)))
    assert check.error([g for g in graph.reducible if g.is_channel]) > TOLERANCE, "a network that amplifies is needed"
    assert len(reasons(verify_groups(model, graph, inputs))) == 1, "only the output layer"
    false = without_member(graph, "0", "0.bias")
    assert "0" in reasons(verify_groups(model, false, inputs))
    small = compress(model, x, 0.5, reducer="select")
    assert small.rolled_back == {}
    assert set(small.plan.sizes.values()) == {8}


class TwoHalves(nn.Module):
    """The halves of `c` are joined after unlike paths, so they shrink together; `literal` cannot shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.literal, self.c, self.k, self.post = (nn.Conv2d(i, o, 1) for i, o in ((3, 10), (10, 12), (6, 6), (12, 4)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.c(torch.relu(self.literal(x).reshape(-1, 10, 8, 8))).chunk(2, 1)
        return self.post(torch.cat([torch.relu(a), torch.tanh(self.k(b))], 1))


def test_groups_that_can_only_shrink_together_do_beside_one_that_cannot() -> None:
    small = compress(TwoHalves().eval(), torch.randn(1, 3, 8, 8), 0.5, reducer="select")
    assert tuple(small.model.get_parameter(f"{name}.weight").shape[0] for name in ("literal", "c")) == (10, 6)
    assert set(small.rolled_back) == {"literal"}


def test_what_passes_only_together_is_searched_for_in_few_tries() -> None:
    tries: list[int] = []
    member = lambda tensor: Member(tensor, 0, np.arange(2)[:, None], frozenset({Role.PRODUCES}))  # noqa: E731
    groups = [ChannelGroup(str(i), 2, (member(f"w{i // 2}"),), family=i) for i in range(32)]

    def failure(some: list[ChannelGroup]) -> str | None:
        names = {g.name for g in some}
        tries.append(len(some))
        lonely = any((a in names) != (b in names) for a, b in (("4", "5"), ("20", "21")))
        return "no" if lonely or "9" in names else None

    passed, failed = find_largest_passing(families_of(groups), failure, coupled=True)
    assert [g.name for g, _ in failed] == ["9"]
    assert len(passed) == 31
    assert len(tries) <= 45


# ---- after surgery --------------------------------------------------------------------------------------------------


def literal_view(net: Any, x: Tensor) -> Tensor:
    y = F.relu(net.a(x)).view(-1, 6, 2).transpose(1, 2).flatten(1)
    return net.head(F.relu(net.b(y)))


def literal_pad(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(F.relu(net.a(x)))) + F.pad(F.relu(net.c(x)), (1, 1)))


VIEW = {"a": nn.Linear(5, 12), "b": nn.Linear(12, 7), "head": nn.Linear(7, 2)}
PAD = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 6), "c": nn.Linear(5, 4), "head": nn.Linear(6, 2)}


@pytest.mark.parametrize(
    ("wiring", "parts", "undone", "widths"),
    [(literal_view, VIEW, ("a",), {"a": 12, "b": 3}), (literal_pad, PAD, ("b",), {"a": 4, "b": 4, "c": 2})],
)
def test_a_number_in_the_forward_stops_its_group_alone(
    wiring: Any, parts: dict[str, nn.Module], undone: tuple[str, ...], widths: dict[str, int]
) -> None:
    """Padding by (1, 1) fits whatever remains of the four channels it surrounds, but not fewer than two around them."""
    model, x = oracle.randomise_(Wired(wiring, **parts)), torch.randn(4, 5)
    graph = verify_groups(model, trace(model, x), Call.of(x))
    assert set(reasons(graph)) == {"head"}
    surgery = operate(model, graph, halves(graph), Call.of(x))
    assert {graph[name].producers for name in surgery.rolled_back} == {undone}
    assert all("the smaller network" in why for why in surgery.rolled_back.values())
    assert {name: getattr(surgery.model.get_submodule(name), "out_features") for name in widths} == widths  # noqa: B009
    assert surgery.model(x).shape == (4, 2)


def test_the_padded_shortcut_is_rolled_back_and_the_blocks_are_reduced() -> None:
    from intrafusion.lab.zoo.networks.padded_resnet import PaddedResNet

    model, x = PaddedResNet(8).eval(), torch.randn(1, 3, 8, 8)
    small = compress(model, x, 0.5)
    inner = [d for d in small.plan.decisions if d.group.endswith("conv1") and "." in d.group]
    assert [(d.n, d.m, d.reason) for d in inner] == [(16, 8, None), (32, 16, None), (64, 32, None)]
    kept = [d for d in small.plan.decisions if not d.reduced and d.group != "linear"]
    assert kept
    assert all(d.reason and "the smaller network" in d.reason for d in kept)
    assert small.model(x).shape == (1, 10)


def test_the_width_that_multi_head_attention_holds_as_a_number_goes_with_its_heads_or_stays() -> None:
    model, x = built("multihead_attention_causal")
    graph = trace(model, x)
    maps = halves(graph)
    surgery = operate(model, graph, {"stem": maps["stem"]}, Call.of(x))
    assert "does not run" in surgery.rolled_back["stem"]
    assert operate(model, graph, maps, Call.of(x)).rolled_back == {}


@pytest.mark.parametrize("size", [1, 2])
def test_a_slice_at_a_fixed_index_is_noticed_also_with_single_channels(size: int) -> None:
    """a[:, :3] += 1 with 1 + 1 (or 2 + 2) channels left would treat all of them (or the wrong ones) alike."""
    model, x = built("in_place_add_to_half")
    graph = verify_groups(model, trace(model, x), Call.of(x))
    halves = [g for g in graph.reducible if g.producers == ("a",)]
    assert [g.size for g in halves] == [3, 3]
    maps = {g.name: selection_map(torch.arange(size), 3) for g in halves}
    surgery = operate(model, graph, maps, Call.of(x))
    undone = {0, 1} if size == 1 else {0}
    assert {halves[i].name for i in undone} <= set(surgery.rolled_back)
    full = oracle.double(model).double()
    for group in halves:
        if group.name not in surgery.rolled_back:
            for member in group.with_role(Role.CONSUMES):
                oracle.view_of(full, member).index_fill_(
                    member.dim, torch.as_tensor(member.positions[size:].ravel()), 0.0
                )
    found = oracle.outputs_of(surgery.model.double(), x.double())  # type: ignore[union-attr]
    assert oracle.relative_difference(found, oracle.outputs_of(full, x.double())) < 1e-6  # type: ignore[union-attr]


def test_single_channels_of_interchangeable_blocks_may_join() -> None:
    model, x = built("grouped_unequal")
    graph = trace(model, x)
    assert {frozenset(names) for names in find_siblings(graph)} == {frozenset({"a#0", "a#1", "g#0", "g#1"})}
    maps = {g.name: selection_map(torch.tensor([0]), g.size) for g in graph.reducible if g.is_channel}
    surgery = operate(model, graph, maps, Call.of(x))
    assert surgery.rolled_back == {}
    assert surgery.model.get_parameter("g.weight").shape == (2, 1, 3, 3)


def test_roles_that_the_surgery_would_scramble_are_noticed() -> None:
    """Channels rolled by two places are not where three channels rolled by two places are."""
    model, x = built("rolled_channels")
    graph = trace(model, x)
    surgery = operate(model, graph, halves(graph), Call.of(x))
    assert surgery.rolled_back == {"a": "the smaller network no longer shows 'a' as a group of 3 channels"}


def test_operate_leaves_the_original_alone_and_reports_repairs() -> None:
    model, x = (
        Wired(lambda net, x: net.head(F.relu(net.a(x)).mean((2, 3))), a=conv_bn(3, 8), head=nn.Linear(8, 2)).eval(),
        torch.randn(1, 3, 6, 6),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = trace(model, x)
    surgery = operate(model, graph, halves(graph) | {}, Call.of(x))
    assert {(r.module, r.attribute, r.old, r.new) for r in surgery.repairs} == {
        ("a.0", "out_channels", 8, 4),
        ("a.1", "num_features", 8, 4),
        ("head", "in_features", 8, 4),
    }
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ---- infinite, undefined and complex numbers ------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("found", "expected", "wanted"),
    [
        ([1.0, INF, NAN, -INF], [1.0, INF, NAN, -INF], 0.0),
        ([1.5, INF], [2.0, INF], 0.25),
        ([1.0, 2.0], [1.0, INF], INF),
        ([1.0, INF], [1.0, 2.0], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, NAN], [1.0, INF], INF),
        ([NAN], [NAN], 0.0),
    ],
)
def test_differences_where_outputs_are_not_finite(found: list[float], expected: list[float], wanted: float) -> None:
    assert output_difference([torch.tensor(found)], [torch.tensor(expected)]) == wanted


def test_differences_of_complex_outputs() -> None:
    assert output_difference([torch.tensor([1 + 1j])], [torch.tensor([1 + 2j])]) == pytest.approx(1 / 5**0.5)


class Masked(nn.Module):
    """Forbidden classes are infinite or undefined, a causal mask is a buffer, a filter and an output are complex."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.a, self.b = value, nn.Linear(8, 32), nn.Linear(32, 6)
        self.register_buffer("mask", torch.full((8, 8), -INF).triu(1))
        self.filter = nn.Parameter(torch.full((5,), 1 + 0.5j))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.rfft(x) * self.filter
        x = torch.fft.irfft(spectrum, n=8)
        x = (x[:, None] * x[:, :, None] + self.mask).softmax(-1).sum(1) + x
        y = self.b(F.relu(self.a(x))).clone()
        y[:, 0] = self.value
        return y, spectrum


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_groups_behind_masks_are_proved_and_reduced(value: float) -> None:
    model, x = Masked(value).eval(), torch.randn(64, 8)
    with torch.no_grad():  # the second half of the channels adds nothing
        for tensor in (model.b.weight[:, 16:], model.a.weight[16:], model.a.bias[16:]):
            tensor.zero_()
    small = intrafusion.compress(model, x, {"a": 0.5}, reducer="select", restore="images", images=x)
    (y, spectrum), (z, again) = model(x), small.model(x)
    assert small.model.a.out_features == 16
    assert torch.allclose(y, z, atol=1e-5, equal_nan=True)
    assert torch.allclose(spectrum, again)
    assert small.restored[0].error_after == pytest.approx(0, abs=1e-6)


def test_an_output_of_nothing_but_nan_proves_nothing() -> None:
    net = Wired(lambda net, x: net.b(F.relu(net.a(x))) * NAN, a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    with pytest.raises(ModelError, match="nothing but NaN or infinity on the example inputs"):
        intrafusion.inspect(net, torch.randn(4, 3))


def test_statistics_of_a_batch_of_one_are_named_as_the_reason() -> None:
    def deviate(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.b(F.relu((x - x.mean(0)) / ((x - x.mean(0)).square().sum(0) / (len(x) - 1)).sqrt()))

    net = Wired(deviate, a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    with pytest.raises(ModelError, match="Pass two images or more, if the network takes statistics of the batch"):
        intrafusion.inspect(net, torch.randn(1, 3))
    assert [g.size for g in intrafusion.inspect(net, torch.randn(2, 3)).reducible] == [8]
    norm = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)).eval()
    advice = "A norm takes its statistics from the batch, also in evaluation mode: pass two images or more in each call"
    with pytest.raises(ModelError, match=rf"does not run on the example inputs \(float32\[1, 3\]\).*{advice}"):
        intrafusion.inspect(norm, torch.randn(1, 3))
    with pytest.raises(ModelError, match=rf"does not run on batch 1 of images.*{advice}"):
        intrafusion.compress(norm, torch.randn(2, 3), 0.5, inputs=[torch.randn(40, 3), torch.randn(1, 3)])


@pytest.mark.parametrize("kind", ["weight", "statistic", "frozen"])
def test_broken_weights_are_still_refused(kind: str) -> None:
    net = Wired(lambda net, x: net.b(F.relu(net.a(x))), a=conv_bn(3, 8), b=nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        (net.a[1].running_var if kind == "statistic" else net.b.weight).view(-1)[0] = INF
    net.requires_grad_(kind != "frozen")
    with pytest.raises(ModelError, match="expected finite weights"):
        intrafusion.inspect(net, torch.randn(4, 3, 5, 5))


def test_a_mask_along_the_channels_themselves_is_left_alone() -> None:
    net = Wired(
        lambda net, x: net.b(torch.minimum(net.a(x), net.cap)), a=nn.Linear(3, 8), b=nn.Linear(8, 2), cap=torch.ones(8)
    )
    net.cap[3] = INF
    with pytest.raises(ModelError, match="cap has infinite or NaN entries along these channels"):
        intrafusion.compress(net, torch.randn(4, 3))


class Bare(nn.Module):
    """Norms without parameters and statistics, which no tensor tells how many channels they see."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)
        self.instance, self.batch = nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        self.other = nn.InstanceNorm2d(99)  # wrong before, and PyTorch's own warning

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.other(self.batch(self.instance(self.enter(x)))).relu())


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features:UserWarning")
def test_norms_without_parameters_state_what_they_see(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = intrafusion.compress(Bare(), torch.randn(2, 3, 8, 8), 0.5, restore=None)
    small.save(tmp_path / "small")
    for model in (small.model, intrafusion.load(tmp_path / "small", Bare)):
        norms = [model.get_submodule(name).num_features for name in ("instance", "batch", "other")]
        assert norms == [4, 4, 99]
