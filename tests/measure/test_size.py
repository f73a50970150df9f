"""Parameters and multiply-accumulates against counts by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.lab import zoo
from intrafusion.measure.size import Size, factors_of_products, macs_by_weight, size_of
from intrafusion.network.inputs import ExampleInputs


# weights per output value, times output values
@pytest.mark.parametrize(
    ("layer", "shape", "params", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 5 * 7 + 5, 3 * 5 * 7),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 5 * 7, 6 * 5 * 7),
        (nn.Conv2d(4, 6, 3), (1, 4, 8, 7), 6 * 4 * 9 + 6, (6 * 5) * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 6 * 4 * 9 + 6, 2 * (4 * 4) * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (1, 3), dilation=2), (1, 4, 8, 8), 6 * 4 * 3 + 6, (8 * 4) * 6 * 4 * 3),
        (nn.Conv2d(4, 8, 3, groups=2), (1, 4, 5, 5), 8 * 2 * 9 + 8, (3 * 3) * 8 * 2 * 9),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (1, 6, 5, 5), 6 * 9, (3 * 3) * 6 * 9),
        (nn.Conv1d(4, 6, 3), (2, 4, 7), 6 * 4 * 3 + 6, 2 * 5 * 6 * 4 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5), 3 * 2 * 8 + 3, (2 * 3 * 4) * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 4 * 3 * 9 + 6, (5 * 5) * 4 * 3 * 9),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 8, 0),
    ],
)
def test_one_layer(layer: nn.Module, shape: tuple[int, ...], params: int, macs: int) -> None:
    assert size_of(layer, torch.randn(shape)) == Size(params, macs)


def test_a_small_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 8 x 8 out
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),  # 4 x 4 out
        nn.Conv2d(8, 16, 1, bias=False),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    params = (8 * 27 + 8) + 16 + 8 * 9 + 16 * 8 + (256 * 10 + 10)
    macs = 64 * 8 * 27 + 16 * 8 * 9 + 16 * 16 * 8 + 256 * 10
    assert size_of(model, torch.randn(1, 3, 8, 8)) == Size(params, macs)


def test_macs_are_those_of_the_whole_batch() -> None:
    model = zoo.build("digits_resnet")
    one, five = (size_of(model, zoo.example_input("digits_resnet", batch=n)) for n in (1, 5))
    assert five == Size(one.params, 5 * one.macs)


def test_a_cifar_resnet_has_its_published_size() -> None:
    """41 million MACs (He et al. 2016 give 0.27M parameters): 3x3 convolutions, stage by stage, and the head."""
    stem, stage = 1024 * 16 * 27, 1024 * 16 * 16 * 9
    first = [256 * 32 * 16 * 9, 64 * 64 * 32 * 9]  # of the second and third stage, which halve the image
    macs = stem + 6 * stage + 2 * 5 * stage + sum(first) + 640
    assert size_of(zoo.build("cifar10_resnet20_pad"), zoo.example_input("cifar10_resnet20_pad")) == Size(269_722, macs)


class SelfAttention(nn.Module):
    """PyTorch's own, which has a fused fast path in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


PROJECTIONS, SCORES = 4 * (2 * 5) * 8 * 8, 2 * (2 * 5 * 5) * 8  # batch 2, 5 tokens, width 8


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (SelfAttention(), PROJECTIONS + SCORES),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), PROJECTIONS + SCORES + 2 * (2 * 5) * 8 * 16),
        (nn.LSTM(8, 6, batch_first=True), (2 * 5) * 4 * 6 * (8 + 6)),
        (nn.GRU(8, 6, batch_first=True), (2 * 5) * 3 * 6 * (8 + 6)),
    ],
    ids=["attention", "encoder", "lstm", "gru"],
)
def test_fused_kernels_count_too(model: nn.Module, macs: int) -> None:
    assert size_of(model, torch.randn(2, 5, 8)).macs == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_grouped_queries_count_every_query_head() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    inputs = (torch.randn(2, 4, 5, 3), torch.randn(2, 2, 7, 3))  # 4 query heads, 2 key heads
    assert size_of(Grouped(), inputs) == Size(0, 2 * 4 * 2 * 5 * 7 * 3)


def test_shared_parameters_count_once_and_their_work_each_time() -> None:
    shared = nn.Linear(6, 6)
    assert size_of(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(1, 6)) == Size(42, 72)


