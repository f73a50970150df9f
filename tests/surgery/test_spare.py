"""What can go without loss goes first: exact copies and dead channels, judged by the output of the whole network."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from breadth import spread
from gallery import CASES, Case
from gallery.core import Wired, chain, image, pooled
from torch import Tensor, nn

from intrafusion import ChannelGraph, ChannelGroup, Role, compress, inspect
from intrafusion.errors import ModelError
from intrafusion.importance.features import describing_rows as rows_of
from intrafusion.network.inputs import Inputs
from intrafusion.planning import fold_weights
from intrafusion.reduce import Moments, ReductionProblem, Select
from intrafusion.surgery.spare import find_classes, find_dead, reduce_distinct

EXACT = 1e-9
MIXING = ("pivot", "fold", "intrafusion")
EVERY = (*MIXING, "select")
KEEP = 2 / 3  # of n channels, of which ceil(n / 2) are needed
SAMPLE = """
    mlp conv_bn_chain conv_3d resnext depthwise_separable_multiplier_bn inverted_residual_squeeze_excite
    conv_flatten_linear unet pixel_shuffle residual_identity_and_projection residual_zero_padded layer_used_twice
    film swiglu instance_norm_and_prelu batch_norm_before_the_conv hand_written_batch_norm lstm_of_two_layers gru lora
    concat_of_both_signs embedding_untied channel_shuffle densenet number_read_from_one_channel
""".split()  # noqa: SIM905
sample = [c for c in CASES if c.name in SAMPLE]


def free(graph: ChannelGraph) -> list[ChannelGroup]:
    """Groups that may be mixed."""
    return [g for g in graph.reducible if g.kind == "channel" and not g.unmixable and g.size > 1]


def built(case: Case) -> tuple[nn.Module, Any, list[ChannelGroup]]:
    model, inputs = case.build()
    model, inputs = oracle.randomise_(model).double(), oracle.double(inputs)
    return model, inputs, free(inspect(model, inputs))


def spared(group: ChannelGroup) -> tuple[np.ndarray, np.ndarray]:
    """The larger half of the channels, at random, and the others."""
    order = np.random.default_rng(0).permutation(group.size)
    return order[: (group.size + 1) // 2], order[(group.size + 1) // 2 :]


def copy_(model: nn.Module, group: ChannelGroup) -> None:
    """Whatever makes a channel of the smaller half is what makes one of the larger half."""
    kept, others = spared(group)
    for member in group.members:
        if member.roles - {Role.CONSUMES}:
            view = oracle.view_of(model, member)
            source = torch.from_numpy(member.positions[kept[: len(others)]].ravel())
            target = torch.from_numpy(member.positions[others].ravel())
            view.index_copy_(member.dim, target, view.index_select(member.dim, source))


def ignore_(model: nn.Module, group: ChannelGroup) -> None:
    """Nothing reads the smaller half."""
    for member in group.with_role(Role.CONSUMES):
        places = torch.from_numpy(member.positions[spared(group)[1]].ravel())
        oracle.view_of(model, member).index_fill_(member.dim, places, 0.0)


def error_of(model: nn.Module, inputs: Any, groups: list[ChannelGroup], reducer: str) -> float:
    keep = {g.name: KEEP for g in groups}
    small = compress(model, inputs, keep, reducer=reducer, restore=None)
    assert small.plan.sizes, "nothing was reduced"
    return oracle.relative_difference(oracle.outputs_of(small.model, inputs), oracle.outputs_of(model, inputs))


@pytest.mark.parametrize(("case", "reducer"), spread(sample, MIXING))
def test_copies_are_undone_exactly(case: Case, reducer: str) -> None:
    model, inputs, groups = built(case)
    for group in groups:
        copy_(model, group)
    assert error_of(model, inputs, groups, reducer) <= EXACT


@pytest.mark.parametrize(("case", "reducer"), spread(sample, EVERY))
def test_channels_that_nothing_reads_go_without_loss(case: Case, reducer: str) -> None:
    model, inputs, groups = built(case)
    for group in groups:
        ignore_(model, group)
    assert error_of(model, inputs, groups, reducer) <= EXACT


def grown(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, and one that was made of it by copying channels and sharing out what reads them."""
    layer = nn.Linear if kind == "mlp" else lambda a, b: nn.Conv2d(a, b, 3, padding=1)
    norm = nn.BatchNorm1d if kind == "mlp" else nn.BatchNorm2d
    small = chain(a=layer(3, 6), n=norm(6), r=nn.ReLU(), b=layer(6, 5), m=norm(5), s=nn.Sigmoid(), c=layer(5, 2))
    oracle.randomise_(small)
    big = copy.deepcopy(small)
    for name, reads, makes in (("a", 1, 2), ("n", 1, 2), ("b", 2, 2), ("m", 1, 2), ("c", 2, 1)):
        wide = big.get_submodule(name)
        for own, tensor in [*wide.named_parameters(), *wide.named_buffers()]:
            if tensor.dim() == 0:
                continue
            new = tensor.data
            if reads == 2 and own == "weight":
                share = torch.rand(new.shape[1]).view(1, -1, *[1] * (new.dim() - 2))
                new = torch.cat([new * share, new * (1 - share)], 1)
            tensor.data = torch.cat([new, new]) if makes == 2 else new
    return small.double().eval(), big.double().eval(), torch.randn(7, 3).double() if kind == "mlp" else image().double()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("reducer", MIXING)
