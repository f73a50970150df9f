"""What is seen of a group equals what the definition gives, by hand; the network is left as it was found."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import CASES, Case
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from intrafusion import ChannelGraph, inspect
from intrafusion.errors import IntrafusionError, ModelError
from intrafusion.importance import (
    CHIP,
    IMPORTANCES,
    Activations,
    BNScale,
    Magnitude,
    Observation,
    ObservationError,
    RelativeContribution,
    Taylor,
)
from intrafusion.network.inputs import Inputs
from intrafusion.observe.observe import MAPS, PLACES, observe, observe_for
from intrafusion.planning import fold_weights
from intrafusion.trace import trace

ALL = ("tensors", "gradients", "activations", "feature_maps", "contributions")


class Residual(nn.Module):
    """A stream that two layers read and two give, an inner group, and a flatten before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.outer = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.outer(self.inner(x).relu())).relu()
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual()
    model.norm.running_mean.copy_(torch.randn(4))
    model.norm.running_var.copy_(torch.rand(4) + 0.5)
    nn.init.uniform_(model.norm.weight, -1, 1)
    return model.eval()


IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
MODEL = network()
GRAPH = inspect(MODEL, IMAGES[:1])
STREAM, INNER = GRAPH["stem"], GRAPH["inner"]


def seen(images: Any, *needs: str, model: nn.Module = MODEL, graph: ChannelGraph = GRAPH, **more: Any) -> Any:
    return observe(model, graph, graph.reducible, images, needs, **more)


def what_layers_read(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: found.__setitem__(name, args[0]))
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


# ---- gradients ------------------------------------------------------------------------------------------------------


def backward(loss_of_outputs: Any) -> dict[str, Tensor]:
    twin = copy.deepcopy(MODEL)
    loss_of_outputs(twin(IMAGES)).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (LABELS, lambda y: F.cross_entropy(y, LABELS)),
        (torch.ones(6, 3) / 3, lambda y: (y - 1 / 3).square().mean()),
        (None, lambda y: y.square().sum() / (2 * 6)),
    ],
    ids=["classes", "values", "unlabelled"],
)
@pytest.mark.parametrize("batch_size", [6, 4])
def test_gradients_are_those_of_the_mean_loss(labels: Tensor | None, loss: Any, batch_size: int) -> None:
    tensors = (IMAGES,) if labels is None else (IMAGES, labels)
    found = seen(DataLoader(TensorDataset(*tensors), batch_size=batch_size), "gradients")
    expected = backward(loss)
    for group in (STREAM, INNER):
        gradients = found[group.name].gradients
        assert gradients.keys() == {m.tensor for m in group.members} & expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert found["stem"].images == 6


def test_a_loss_that_the_network_returns_is_the_loss() -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(MODEL)

        def forward(self, pixels: Tensor, labels: Tensor) -> Any:
            logits = self.net(pixels)
            return SimpleNamespace(
                to_tuple=lambda: (logits,), loss=3 * F.nll_loss(logits.log_softmax(1), labels), logits=logits
            )

    model = Judge().eval()
    batch = {"pixels": IMAGES, "labels": LABELS}
    graph = inspect(model, batch)
    found = observe(model, graph, graph.reducible, [batch], ["gradients"])
    expected = backward(lambda y: 3 * F.cross_entropy(y, LABELS))
    torch.testing.assert_close(found["net.stem"].gradients["net.stem.weight"], expected["stem.weight"])


def test_a_parameter_that_the_loss_does_not_see_has_gradient_zero() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.used, self.unused = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x).relu()
            return self.used(x), self.unused(x)

    model, x = TwoHeads().eval(), torch.randn(7, 4)
    graph = inspect(model, x)
    labels = torch.zeros(7, dtype=torch.long)
    gradients = observe(model, graph, graph.reducible, [(x, labels)], ["gradients"])["body"].gradients
    assert gradients is not None
    assert float(gradients["unused.weight"].abs().max()) == 0
    assert float(gradients["used.weight"].abs().max()) > 0