def test_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    size_of(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_named_inputs_and_inputs_that_do_not_fit() -> None:
    assert size_of(nn.Linear(4, 3), {"input": torch.zeros(2, 4)}) == Size(15, 24)
    with pytest.raises(ModelError, match=r"the network \(Linear\) does not run on the example inputs"):
        size_of(nn.Linear(4, 3), torch.zeros(2, 5))


# ---- who multiplies does not matter ---------------------------------------------------------------------------------


class PaddedByChild(nn.Conv2d):
    """A convolution that holds its padding as a module."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.padding_of_its_own = nn.ZeroPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.padding_of_its_own(x))


class Bare(nn.Module):
    """Weights that no layer owns, each used in another way; one is a buffer, one is scaled before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.map = nn.Parameter(torch.randn(6, 4, 3)), nn.Parameter(torch.randn(6, 5))
        self.query = nn.Parameter(torch.randn(5))
        self.register_buffer("mixing", torch.randn(5, 5))
        self.table = nn.Embedding(9, 5)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = F.conv1d(x, self.kernel)  # (2, 6, 7)
        x = torch.einsum("bct,cd->btd", x, 2 * self.map)  # (2, 7, 5)
        x = (x + self.table(ids)) @ self.mixing
        return torch.mv(x[0], self.query) + F.linear(x[1], self.query[None])[:, 0]


def test_weights_outside_of_layers_count() -> None:
    inputs = (torch.randn(2, 4, 9), torch.zeros(2, 7, dtype=torch.long))
    counts = {"kernel": 2 * 7 * 6 * 4 * 3, "map": 2 * 7 * 6 * 5, "mixing": 2 * 7 * 5 * 5, "query": 2 * 7 * 5}
    model = Bare()
    assert size_of(model, inputs) == Size(6 * 4 * 3 + 6 * 5 + 5 + 9 * 5, sum(counts.values()))
    assert macs_by_weight(model, inputs) == counts


def test_a_convolution_with_a_child_counts_as_one_without() -> None:
    x = torch.randn(2, 3, 8, 7)
    assert size_of(PaddedByChild(3, 4, 3), x) == Size(4 * 3 * 9 + 4, 2 * 8 * 7 * 4 * 3 * 9)
    assert macs_by_weight(PaddedByChild(3, 4, 3), x) == {"weight": 2 * 8 * 7 * 4 * 3 * 9}


@pytest.mark.parametrize(
    ("model", "inputs", "macs"),
    [
        (nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4)), 2 * 5 * 3 * 4),
        (nn.Linear(4, 3), torch.randn(4), 12),
        (nn.Embedding(7, 4), torch.zeros(2, 3, dtype=torch.long), 0),
    ],
    ids=["bilinear", "one vector", "embedding"],
)
def test_products_that_the_flop_counter_leaves_out(model: nn.Module, inputs: ExampleInputs, macs: int) -> None:
    assert size_of(model, inputs).macs == macs


def test_a_forward_in_inference_mode_counts() -> None:
    class Still(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.inference_mode():
                return super().forward(input)

    assert macs_by_weight(Still(4, 3), torch.randn(2, 4)) == {"weight": 24}


def test_work_goes_to_the_weights_of_plain_networks_as_it_did_layer_by_layer() -> None:
    conv, head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    model = nn.Sequential(
        conv, nn.BatchNorm2d(8), depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head, nn.Softmax(1)
    )
    found = macs_by_weight(model, torch.randn(2, 3, 8, 8))
    assert found == {"0.weight": 2 * 36 * 8 * 27, "2.weight": 2 * 16 * 8 * 9, "5.weight": 2 * 80}


def test_a_reparametrised_weight_and_its_parts() -> None:
    """Weight norm computes the weight from a direction and a length; low-rank additions are products of their own."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    found = macs_by_weight(normed, torch.randn(2, 6))
    assert found == {"parametrizations.weight.original1": 60}

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 5)
            self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight + self.up @ self.down)

    assert macs_by_weight(Adapted(), torch.randn(3, 6)) == {"weight": 3 * 30, "down": 5 * 2 * 6}


def test_the_factors_of_a_product_are_its_macs() -> None:
    assert factors_of_products(nn.Linear(4, 3), torch.zeros(2, 4)) == [(2, 4, 3)]
    assert factors_of_products(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(1, 4, 5, 5)) == [(1, 6, 3, 3, 2, 3, 3)]
    assert factors_of_products(nn.ConvTranspose1d(4, 6, 3), torch.zeros(1, 4, 5)) == [(1, 4, 5, 6, 3)]