@pytest.mark.parametrize("restore", [None, "noise"])
def test_a_network_that_was_widened_by_copying_comes_back(kind: str, reducer: str, restore: str | None) -> None:
    torch.manual_seed(0)
    small, big, x = grown(kind)
    big.c.weight.data[:] = big.c.weight.data  # as it was made
    found = compress(big, x, 0.5, reducer=reducer, restore=restore)
    assert found.plan.sizes == {"a": 6, "b": 5}
    assert oracle.relative_difference([found.model(x).detach()], [small(x).detach()]) <= 1e-6


def test_below_the_number_of_different_channels_the_reducer_decides_among_them() -> None:
    torch.manual_seed(0)
    _, big, x = grown("mlp")
    twice = compress(big, x, {"a": 3 / 12}, reducer="fold", restore=None)
    once = compress(compress(big, x, {"a": 0.5}, reducer="fold", restore=None).model, x, {"a": 0.5}, reducer="fold")
    assert twice.plan.sizes == {"a": 3}
    merged = twice.plan.maps["a"].unmerge
    assert torch.equal(merged[:6], merged[6:]), "copies go the same way"
    assert once.plan.sizes == {"a": 3}


# ---- zeros ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", EVERY)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_channels_that_are_zero_go_without_loss(reducer: str, activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = chain(a=nn.Linear(3, 8), f=activation(), b=nn.Linear(8, 2)).double().eval()
    net.a.weight.data[::2] = net.a.bias.data[::2] = 0
    net.b.weight.data[:, ::2] *= 100  # important, to those who look at columns
    x = torch.randn(5, 3).double()
    small = compress(net, x, 0.5, reducer=reducer, restore=None)
    assert oracle.relative_difference(oracle.outputs_of(small.model, x), oracle.outputs_of(net, x)) <= EXACT


def dead_of(net: nn.Module, x: Tensor, *, tried: bool = True) -> dict[str, list[int]]:
    graph = inspect(net, x)
    groups = [g for g in graph.reducible if g.kind == "channel"]
    found = find_dead(net, graph, groups, fold_weights(net, graph, groups), Inputs.of(x) if tried else None)
    return {name: mask.nonzero().flatten().tolist() for name, mask in found.items()}


def test_zeros_that_become_something_are_not_dead() -> None:
    net = chain(a=nn.Linear(3, 8), f=nn.Sigmoid(), b=nn.Linear(8, 6), g=nn.ReLU(), c=nn.Linear(6, 2)).double()
    for layer in (net.a, net.b):
        layer.weight.data[:2] = layer.bias.data[:2] = 0
    x = torch.randn(5, 3).double()
    assert dead_of(net, x) == {"b": [0, 1]}
    assert dead_of(net, x, tried=False) == {}
    net.b.weight.data[:, :1] = 0
    assert dead_of(net, x) == {"a": [0], "b": [0, 1]}