class Overwrites(nn.Module):
    """Computes with `mul` in place or not what is needed to differentiate the sigmoid."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.in_place = nn.Linear(3, 5), nn.Linear(5, 2), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).sigmoid()
        return self.second(x.mul_(2.0) if self.in_place else x * 2.0)


def test_networks_that_overwrite_what_gradients_need() -> None:
    found = []
    for in_place in (True, False):
        model, x = Overwrites(in_place=in_place).eval(), torch.arange(12.0).reshape(4, 3) / 12
        graph = inspect(model, x)
        found.append(observe(model, graph, graph.reducible, [x[:1], x[1:]], ALL)["first"])
    for name in found[0].gradients:  # type: ignore[union-attr]
        torch.testing.assert_close(found[0].gradients[name], found[1].gradients[name])  # type: ignore[index]
    assert torch.equal(found[0].feature_maps, found[1].feature_maps)  # type: ignore[arg-type]
    assert found[0].images == 4
    assert len(found[0].feature_maps) == 4  # type: ignore[arg-type]


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_activations_are_means_over_all_readers() -> None:
    found = seen([IMAGES[:2], IMAGES[2:]], "activations")
    read = what_layers_read(MODEL, IMAGES)
    for group, readers in ((INNER, [read["outer"]]), (STREAM, [read["inner"], read["head"].unflatten(1, (4, 4, 4))])):
        statistics = found[group.name].activations
        assert isinstance(statistics, Activations)
        mean = torch.stack([x.double().mean((0, 2, 3)) for x in readers]).mean(0)
        square = torch.stack([x.double().square().mean((0, 2, 3)) for x in readers]).mean(0)
        torch.testing.assert_close(statistics.mean, mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(statistics.mean_square, square, rtol=1e-6, atol=1e-8)


def test_feature_maps_are_what_the_first_reader_sees() -> None:
    images = torch.randn(MAPS + 9, 2, 8, 8)
    found = seen(images.split(7), "feature_maps")
    read = what_layers_read(MODEL, images)
    for group, reader in ((INNER, "outer"), (STREAM, "inner")):
        torch.testing.assert_close(found[group.name].feature_maps, read[reader][:MAPS].flatten(2), rtol=1e-5, atol=1e-6)


def test_places_of_large_maps_are_sampled_alike_for_all_channels_and_by_seed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1)).eval()
    images = torch.randn(2, 1, 40, 40)
    graph = inspect(model, images[:1])
    maps = [
        observe(model, graph, graph.reducible, images, ["feature_maps"], seed=s)["0"].feature_maps for s in (0, 0, 1)
    ]
    assert [m.shape for m in maps if m is not None] == [(2, 3, PLACES)] * 3
    assert torch.equal(maps[0], maps[1])  # type: ignore[arg-type]
    assert not torch.equal(maps[0], maps[2])  # type: ignore[arg-type]
    with torch.no_grad():
        columns = {tuple(c) for c in model[0](images).flatten(2)[0].T.tolist()}
    assert {tuple(c) for c in maps[0][0].T.tolist()} <= columns  # type: ignore[index]


def test_images_of_several_sizes() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1)).eval()
    graph = inspect(model, IMAGES[:1])
    batches = [torch.randn(2, 2, 8, 8), torch.randn(3, 2, 9, 9)]
    found = observe(model, graph, graph.reducible, batches, ["activations", "feature_maps"])["0"]
    assert found.feature_maps is not None
    assert found.feature_maps.shape == (2, 4, 36)  # of the first size only
    with torch.no_grad():
        means = torch.cat([model[1](model[0](b)).mean((2, 3)) for b in batches]).mean(0)  # every image weighs the same
    torch.testing.assert_close(found.activations.mean.float(), means)  # type: ignore[union-attr]


def shares(weight: Tensor, patches: Tensor) -> Tensor:
    """Definition, one output at a time: patches (rows, d), weight (outputs, d) -> mean share of each entry, (d,)."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for row in patches.double():
        for w in weight.double():
            parts = (w * row).abs()
            total += parts / parts.sum() if parts.sum() > 0 else 0
    return total / len(patches)


def unfolded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return columns.transpose(1, 2).flatten(0, 1)


def test_contributions_to_a_convolution_and_a_flattened_linear_layer() -> None:
    found = seen([IMAGES[:1], IMAGES[1:]], "contributions")["stem"].contributions
    read = what_layers_read(MODEL, IMAGES)
    assert isinstance(MODEL, Residual)
    conv = shares(MODEL.inner.weight.detach().flatten(1), unfolded(read["inner"], MODEL.inner)).reshape(4, 9).sum(1)
    linear = shares(MODEL.head.weight.detach(), read["head"]).reshape(4, 16).sum(1)
    torch.testing.assert_close(found, torch.stack([conv, linear]), rtol=1e-5, atol=1e-7)


