"""Surgery: what the maps do to every tensor, judged by the full network with zeroed, copied or relabelled channels."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gallery import CASES, Case, Inputs
from torch import Tensor, nn

from intrafusion import ChannelGraph, ChannelGroup, Member, PlanError, Role
from intrafusion.importance.features import linear_rows
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce import ReductionMap, selection_map
from intrafusion.reduce.problem import find_picks
from intrafusion.surgery.maps import hollow_, map_rows, reduce_weights
from intrafusion.surgery.write import Repair, find_repairs, write_weights_
from intrafusion.trace import trace

EXACT = 1e-9
SAMPLE = """
    mlp conv_bn_chain conv_1d conv_3d resnext grouped_unequal grouped_transposed depthwise_multiplier
    depthwise_multiplier_transposed depthwise_separable_multiplier_bn inverted_residual_squeeze_excite
    conv_flatten_linear conv_flatten_linear_odd unet pixel_shuffle pixel_unshuffle unfold_patches blur_pool
    channels_last_memory keyword_inputs einsum_with_parameters parameter_list residual_identity_and_projection
    concat_of_both_signs layer_used_twice layer_used_on_two_branches norm_used_twice tied_square_layers
    squeeze_excite_with_views film added_parameter swiglu geglu_fused geglu_interleaved batch_norm_before_the_conv
    batch_norm_without_parameters batch_norm_of_features hand_written_batch_norm instance_norm_and_prelu
    lstm_of_two_layers gru lstm_bidirectional weight_norm tied_autoencoder lora cat_of_shifted_images flipped_channels
""".split()  # noqa: SIM905
sample = pytest.mark.parametrize("case", [c for c in CASES if c.name in SAMPLE], ids=str)
as_they_are = pytest.mark.parametrize("case", [c for c in CASES if c.name in {*SAMPLE} - {"weight_norm"}], ids=str)
"""Networks that use their weights as they are."""


def test_the_sample_is_in_the_gallery() -> None:
    assert set(SAMPLE) == {c.name for c in CASES if c.name in SAMPLE}


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def prepared(case: Case) -> tuple[nn.Module, Inputs, ChannelGraph]:
    """The network of a case with random weights in float64, its inputs and its graph."""
    model, inputs = case.build()
    model, inputs = oracle.randomise_(model).double(), oracle.double(inputs)
    return model, inputs, trace(model, inputs)


def channels(graph: ChannelGraph) -> list[ChannelGroup]:
    return [g for g in graph.reducible if g.is_channel and g.size > 1]


def selection(kept: Tensor, n: int) -> ReductionMap:
    rows = torch.zeros(len(kept), n, dtype=torch.float64)
    rows[torch.arange(len(kept)), kept] = 1
    return ReductionMap(rows, rows.T.contiguous())


def every_other(group: ChannelGroup) -> Tensor:
    return torch.arange(1, group.size, 2)


def operated(model: nn.Module, graph: ChannelGraph, maps: dict[str, ReductionMap]) -> nn.Module:
    small = copy.deepcopy(model)
    write_weights_(small, reduce_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps))
    return small


# ---- selecting ------------------------------------------------------------------------------------------------------


@as_they_are
def test_selecting_equals_zeroing_what_reads_the_others(case: Case) -> None:
    model, inputs, graph = prepared(case)
    groups = channels(graph)
    assert groups
    full = copy.deepcopy(model)
    for group in groups:
        for member in group.with_role(Role.CONSUMES):
            view = oracle.view_of(full, member)
            for c in range(0, group.size, 2):
                view.index_fill_(member.dim, oracle.at(member, c), 0.0)
    small = operated(model, graph, {g.name: selection(every_other(g), g.size) for g in groups})
    assert oracle.relative_difference(oracle.outputs_of(small, inputs), oracle.outputs_of(full, inputs)) <= EXACT
    assert oracle.relative_difference(oracle.outputs_of(small, inputs), oracle.outputs_of(model, inputs)) > 1e-3


def test_a_selection_has_the_entries_themselves_bit_by_bit() -> None:
    """In float32, behind a batch norm: nothing is folded, scaled and rounded where channels are only picked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    oracle.randomise_(model)
    graph, kept = trace(model, torch.randn(1, 3, 8, 8)), torch.tensor([1, 4, 6])
    small = operated(model, graph, {"0": selection(kept, 8)})
    for (name, new), old in zip(small.state_dict().items(), model.state_dict().values(), strict=True):
        whole = name == "3.bias" or not old.dim()
        assert torch.equal(new, old if whole else old[:, kept] if name == "3.weight" else old[kept]), name