def test_a_batch_norm_that_makes_something_of_zero_keeps_it_alive() -> None:
    net = chain(a=nn.Linear(3, 4, bias=False), n=nn.BatchNorm1d(4), r=nn.ReLU(), b=nn.Linear(4, 2)).double().eval()
    net.a.weight.data[:2] = 0
    net.n.bias.data[0] = 1.0
    assert dead_of(net, torch.randn(5, 3).double()) == {"a": [1]}
    net.n.running_mean[1] = -1.0
    assert dead_of(net, torch.randn(5, 3).double()) == {}


def test_before_a_norm_over_channels_none_is_dead() -> None:
    net = chain(a=nn.Linear(3, 4), n=nn.LayerNorm(4), b=nn.Linear(4, 2)).double().eval()
    net.a.weight.data[:2] = net.a.bias.data[:2] = 0
    net.b.weight.data[:, :2] = 0
    assert dead_of(net, torch.randn(5, 3).double()) == {}


def test_a_channel_that_a_product_reads_is_not_dead_for_a_zero_column() -> None:
    net = Wired(
        lambda n, x: torch.cat([n.b(n.a(x)), n.a(x) @ n.a(x.flip(0)).T], -1), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    ).double()
    net.b.weight.data[:, 0] = 0
    assert dead_of(net, torch.randn(5, 3).double()) == {}


# ---- classes --------------------------------------------------------------------------------------------------------


def problem(group: ChannelGroup, weights: dict[str, Tensor], importance: list[float], m: int) -> ReductionProblem:
    rows = torch.cat([weights["a.weight"], weights["b.weight"].T], 1)
    return ReductionProblem(rows, torch.tensor(importance).double(), m)


def small_group() -> tuple[ChannelGroup, dict[str, Tensor]]:
    net = chain(a=nn.Linear(2, 5), r=nn.ReLU(), b=nn.Linear(5, 3)).double()
    net.a.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0], [0.0, 1.0]]).double()
    net.a.bias.data = torch.tensor([1.0, 1.0, 1.0, 2.0, 0.0]).double()
    graph = inspect(net, torch.randn(4, 2).double())
    return graph["a"], fold_weights(net, graph, [graph["a"]])


def test_equal_rows_with_another_bias_are_no_copies() -> None:
    group, weights = small_group()
    classes = find_classes(group, weights)
    assert classes.first.tolist() == [0, 1, 3, 4]
    assert classes.index.tolist() == [0, 1, 0, 2, 3]
    assert find_classes(group, weights, copies=False).first.tolist() == [0, 1, 2, 3, 4]


def test_dead_channels_are_in_no_class() -> None:
    group, weights = small_group()
    classes = find_classes(group, weights, torch.tensor([False, True, False, False, False]))
    assert classes.first.tolist() == [0, 3, 4]
    assert classes.index.tolist() == [0, 3, 0, 1, 2]