def test_contributions_to_a_transposed_convolution() -> None:
    """Kernel and stride agree, so every output adds up one place: 4 * 2 * 2 outputs read each of them."""
    found = seen(IMAGES, "contributions")["inner"].contributions
    x = what_layers_read(MODEL, IMAGES)["outer"].permute(0, 2, 3, 1).flatten(0, 2)
    assert isinstance(MODEL, Residual)
    weight = MODEL.outer.weight.detach().flatten(1).T
    torch.testing.assert_close(found[0], shares(weight, x) / 4, rtol=1e-5, atol=1e-7)


def test_the_groups_of_a_grouped_convolution_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(3, 2, 4, 4)
    graph = inspect(model.eval(), x)
    groups = [g for g in graph.reducible if g.is_channel and "0" in g.producers]
    assert [g.size for g in groups] == [3, 3]
    found = observe(model, graph, groups, x, ["contributions", "feature_maps"])
    with torch.no_grad():
        read = model[1](model[0](x))
    for index, group in enumerate(groups):
        own = slice(3 * index, 3 * index + 3)
        assert torch.equal(found[group.name].feature_maps, read[:, own].flatten(2))  # type: ignore[arg-type]
        columns = F.unfold(read[:, own], 3).transpose(1, 2).flatten(0, 1)
        expected = shares(model[2].weight[2 * index : 2 * index + 2].detach().flatten(1), columns)
        torch.testing.assert_close(
            found[group.name].contributions[0],  # type: ignore[index]
            expected.reshape(3, 9).sum(1),
            rtol=1e-5,
            atol=1e-7,
        )


def test_nothing_read_contributes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    graph = inspect(model, torch.randn(2, 3))
    nn.init.constant_(model[0].bias, -1e6)
    found = observe(model, graph, graph.reducible, torch.rand(5, 3), ["contributions"])["0"].contributions
    assert found.tolist() == [[0.0] * 4]  # type: ignore[union-attr]


def test_where_no_layer_reads_them_channels_are_watched_as_they_are_given() -> None:
    class Ratio(nn.Module):
        """Queries and keys: given by a layer, read by none."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) @ self.key(x).transpose(-1, -2)

    model, x = Ratio().eval(), torch.randn(2, 5, 3)
    graph = inspect(model, x)
    (group,) = [g for g in graph.reducible if g.is_channel]
    found = observe(model, graph, [group], x, ["feature_maps", "contributions"])[group.name]
    with torch.no_grad():
        torch.testing.assert_close(found.feature_maps, model.query(x).transpose(1, 2))
    assert found.contributions is None


def test_inputs_without_a_batch_dimension_are_one_image() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    graph = inspect(model, IMAGES[0])
    found = observe(model, graph, graph.reducible, [IMAGES[0]], ["feature_maps"])["0"].feature_maps
    assert found is not None
    assert found.shape == (1, 4, 64)


def test_tensors_are_the_networks_own() -> None:
    found = seen(None, "tensors")["stem"]
    assert torch.equal(found.tensors["norm.weight"], MODEL.get_parameter("norm.weight"))
    assert not found.tensors["norm.weight"].requires_grad
    assert found.images == 0
    assert (found.gradients, found.activations, found.feature_maps, found.contributions) == (None, None, None, None)


# ---- the network is left alone --------------------------------------------------------------------------------------


class Random(nn.Module):
    """Draws, counts and drops: everything an observation could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.last = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.first(x)).relu()
        return self.last(self.drop(x) + 0.1 * torch.rand(len(x), 1))


def test_the_network_is_left_as_it_was() -> None:
    model = Random()
    x, labels = torch.randn(9, 3), torch.arange(9) % 2
    graph = inspect(model, x)
    model.train()
    model.norm.eval()
    model.first.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    first, second = (observe(model, graph, graph.reducible, [(x, labels)] * 2, ALL, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))
    assert [p.grad is None for p in model.parameters()] == [True, True, True, True, False, True]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for name in first:  # the same seed, the same bytes, although the network draws
        for field in ("gradients", "feature_maps", "contributions"):
            torch.testing.assert_close(getattr(first[name], field), getattr(second[name], field), rtol=0, atol=0)
        assert torch.equal(first[name].activations.mean_square, second[name].activations.mean_square)  # type: ignore[union-attr]


