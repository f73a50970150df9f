"""Fusing networks: exact on permuted copies, far above the plain average on trained ones, refused where it must be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ModelError
from intrafusion.fusion import Alignment, Fused, fuse
from intrafusion.lab import zoo
from intrafusion.lab.zoo.networks import MLP, BasicBlock, DenseNet, ResNet
from intrafusion.measure.accuracy import accuracy
from intrafusion.trace import trace

EXACT = 1e-9


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, and a flatten."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        self.grouped = nn.Conv2d(width, width, 3, groups=2)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv1(x).relu()).relu()
        return self.fc(self.bn(self.depthwise(x)).relu().flatten(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(12, (9, 7), num_classes=4), (6, 12)),
    "residual": (lambda: ResNet(BasicBlock, [2, 1], [6, 9], channels=2), (3, 2, 6, 6)),
    "dense": (lambda: DenseNet((2, 2), 4), (3, 3, 8, 8)),
    "grouped": (Grouped, (3, 3, 8, 8)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights and statistics in float64, and images for it."""
    build, shape = NETWORKS[name]
    return oracle.randomise_(build()).double().eval(), torch.randn(*shape, dtype=torch.float64)


def shuffled(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """The same function with the channels of every group in another order, by the oracle's own code."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for group in trace(model, x).reducible:
        if group.is_channel and group.size > 1:
            oracle.permute_(twin, group.members, oracle.derangement(group.size, generator))
    return twin


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return oracle.outputs_of(model, x)


@every_network
@pytest.mark.parametrize("using", ["weights", "activations"])
@pytest.mark.parametrize("sides", ["inputs", "both"])
def test_a_permuted_copy_fuses_back_exactly(name: str, using: str, sides: str) -> None:
    model, x = made(name)
    twin = shuffled(model, x)
    assert oracle.relative_difference(outputs(twin, x), outputs(model, x)) < EXACT
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    found = fuse([model, twin], x, using=using, images=x, alignment=Alignment(sides=sides))
    for (key, a), b in zip(model.state_dict().items(), found.model.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=EXACT, atol=EXACT, msg=key)


@every_network
def test_the_maps_are_the_permutations_that_were_made(name: str) -> None:
    model, x = made(name)
    found = fuse([model, shuffled(model, x)], x)
    generator = torch.Generator().manual_seed(0)
    for group in trace(model, x).reducible:
        if group.is_channel and group.size > 1:
            order = oracle.derangement(group.size, generator)
            expected = torch.eye(group.size, dtype=torch.float64)[torch.argsort(order)]
            torch.testing.assert_close(found.alignments[1][group.name].merge, expected)


def test_the_direction_cost_finds_them_too() -> None:
    model, x = made("residual")
    found = fuse([model, shuffled(model, x)], x, alignment=Alignment(cost="direction"))
    assert oracle.relative_difference(outputs(found.model, x), outputs(model, x)) < EXACT


@pytest.mark.parametrize("using", ["weights", "activations"])
def test_the_order_of_the_others_does_not_matter(using: str) -> None:
    models = [made("residual")[0] for _ in range(3)]
    x = made("residual")[1]
    one = fuse(models, x, using=using, images=x, weights=[1, 2, 3])
    other = fuse([models[2], models[0], models[1]], x, using=using, images=x, weights=[3, 1, 2], anchor=1)
    assert oracle.relative_difference(outputs(other.model, x), outputs(one.model, x)) < EXACT


def test_weights_of_one_network_alone_give_that_network() -> None:
    (a, x), (b, _) = made("residual"), made("residual")
    for shares, expected in (([1.0, 0.0], a), ([0.0, 1.0], b)):
        found = fuse([a, b], x, weights=shares)
        assert oracle.relative_difference(outputs(found.model, x), outputs(expected, x)) < EXACT


def test_without_rescaling_folded_layers_are_averaged() -> None:
    """The oracle: two linear layers, the second network's hidden units aligned by hand."""
    a, b = (nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).double() for _ in "ab")
    a[0].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double()
    b[0].weight.data = torch.tensor([[0.2, 2, 0], [3.0, 0, 0.4]]).double()  # rows the other way round
    found = fuse([a, b], torch.randn(2, 3).double(), weights=[3, 1], rescale=False)
    hidden, out = (layer.weight for layer in (found.model[0], found.model[2]))
    torch.testing.assert_close(hidden, 0.75 * a[0].weight + 0.25 * b[0].weight.flip(0))
    torch.testing.assert_close(out, 0.75 * a[2].weight + 0.25 * b[2].weight.flip(1))
    scaled = fuse([a, b], torch.randn(2, 3).double(), weights=[3, 1]).model[0].weight
    torch.testing.assert_close(
        scaled.norm(dim=1), 0.75 * a[0].weight.norm(dim=1) + 0.25 * b[0].weight.flip(0).norm(dim=1)
    )
    torch.testing.assert_close(nn.functional.normalize(scaled), nn.functional.normalize(hidden))