def test_what_a_map_picks_is_no_field_of_it() -> None:
    """It is remembered for each map, and neither shown nor compared nor handed on."""
    one = selection(torch.tensor([2, 0]), 3)
    assert one.picked is not None
    assert one.picked.tolist() == [2, 0]
    other = replace(one, unmerge=torch.ones(3, 2, dtype=torch.float64))
    assert other.read is None
    assert one.read is not None


def with_old_weight_norm(layer: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, **options)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, with_old_weight_norm], ids=["new", "old"])
@pytest.mark.parametrize(("dim", "convolution"), [(0, False), (1, False), (0, True)])
def test_readers_and_producers_with_weight_norm_keep_what_is_left_of_their_weights(
    norm: Any, dim: int, convolution: bool
) -> None:
    torch.manual_seed(0)
    layer = partial(nn.Conv2d, kernel_size=3, padding=1) if convolution else nn.Linear
    plain = nn.Sequential(layer(3, 8), nn.Sigmoid(), layer(8, 6), nn.Tanh(), layer(6, 2)).double()
    normed = copy.deepcopy(plain)
    for index in (0, 2, 4):
        normed[index] = norm(normed[index], dim=dim)
    x = torch.randn(4, 3, 5, 5).double() if convolution else torch.randn(4, 3).double()
    with torch.no_grad():
        normed(x)
    graph = trace(normed, x)
    assert [g.size for g in graph.reducible] == [8, 6]
    kept = [every_other(g) for g in graph.reducible]
    maps = {g.name: selection(k, g.size) for g, k in zip(graph.reducible, kept, strict=True)}
    small = operated(normed.requires_grad_(False), graph, maps)
    for index, chosen in zip((2, 4), kept, strict=True):
        dropped = sorted({*range(plain[index].weight.shape[1])} - {*chosen.tolist()})
        plain[index].weight.data[:, dropped] = 0
    assert oracle.relative_difference([small(x)], [plain(x).detach()]) <= EXACT


def test_a_row_of_which_weight_norm_has_nothing_left_is_zero() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2, bias=False)).double()
    net = nn.Sequential(nn.Linear(3, 4).double(), nn.ReLU(), layer)
    net[2].parametrizations.weight.original1.data[0] = torch.tensor([0.0, 0.0, 1.0, 2.0])
    x = torch.randn(5, 3).double()
    graph = trace(net, x)
    small = operated(net, graph, {"0": selection(torch.tensor([0, 1]), 4)})
    assert bool((small(x)[:, 0] == 0).all())
    assert bool((small(x)[:, 1] != 0).all())


@pytest.mark.parametrize("name", ["conv_bn_chain", "residual_identity_and_projection", "mlp", "batch_norm_of_features"])
def test_selecting_keeps_the_very_entries_of_the_original(name: str) -> None:
    model, inputs = case_named(name).build()
    oracle.randomise_(model)
    graph = trace(model, inputs)
    small = operated(model, graph, {g.name: selection(every_other(g), g.size) for g in channels(graph)})
    expected = {n: t.detach() for n, t in named_tensors(model).items()}
    for group in channels(graph):
        for m in group.members:
            assert m.positions[:, 0].tolist() == list(range(group.size)), "a case with plain positions is needed"
            expected[m.tensor] = expected[m.tensor].index_select(m.dim, every_other(group))
    found = named_tensors(small)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_every_tensor_survives(dtype: torch.dtype) -> None:
    model, inputs = case_named("conv_bn_chain").build()
    model = oracle.randomise_(model).to(dtype)
    graph = trace(model, oracle.tree_map(lambda t: t.to(dtype), inputs))
    small = operated(model, graph, {g.name: selection(every_other(g), g.size) for g in channels(graph)})
    before = {n: t.dtype for n, t in named_tensors(model).items()}
    assert {n: t.dtype for n, t in named_tensors(small).items()} == before
    kept = dict(model.named_parameters())["stem.0.weight"][1::2]
    assert torch.equal(dict(small.named_parameters())["stem.0.weight"], kept)