def test_it_is_left_alone_when_it_fails() -> None:
    model = network()
    model.requires_grad_(False)
    with pytest.raises(ModelError, match=r"does not run on batch 1 of images \(float32\[1, 9\]\)"):
        observe(model, GRAPH, GRAPH.reducible, [IMAGES, torch.zeros(1, 9)], ALL)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    found = observe(model, inspect(model, IMAGES.to(dtype)), GRAPH.reducible, [(IMAGES, LABELS)], ALL)["stem"]
    exact = seen([(IMAGES, LABELS)], *ALL)["stem"]
    assert found.gradients is not None
    assert found.gradients["stem.weight"].dtype == dtype
    for field in ("contributions", "feature_maps"):
        a, b = getattr(found, field), getattr(exact, field)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_batches_are_read_one_at_a_time_and_what_is_kept_does_not_grow() -> None:
    alive: list[int] = []

    def loader() -> Any:
        for index in range(40):
            alive.append(index)
            yield IMAGES

    found = seen(loader(), *ALL)["stem"]
    assert alive == list(range(40))
    assert found.images == 240
    assert len(found.feature_maps) == MAPS


# ---- every network of the gallery ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_group_of_the_gallery_is_scored_or_refused_by_name(case: Case) -> None:
    """Weights and gradients are there for every group; what could not be watched is said."""
    model, inputs = case.build()
    call = Inputs.of(inputs)
    graph = trace(model, call)
    groups = [g for g in graph.reducible if g.is_channel]
    weights = fold_weights(model, graph, groups)
    found = observe(model, graph, groups, [call], ALL) if groups else {}
    for group in groups:
        for criterion in IMPORTANCES.values():
            scores, refusal = scored(criterion, group, weights, found[group.name])
            if scores is None:
                assert f"group {group.name!r}: no " in refusal
                assert type(criterion) in (BNScale, CHIP, RelativeContribution)
            else:
                assert scores.shape == (group.size,)
                assert bool(torch.isfinite(scores).all()), criterion


def scored(criterion: Any, *question: Any) -> tuple[Tensor | None, str]:
    try:
        return criterion(*question), ""
    except IntrafusionError as error:
        return None, str(error)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_nothing_needed_is_nothing_done() -> None:
    assert observe(MODEL, GRAPH, GRAPH.reducible, None, ()) == {}
    assert observe_for(Magnitude(folded=True), MODEL, GRAPH, GRAPH.reducible, None) == {}
    assert observe_for(lambda group, weights, observations: None, MODEL, GRAPH, GRAPH.reducible, IMAGES) == {}


def test_a_criterion_gets_what_it_asks_for() -> None:
    found = observe_for(CHIP(), MODEL, GRAPH, [INNER], IMAGES)
    assert found.keys() == {"inner"}
    assert isinstance(found["inner"], Observation)
    assert found["inner"].feature_maps is not None
    assert found["inner"].contributions is None


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown observation 'gradient'. Did you mean 'gradients'"):
        seen(IMAGES, "gradient")
    with pytest.raises(ObservationError, match=r"importance Taylor\(.*looks at gradients on images.*pass images="):
        observe_for(Taylor(), MODEL, GRAPH, GRAPH.reducible, None)
    with pytest.raises(ObservationError, match="feature_maps on images, and was given none; pass images="):
        seen(None, "feature_maps", "tensors")
    with pytest.raises(ModelError, match="expected at least one batch"):
        seen([], "activations")
    with pytest.raises(ModelError, match=r"expected a finite loss on \(float32\[6, 2, 8, 8\]\), got nan"):
        seen(IMAGES * float("nan"), "gradients")
    with pytest.raises(ModelError, match="^outer: reads or gives NaN or infinity on these images; check their scale"):
        observe(MODEL, GRAPH, [INNER], IMAGES * float("inf"), ["activations"])
    with pytest.raises(ModelError, match="expected class scores"):
        seen([(IMAGES, LABELS[:4])], "gradients")

    class Closed(Residual):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(ModelError, match="does not depend on its parameters"):
        observe(Closed().eval(), GRAPH, GRAPH.reducible, IMAGES, ["gradients"])