@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize("using", ["weights", "activations"])
def test_a_network_with_doubled_channels_fuses_exactly(anchor: int, using: str) -> None:
    """Every hidden channel twice, each with half of the outgoing weight: the same function at another width."""
    model, x = made("mlp")
    wide = MLP(12, (18, 14), num_classes=4).double()
    wide.fc1.weight.data = model.fc1.weight.repeat_interleave(2, 0)
    wide.fc2.weight.data = model.fc2.weight.repeat_interleave(2, 0).repeat_interleave(2, 1) / 2
    wide.fc3.weight.data = model.fc3.weight.repeat_interleave(2, 1) / 2
    found = fuse([model, wide], x, anchor=anchor, using=using, images=x)
    assert found.model.fc1.out_features == (9, 18)[anchor]
    if using == "activations":  # rows of weights are half as long in the wide network
        assert oracle.relative_difference(outputs(found.model, x), outputs(model, x)) < EXACT


def test_networks_of_other_widths_take_the_widths_of_the_anchor() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = fuse([Grouped(8).eval(), Grouped(12).eval(), Grouped(6).eval()], x, anchor=1)
    assert {n: tuple(t.shape) for n, t in found.model.named_parameters()} == {
        n: tuple(t.shape) for n, t in Grouped(12).named_parameters()
    }
    assert all(torch.isfinite(t).all() for t in outputs(found.model.double(), x.double()))


def test_a_given_width_is_narrower_than_all() -> None:
    (a, x), (b, _) = made("residual"), made("residual")
    found = fuse([a, b], x, keep=0.5)
    assert found.model.conv1.out_channels == 3
    assert found.plan.sizes
    assert {tuple(m.merge.shape) for m in (maps["conv1"] for maps in found.alignments)} == {(3, 6)}
    assert torch.isfinite(outputs(found.model, x)[0]).all()