@sample
def test_keeping_everything_changes_no_bit(case: Case) -> None:
    model, inputs = case.build()
    oracle.randomise_(model)
    graph = trace(model, inputs)
    weights = {n: t.detach() for n, t in named_tensors(model).items()}
    new = reduce_weights(weights, graph, {g.name: selection_map(torch.arange(g.size), g.size) for g in channels(graph)})
    assert new
    assert all(torch.equal(tensor, weights[name]) for name, tensor in new.items())


# ---- mixing ---------------------------------------------------------------------------------------------------------


def fusing(n: int, i: int, j: int) -> ReductionMap:
    """Channel j joins channel i: what comes in is averaged, what goes out is summed."""
    rows = torch.eye(n, dtype=torch.float64)
    rows[i, j] = rows[i, i] = 0.5
    sums = torch.eye(n, dtype=torch.float64)
    sums[j, i] = 1
    left = [c for c in range(n) if c != j]
    return ReductionMap(rows[left].contiguous(), sums[:, left].contiguous())


@sample
def test_fusing_exact_duplicates_changes_nothing(case: Case) -> None:
    model, inputs, graph = prepared(case)
    groups = [g for g in channels(graph) if g.unmixable is None]
    for group in groups:
        i, j = group.size - 1, 0
        for member in group.members:
            if Role.CONSUMES not in member.roles:
                oracle.copy_channel_(oracle.view_of(model, member), member, i, j)
    small = operated(model, graph, {g.name: fusing(g.size, g.size - 1, 0) for g in groups})
    assert oracle.relative_difference(oracle.outputs_of(small, inputs), oracle.outputs_of(model, inputs)) <= EXACT
    for group in groups:
        tensor = group.members[0].tensor
        assert named_tensors(small)[tensor].numel() < named_tensors(model)[tensor].numel()


@sample
def test_channels_may_be_relabelled_before_or_after(case: Case) -> None:
    """Surgery on the relabelled network with relabelled maps gives the same function."""
    model, inputs, graph = prepared(case)
    groups = channels(graph)
    draw = torch.Generator().manual_seed(0)
    maps, relabelled, moved = {}, {}, copy.deepcopy(model)
    for group in groups:
        n, m = group.size, (group.size + 1) // 2
        merge, unmerge = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((m, n), (n, m)))
        if group.unmixable is not None:
            merge = selection(torch.randperm(n, generator=draw)[:m], n).merge
            unmerge = merge.T.contiguous()
        order = torch.randperm(n, generator=draw)
        oracle.permute_(moved, group.members, order)
        maps[group.name] = ReductionMap(merge, unmerge)
        relabelled[group.name] = ReductionMap(merge[:, order].contiguous(), unmerge[order].contiguous())
    found = oracle.outputs_of(operated(moved, graph, relabelled), inputs)
    assert oracle.relative_difference(found, oracle.outputs_of(operated(model, graph, maps), inputs)) <= 1e-8


def test_producers_get_merge_and_consumers_unmerge() -> None:
    model, _, graph = prepared(case_named("mlp"))
    group, draw = graph["a"], torch.Generator().manual_seed(1)
    merge, unmerge = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((5, 12), (12, 5)))
    small = operated(model, graph, {group.name: ReductionMap(merge, unmerge)})
    old, new = named_tensors(model), named_tensors(small)
    torch.testing.assert_close(new["a.weight"].data, merge @ old["a.weight"])
    torch.testing.assert_close(new["a.bias"].data, merge @ old["a.bias"])
    torch.testing.assert_close(new["b.weight"].data, old["b.weight"] @ unmerge)
    assert torch.equal(new["b.bias"], old["b.bias"])


def test_a_batch_norm_behind_a_mixed_convolution_computes_the_mixed_channels() -> None:
    """conv + norm of the smaller network = merge applied to the outputs of conv + norm of the original."""
    model, inputs, graph = prepared(case_named("conv_bn_chain"))
    group = graph["stem.0"]
    merge = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    small = operated(model, graph, {group.name: ReductionMap(merge, torch.ones(8, 3, dtype=torch.float64))})
    old, new = (m.get_submodule("stem")(inputs) for m in (model, small))
    torch.testing.assert_close(new, torch.einsum("mc,bchw->bmhw", merge, old))


