"""One layer for observing and restoring: what it reads and gives, where a group's channels lie, what is watched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import intrafusion
from intrafusion.graph import ChannelGraph, Member, Role, Slice
from intrafusion.network.layers import Layer, Port, find_layers, is_convolution_or_linear, is_linear_map, watch_calls


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(3, 4, 5, stride=3, padding=2),
        nn.Conv3d(3, 4, 2, padding=1),
        nn.Linear(7, 4),
    ],
    ids=str,
)
def test_patches_times_the_weight_are_the_outputs(layer: nn.Conv2d) -> None:
    sizes = {nn.Conv1d: (5, 3, 11), nn.Conv3d: (5, 3, 4, 5, 6), nn.Linear: (5, 6, 7)}
    x, found = torch.randn(sizes.get(type(layer), (5, 3, 9, 8))), Layer("layer", layer)
    with torch.no_grad():
        y = layer(x)
        places = found.sample_places(y, 17, seed=0)
        torch.testing.assert_close(found.compute(found.take_inputs(x, places)), found.take_outputs(y, places))
    assert len(places) == 17
    assert len(places.unique(dim=0)) == 17


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format], ids=str)
def test_rows_are_the_same_however_images_lie_in_memory(form: torch.memory_format) -> None:
    x = torch.randn(5, 3, 4, 6).contiguous(memory_format=form)
    places = torch.tensor([[0, 0, 0], [1, 3, 5], [4, 2, 1]])
    expected = torch.stack([x[0, :, 0, 0], x[1, :, 3, 5], x[4, :, 2, 1]])
    assert torch.equal(Layer("layer", nn.Conv2d(3, 4, 1)).take_rows(x, places), expected)


class Several(nn.Module):
    """A dense layer with its norm, a grouped, a transposed, two tied and a parametrised one."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.grouped, self.transposed = nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose2d(4, 6, 1)
        self.tied, self.twin = nn.Linear(6, 6), nn.Linear(6, 6)
        self.twin.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.grouped(self.norm(self.dense(x)).relu()).relu()).mean((2, 3))
        return self.normed(self.twin(self.tied(x)))


def test_which_layers_are_found_and_the_norm_behind_them() -> None:
    model = Several().eval()
    graph = intrafusion.inspect(model, torch.randn(2, 3, 4, 4))
    found = find_layers(model, graph)
    assert found.keys() == {"dense"}
    assert found["dense"].norm is not None
    assert found["dense"].norm.mean is model.norm.running_mean
    assert found["dense"].weight_name == "dense.weight"
    assert find_layers(model, graph, is_convolution_or_linear).keys() == {"dense", "grouped"}
    assert find_layers(model, graph, is_linear_map).keys() == {"dense", "grouped", "transposed", "normed"} - {"normed"}
    assert Layer("", nn.Linear(2, 2)).weight_name == "weight"


@pytest.mark.parametrize(
    ("layer", "dim", "reads"),
    [
        (nn.Linear(4, 3), 1, True),
        (nn.Linear(4, 3), 0, False),
        (nn.Conv2d(4, 3, 1), 1, True),
        (nn.ConvTranspose1d(4, 3, 1), 0, True),
        (nn.ConvTranspose1d(4, 3, 1), 1, False),
    ],
    ids=str,
)
def test_a_port_reads_along_the_input_dimension(layer: nn.Linear, dim: int, reads: bool) -> None:
    member = Member("a.weight", dim, np.arange(3)[:, None], frozenset([Role.CONSUMES]))
    port = Port.of(Layer("a", layer), member)
    assert (port.reads, port.weight) == (reads, "a.weight")


def test_channels_of_the_second_half_of_a_grouped_convolution() -> None:
    """Positions along the inputs of a grouped convolution count from the first input of the group."""
    layer = Layer("a", nn.Conv2d(6, 4, 1, groups=2))
    member = Member("a.weight", 1, np.array([[2], [0]]), frozenset([Role.CONSUMES]), Slice(0, 2, 4))
    x = torch.randn(5, 6, 2, 3)
    torch.testing.assert_close(Port.of(layer, member).take_channels(x), x[:, [5, 3]].flatten(2))
    torch.testing.assert_close(Port.of(layer, member).take_channels(x[0]), x[:1, [5, 3]].flatten(2))


def test_slots_of_a_channel_count_as_places() -> None:
    member = Member("a.weight", 1, np.array([[0, 1], [4, 5]]), frozenset([Role.CONSUMES]))
    x = torch.randn(3, 7, 6)
    found = Port.of(Layer("a", nn.Linear(6, 2)), member).take_channels(x)
    torch.testing.assert_close(found[:, 1], x[:, :, 4:].flatten(1))


def test_watching_sees_inputs_before_and_outputs_after_and_may_replace_them() -> None:
    model, said = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), []
    x = torch.randn(4, 2)

    def called(key: int, x: Tensor, output: Tensor) -> Tensor | None:
        said.append(("called", key, x.shape[1], output.shape[1]))
        return torch.zeros_like(output) if key == 0 else None

    modules = {0: model[0], 1: model[1]}
    with watch_calls(modules, called, reached=lambda key, x: said.append(("reached", key, x.shape[1]))):
        torch.testing.assert_close(model(x), model[1].bias.expand(4, 1))
    assert said[:4] == [("reached", 0, 2), ("called", 0, 2, 3), ("reached", 1, 3), ("called", 1, 3, 1)]
    model(x)
    assert len(said) == 4


def test_modes_do_not_see_what_the_watching_computes() -> None:
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    counter = FlopCounterMode(display=False)
    with watch_calls({"layer": layer}, reached=lambda _, x: x @ x.T), counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 4 * 2 * 3


def test_a_graph_without_norms_gives_layers_without() -> None:
    assert find_layers(nn.Sequential(nn.Linear(2, 2)), ChannelGraph(()))["0"].norm is None


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (nn.Linear(10, 16), 20_000),
        (nn.Linear(10, 4096), 1536),  # as many as give 6 * 2^20 numbers
        (nn.Linear(100, 4096), 3200),  # 32 for each input
        (nn.Conv2d(512, 512, 3), 20_000),
        (nn.Conv2d(4096, 4096, 3, groups=4096), 1024),
    ],
)
def test_rows_that_would_take_much_memory_are_fewer(layer: nn.Module, rows: int) -> None:
    assert Layer("layer", layer).limit_rows(20_000) == rows  # type: ignore[arg-type]