def test_the_networks_are_left_as_they_were() -> None:
    models = [made("residual")[0] for _ in range(2)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    fuse(models, made("residual")[1])
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_the_same_inputs_give_the_same_bytes() -> None:
    (a, x), (b, _) = made("dense"), made("dense")
    one, other = (fuse([a, b], x).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_anchor(dtype: torch.dtype) -> None:
    (a, x), (b, _) = made("mlp"), made("mlp")
    found = fuse([a.to(dtype), b.to(dtype)], x.to(dtype))
    assert {p.dtype for p in found.model.parameters()} == {dtype}


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    (a, x), (b, _) = made("residual"), made("residual")
    for keep in (1.0, 0.5):
        found = fuse([a, b], x, keep=keep)
        found.save(tmp_path / "fused")
        loaded = intrafusion.load(tmp_path / "fused", copy.deepcopy(a))
        assert all(torch.equal(t, loaded.state_dict()[k]) for k, t in found.model.state_dict().items())


def test_a_fused_network_compresses_further() -> None:
    (a, x), (b, _) = made("residual"), made("residual")
    small = intrafusion.apply(
        model := fuse([a, b], x).model,
        intrafusion.decide(model, graph := intrafusion.inspect(model, x), intrafusion.Recipe.of(keep=0.5)),
        x,
        graph=graph,
    )
    assert small.model.conv1.out_channels == 3


# ---- refused --------------------------------------------------------------------------------------------------------


def test_another_depth_is_refused_with_the_first_tensor_that_differs() -> None:
    shallow, deep = (ResNet(BasicBlock, d, [4, 4], channels=1).eval() for d in ([1, 1], [1, 2]))
    with pytest.raises(ModelError, match=r"network 1 has no 'layer2\.1\.conv1\.weight'.*one depth"):
        fuse([deep, shallow], torch.randn(1, 1, 6, 6))
    with pytest.raises(ModelError, match=r"the anchor has no 'layer2\.1\.conv1\.weight'"):
        fuse([shallow, deep], torch.randn(1, 1, 6, 6))


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'fc2' has 3 channels in network 1 and 4 in the anchor.*output of"):
        fuse([MLP(6, (5,), num_classes=4), MLP(6, (5,), num_classes=3)], torch.randn(2, 6))


class Wiring(nn.Module):
    """The same three layers, with or without a skip."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c(self.b(x).relu() + x if self.skip else self.b(x).relu())


def test_another_wiring_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the layers are connected in another way"):
        fuse([Wiring(skip=True), Wiring(skip=False)], torch.randn(2, 4))


def test_another_kernel_size_is_refused() -> None:
    nets = [nn.Sequential(nn.Conv2d(1, 4, k, padding=k // 2), nn.ReLU(), nn.Conv2d(4, 2, 1)) for k in (3, 5)]
    with pytest.raises(ModelError, match=r"'0\.weight' is \[4, 1, 5, 5\] in network 1"):
        fuse(nets, torch.randn(1, 1, 6, 6))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"using": "gradients"}, ValueError, "unknown using 'gradients'"),
        ({"using": "activations"}, ModelError, "pass images="),
        ({"weights": [1.0]}, ValueError, "expected 2 numbers"),
        ({"weights": [1.0, -1.0]}, ValueError, "expected 2 numbers"),
        ({"weights": [0.0, 0.0]}, ValueError, "expected 2 numbers"),
        ({"anchor": 2}, ValueError, r"expected an index in 0\.\.1"),
    ],
)
def test_bad_arguments_say_so(options, error, match) -> None:
    (a, x), (b, _) = made("mlp"), made("mlp")
    with pytest.raises(error, match=match):
        fuse([a, b], x, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"cost": "taxi"}, "unknown cost"), ({"sides": "left"}, "unknown sides"), ({"rounds": 0}, "at least 1")],
)
def test_a_bad_alignment_says_so(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        Alignment(**options)


def test_one_network_is_no_fusion() -> None:
    model, x = made("mlp")
    with pytest.raises(ValueError, match="at least two networks"):
        fuse([model], x)


# ---- trained networks -----------------------------------------------------------------------------------------------


def plain_average(a: nn.Module, b: nn.Module) -> nn.Module:
    mean = copy.deepcopy(a)
    states = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    mean.load_state_dict({k: ((x + y) / 2).to(x.dtype) for (k, x), y in states})
    return mean


@pytest.fixture(scope="module")
def digit_networks(digits_network: nn.Module) -> list[nn.Module]:
    return [copy.deepcopy(digits_network), zoo.train_digits(seed=1)]


def test_two_residual_networks_trained_apart_fuse_far_above_their_average(digit_networks: list[nn.Module]) -> None:
    test, some = zoo.load_data("digits", "test"), zoo.load_data("digits", "train", limit=200)
    x = zoo.example_input("digits_resnet")
    right = lambda model: accuracy(model, test.images, test.labels)  # noqa: E731
    assert min(map(right, digit_networks)) > 0.97
    assert right(plain_average(*digit_networks)) < 0.3
    assert right(fuse(digit_networks, x).model) > 0.4
    assert right(fuse(digit_networks, x, rescale=False).model) < 0.3
    found = fuse(digit_networks, x, using="activations", images=some.images)
    assert isinstance(found, Fused)
    assert right(found.model) > 0.75
    restored = fuse(digit_networks, x, using="activations", images=some.images, restore="least_squares")
    assert right(restored.model) > 0.95


def test_two_mnist_networks_fuse_far_above_their_average(data_dir) -> None:
    networks = [zoo.build(f"mnist_mlp_{k}", pretrained=True) for k in "ab"]
    test, some = zoo.load_data("mnist", "test", limit=2000), zoo.load_data("mnist", "train", limit=200)
    x = zoo.example_input("mnist_mlp_a")
    right = lambda model: accuracy(model, test.images, test.labels)  # noqa: E731
    plain = right(plain_average(*networks))
    assert plain < 0.8
    assert right(fuse(networks, x).model) > 0.93
    assert right(fuse(networks, x, using="activations", images=some.images).model) > 0.93


def test_printed_it_says_what_was_fused_not_that_nothing_became_smaller() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])  # two of eight change their place
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.copy_(first[0].weight[order])
        second[0].bias.copy_(first[0].bias[order])
        second[2].weight.copy_(first[2].weight[:, order])
    for anchor, models in ((0, [first, second]), (1, [second, first])):
        fused = fuse(models, torch.randn(2, 4), anchor=anchor)
        assert fused.moved == {"0": 0.25}
        lines = str(fused).splitlines()
        assert lines[0].startswith("Sequential: 2 networks fused into one of the same size; 25% of the channels")
        assert ["parameters", "67"] in [line.split() for line in lines]  # 5 * 8 + 9 * 3
        assert [line.split() for line in lines if line.startswith("0 ")] == [["0", "8", "25%", "2"]]
        assert "leaves every group as it is" not in str(fused)
    narrow = " ".join(str(fuse([first, second], torch.randn(2, 4), keep=0.5)).split())
    assert "2 networks fused into one, narrower than network 1: 1 of 2 channel groups are smaller" in narrow