@pytest.mark.parametrize(
    ("rows", "picks"),
    [
        ([[0, 1, 0], [0, 0, 1]], [1, 2]),
        ([[0, 1, 0], [0, 1, 0]], [1, 1]),
        ([[0, 2, 0], [0, 0, 1]], None),
        ([[1, 1, 0], [0, 0, 0]], None),
        ([[1, 1, 0], [0, 0, 1]], None),
        ([[0, -1, 0], [0, 0, 1]], None),
        ([[0, float("nan"), 0], [0, 0, 1]], None),
    ],
)
def test_a_matrix_that_only_picks_rows_is_known(rows: list[list[float]], picks: list[int] | None) -> None:
    found = find_picks(torch.tensor(rows).double())
    assert (found if found is None else found.tolist()) == picks


def test_twins_of_unequal_size_are_refused() -> None:
    model, _, graph = prepared(case_named("grouped_unequal"))
    twins = [g for g in channels(graph) if g.producers == ("a",)]
    maps = {g.name: selection(torch.arange(m), 4) for g, m in zip(twins, (2, 3), strict=True)}
    with pytest.raises(PlanError, match=r"g.weight: .* would get different sizes \[2, 3\]; give them the same keep"):
        reduce_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps)


def test_hollowing_one_group_shows_the_others_what_they_will_see() -> None:
    """After group b is hollowed, the columns of a have the norms that they have in the network reduced by b alone."""
    model, _, graph = prepared(case_named("mlp"))
    merge = torch.randn(4, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reduction = ReductionMap(merge, merge.T.contiguous())
    hollow = {n: t.detach().clone() for n, t in named_tensors(model).items()}
    hollow_(hollow, graph["b"], reduction)
    small = named_tensors(operated(model, graph, {"b": reduction}))
    assert {n: t.shape for n, t in hollow.items()} == {n: t.shape for n, t in named_tensors(model).items()}
    for seen, truth in zip(linear_rows(graph["a"], hollow), linear_rows(graph["a"], small), strict=True):
        torch.testing.assert_close(seen.abs().sum(1), truth.abs().sum(1))
    assert hollow["b.weight"][4:].count_nonzero() == 0


# ---- writing --------------------------------------------------------------------------------------------------------


def test_parameters_keep_their_identity_their_ties_and_their_flags() -> None:
    model, _, graph = prepared(case_named("tied_square_layers"))
    model.get_parameter("head.bias").requires_grad_(False)
    parameters = dict(model.named_parameters())
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    group = channels(graph)[0]
    write_weights_(model, reduce_weights(named_tensors(model), graph, {group.name: selection(torch.tensor([1, 4]), 6)}))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.get_parameter("b.weight") is model.get_parameter("c.weight")
    assert model.get_parameter("b.weight").shape == (2, 2)
    assert not model.get_parameter("head.bias").requires_grad
    assert model.get_parameter("head.weight").requires_grad
    assert model.get_parameter("head.weight").grad is None
    assert torch.equal(model.get_parameter("head.bias").grad, torch.ones(2).double())  # type: ignore[arg-type]


Attributes = dict[str, int | tuple[int, ...]]


def attributes(module: nn.Module) -> Attributes:
    """Sizes that a layer of torch must state, derived from its weight by hand."""
    shape = tuple(getattr(module, "weight").shape)  # noqa: B009
    match module:
        case nn.ConvTranspose2d() | nn.ConvTranspose3d():
            return {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return {"in_channels": shape[1] * module.groups, "out_channels": shape[0]}
        case nn.Linear():
            return {"in_features": shape[1], "out_features": shape[0]}
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() | nn.InstanceNorm2d():
            return {"num_features": shape[0]}
        case nn.LayerNorm() | nn.RMSNorm():
            return {"normalized_shape": shape}
        case nn.GroupNorm():
            return {"num_channels": shape[0]}
        case nn.PReLU():
            return {"num_parameters": shape[0]}
        case nn.Embedding():
            return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    return {}


SIZED = """
    mlp conv_1d conv_3d resnext grouped_unequal grouped_transposed depthwise_multiplier
    depthwise_multiplier_transposed inverted_residual_squeeze_excite unet instance_norm_and_prelu layer_norm
    layer_norm_over_the_whole_map group_norm group_norm_of_single_channels convnext_block rms_norm_and_glu
    prelu_shared_and_per_channel embedding_untied weight_norm
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", SIZED)
def test_the_sizes_that_modules_state_are_those_of_their_weights(name: str) -> None:
    model, inputs, graph = prepared(case_named(name))
    small = operated(model, graph, {g.name: selection(every_other(g), g.size) for g in channels(graph)})
    layers = [m for m in small.modules() if isinstance(getattr(m, "weight", None), Tensor) and attributes(m)]
    assert layers
    for layer in layers:
        assert {k: getattr(layer, k) for k in attributes(layer)} == attributes(layer), layer
    oracle.outputs_of(small, inputs)


@pytest.mark.parametrize(
    ("name", "groups"), [("depthwise_multiplier", 2), ("depthwise_multiplier_transposed", 2), ("grouped_unequal", 2)]
)
def test_depthwise_convolutions_lose_groups_and_grouped_ones_do_not(name: str, groups: int) -> None:
    model, _, graph = prepared(case_named(name))
    small = operated(model, graph, {g.name: selection(every_other(g), g.size) for g in channels(graph)})
    convs = [m for m in small.modules() if isinstance(m, nn.modules.conv._ConvNd) and m.groups > 1]
    assert [c.groups for c in convs] == [groups]


def test_recurrent_layers_state_their_sizes() -> None:
    model, _, graph = prepared(case_named("lstm_of_two_layers"))
    groups = channels(graph)
    small = operated(model, graph, {g.name: selection(every_other(g), g.size) for g in groups})
    rnn = small.get_submodule("rnn")
    assert isinstance(rnn, nn.LSTM)
    assert (rnn.input_size, rnn.hidden_size) == (3, 3)
    assert rnn.weight_hh_l0.shape == (12, 3)


def test_a_network_that_did_not_change_needs_no_repair() -> None:
    model, _, _ = prepared(case_named("inverted_residual_squeeze_excite"))
    assert find_repairs(model, {}) == ()


class Widths(nn.Module):
    """A parameter under a name that elsewhere is a size."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 2)
        self.width = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).relu() * self.width)