def test_what_fills_up_the_size_is_the_most_important_of_the_rest() -> None:
    group, weights = small_group()
    dead = torch.tensor([False, False, False, True, True])
    asked = problem(group, weights, [1, 1, 5, 2, 3], 4)
    found = reduce_distinct(
        Select(), group, weights, asked, find_classes(group, weights, dead), rows_of(group, weights)
    )
    assert found.merge.argmax(1).tolist() == [0, 1, 2, 4], "0 and 1 are needed; 2 and 4 count most of the others"
    assert found.unmerge.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_the_reducer_sees_classes_with_their_columns_summed() -> None:
    group, weights = small_group()
    seen: list[ReductionProblem] = []

    class Spy(Select):
        mixes = True

        def __call__(self, problem: ReductionProblem) -> Any:
            seen.append(problem)
            return super().__call__(problem)

    asked = problem(group, weights, [1, 2, 5, 2, 3], 2)
    found = reduce_distinct(Spy(), group, weights, asked, find_classes(group, weights), rows_of(group, weights))
    columns = weights["b.weight"].T
    assert torch.equal(seen[0].features[:, :2], weights["a.weight"][[0, 1, 3, 4]])
    assert torch.allclose(seen[0].features[:, 2:], torch.stack([columns[0] + columns[2], *columns[[1, 3, 4]]]))
    assert seen[0].importance.tolist() == [6, 2, 2, 3]
    assert found.merge.tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert found.unmerge.tolist() == [[1, 0], [0, 0], [1, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("few", [False, True])
def test_the_moments_of_classes_are_read_by_their_columns_summed(few: bool) -> None:
    group, weights = small_group()
    columns, rows = torch.randn(2, 5), torch.randn(9, 5, dtype=torch.float64)
    squares = columns.T.double() @ columns.double()
    moments = Moments(
        rows.mean(0)[None], torch.cov(rows.T)[None], None if few else squares, columns=columns if few else None
    )
    seen: list[Moments] = []

    class Spy(Select):
        mixes = True

        def __call__(self, problem: ReductionProblem) -> Any:
            assert problem.moments is not None
            seen.append(problem.moments)
            return super().__call__(problem)

    asked = replace(problem(group, weights, [1, 2, 5, 2, 3], 2), moments=moments)
    dead = torch.tensor([False, False, False, False, True])
    reduce_distinct(Spy(), group, weights, asked, find_classes(group, weights, dead), rows_of(group, weights))
    member = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]).double()
    first = torch.tensor([0, 1, 3])
    assert (seen[0].squares is None) == few
    torch.testing.assert_close(seen[0].reader, member.T @ squares @ member, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[0].covariances[0], torch.cov(rows.T)[first][:, first])
    assert torch.equal(seen[0].means[0], rows.mean(0)[first])


def test_relabelling_a_network_with_copies_permutes_the_result() -> None:
    torch.manual_seed(0)
    _, big, x = grown("mlp")
    turned = copy.deepcopy(big)
    order = torch.randperm(12)
    for tensor in (turned.a.weight, turned.a.bias, *turned.n.parameters(), turned.n.running_mean, turned.n.running_var):
        tensor.data = tensor.data[order]
    turned.b.weight.data = turned.b.weight.data[:, order]
    first, second = (compress(n, x, {"a": 0.25}, restore=None, reducer="intrafusion").model for n in (big, turned))
    assert oracle.relative_difference([first(x).detach()], [second(x).detach()]) <= EXACT


def test_a_network_without_anything_to_spare_is_reduced_as_before() -> None:
    group, weights = small_group()
    weights["a.weight"][2] += 1
    classes = find_classes(group, weights)
    assert not classes.spare
    asked = problem(group, weights, [1, 2, 5, 2, 3], 2)
    found = reduce_distinct(Select(), group, weights, asked, classes, rows_of(group, weights))
    assert torch.equal(found.merge, Select()(asked).merge)


def test_pooled_networks_with_unread_channels() -> None:
    """Both kinds at once, in a network with a residual stream."""
    torch.manual_seed(0)
    net = Wired(
        lambda n, x: n.head(pooled((h := n.stem(x).relu()) + n.b(n.a(h).relu()))),
        stem=nn.Conv2d(3, 8, 3), a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 8, 1), head=nn.Linear(8, 2),
    ).double()  # fmt: skip
    for layer in (net.stem, net.b):
        layer.weight.data[4:] = layer.weight.data[:4]
        layer.bias.data[4:] = layer.bias.data[:4]
    net.b.weight.data[:, :3] = 0
    x = image().double()
    for reducer in MIXING:
        small = compress(net, x, 0.5, reducer=reducer, restore=None)
        assert small.plan.sizes == {"stem": 4, "a": 3}
        assert oracle.relative_difference(oracle.outputs_of(small.model, x), oracle.outputs_of(net, x)) <= EXACT


def test_nothing_to_reduce_is_still_said() -> None:
    with pytest.raises(ModelError, match="no channel group to reduce"):
        compress(nn.Linear(3, 2), torch.randn(4, 3), 0.5)