def test_a_parameter_named_like_a_size_is_no_size() -> None:
    model = Widths()
    graph = trace(model, torch.randn(2, 3))
    (group,) = graph.reducible
    small = operated(model, graph, {group.name: selection([0, 2], group.size)})
    assert torch.equal(small.get_parameter("width"), model.width[[0, 2]])


@pytest.mark.parametrize("name", ["weight_norm_old", "pruned_by_torch"])
def test_weights_that_a_hook_computes(name: str) -> None:
    model, inputs = case_named(name).build()
    oracle.randomise_(model)
    graph = trace(model, inputs)
    group = channels(graph)[0]
    small = copy.deepcopy(model)
    maps = {group.name: selection(every_other(group), group.size)}
    repairs = write_weights_(
        small, reduce_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps)
    )
    sizes = {(r.module, r.attribute): r.new for r in repairs}
    kept = len(every_other(group))
    assert kept in sizes.values()
    assert all(isinstance(r, Repair) and r.old == group.size and r.new == kept for r in repairs)
    assert small(inputs).shape == model(inputs).shape


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_maps_in_which_some_channels_go_alone_are_products(order: str) -> None:
    """None, one, or many of a column's entries are filled, signs and places at random."""
    matrix = torch.randn(5, 9, dtype=torch.float64)
    matrix[:, 0] = 0
    for column, target in ((1, 4), (5, 0), (8, 4)):
        matrix[:, column] = 0
        matrix[target, column] = -2.5
    matrix = matrix if order == "rows" else matrix.T.contiguous().T
    rows = torch.randn(9, 7, dtype=torch.float64)
    member = Member("weight", 0, np.arange(9)[:, None], frozenset({Role.PRODUCES}))
    torch.testing.assert_close(map_rows(matrix, rows, member), matrix @ rows, rtol=1e-12, atol=1e-12)
