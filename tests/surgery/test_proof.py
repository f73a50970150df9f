"""The proof of function: dead channels go without a trace, whatever the forward derives from the width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from gallery.core import Wired
from torch import Tensor, nn

from intrafusion import apply, compress, compress_in_steps, inspect
from intrafusion.compressed import Compressed
from intrafusion.io.folder import load_plan, save_plan
from intrafusion.trace import trace

EXACT = 1e-9
Wiring = Callable[[Any, Tensor], Tensor]


def dead_(layer: nn.Module, alive: int) -> None:
    """Nothing comes out of the channels from `alive` on."""
    for tensor in layer.parameters():
        tensor.data[alive:] = 0


def attention(weigh: Callable[[Any, Tensor, Tensor, Tensor], Tensor], **parts: Any) -> nn.Module:
    """One head, with half of the 16 channels of q and k dead, and half of those of v."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 16) for name in "qkv"}
    net = Wired(lambda n, x: n.o(weigh(n, n.q(x), n.k(x), n.v(x))), **layers, o=nn.Linear(16, 3), **parts)
    for layer in layers.values():
        dead_(layer, 8)
    return net.double().eval()


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).double()


def halved(net: nn.Module, x: Tensor, **options: Any) -> Compressed:
    return compress(net, x, 0.5, **{"reducer": "select", "restore": None, **options})


def off(small: Compressed, net: nn.Module, x: Tensor) -> float:
    return oracle.relative_difference(oracle.outputs_of(small.model, x), oracle.outputs_of(net, x))


def by_hand(scores: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    return lambda n, q, k, v: scores(n, q, k).softmax(-1) @ v


def turned(k: Tensor) -> Tensor:
    return k.transpose(-2, -1)


FROM_THE_WIDTH = {
    "sdpa": lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "divided": by_hand(lambda n, q, k: q @ turned(k) / q.shape[-1] ** 0.5),
    "math_sqrt": by_hand(lambda n, q, k: q @ turned(k) / math.sqrt(q.size(-1))),
    "query_scaled": by_hand(lambda n, q, k: (q * q.size(-1) ** -0.5) @ turned(k)),
    "both_scaled": by_hand(lambda n, q, k: (q * q.size(-1) ** -0.25) @ turned(k * k.size(-1) ** -0.25)),
    "tensor_sqrt": by_hand(lambda n, q, k: q @ turned(k) / torch.tensor(k.shape[-1]).double().sqrt()),
    "baddbmm": by_hand(
        lambda n, q, k: torch.baddbmm(q.new_zeros(2, 5, 5), q, turned(k), beta=0, alpha=k.shape[-1] ** -0.5)
    ),
    "repaired_attribute": by_hand(lambda n, q, k: q @ turned(k) / n.q.out_features**0.5),
}
NOT_FROM_THE_WIDTH = {
    "sdpa_with_a_scale": lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25),
    "attribute": by_hand(lambda n, q, k: q @ turned(k) * n.scale),
    "none": by_hand(lambda n, q, k: q @ turned(k)),
    "of_unit_length": by_hand(lambda n, q, k: F.normalize(q, dim=-1) @ turned(F.normalize(k, dim=-1))),
}


@pytest.mark.parametrize("name", FROM_THE_WIDTH)
def test_a_scale_of_attention_from_the_width_is_undone(name: str) -> None:
    net, x = attention(FROM_THE_WIDTH[name]), tokens()
    small = halved(net, x)
    assert small.plan.sizes == {"q": 8, "v": 8}
    assert off(small, net, x) <= EXACT
    scale = small.plan.maps["q"].scale
    assert scale is not None
    assert scale.tolist() == pytest.approx([1.0, 0.5**0.5]), "sqrt(8 / 16) on the keys"
    assert small.plan.maps["v"].scale is None


@pytest.mark.parametrize("name", NOT_FROM_THE_WIDTH)
def test_a_scale_that_stays_is_left_as_it_is(name: str) -> None:
    net, x = attention(NOT_FROM_THE_WIDTH[name]), tokens()
    net.scale = 0.25
    small = halved(net, x)
    assert small.plan.sizes == {"q": 8, "v": 8}
    assert off(small, net, x) <= EXACT
    assert small.plan.maps["q"].scale is None


def test_several_layers_of_a_kind_are_all_undone_and_others_reduced() -> None:
    torch.manual_seed(0)
    layers = [attention(FROM_THE_WIDTH["sdpa"]) for _ in range(3)]
    for layer in layers:
        layer.o = nn.Linear(16, 8).double()
    net = nn.Sequential(*layers, nn.Linear(8, 6).double(), nn.ReLU(), nn.Linear(6, 2).double()).eval()
    dead_(net[3], 3)
    x = tokens()
    small = halved(net, x, exclude=["*.o"])
    assert small.plan.sizes == {f"{i}.{name}": 8 for i in range(3) for name in "qv"} | {"3": 3}
    assert off(small, net, x) <= EXACT


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 0, 1), (0, 1, 0)])
def test_layers_that_look_alike_are_told_apart(order: tuple[int, ...]) -> None:
    """Some scale by the width, others by a number; their groups have the same names and sizes."""
    weigh = (FROM_THE_WIDTH["sdpa"], NOT_FROM_THE_WIDTH["sdpa_with_a_scale"])
    layers = [attention(weigh[which]) for which in order]
    for layer in layers:
        layer.o = nn.Linear(16, 8).double()
        layer.o.weight.data *= 6  # else its tokens are nearly alike, and the next one's scale hardly counts
    net = nn.Sequential(*layers, nn.Linear(8, 2).double()).eval()
    small = halved(net, tokens(), exclude=["*.o"])
    assert small.plan.sizes == {f"{i}.{name}": 8 for i in range(len(order)) for name in "qv"}
    assert off(small, net, tokens()) <= EXACT
    assert [small.plan.maps[f"{i}.q"].scale is None for i in range(len(order))] == [bool(which) for which in order]


def test_heads_by_hand_with_a_scale_from_the_shape() -> None:
    """Two heads; whatever is reduced, dead channels leave no trace."""

    def weigh(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        found = (q @ turned(k) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return found.transpose(1, 2).flatten(2)

    net, x = attention(weigh), tokens()
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), net, nn.Linear(3, 3)).double()
    for name in "qkv":
        layer = net[2].get_submodule(name)
        layer.weight.data[[4, 5, 6, 7, 12, 13, 14, 15]] = 0
        layer.bias.data[[4, 5, 6, 7, 12, 13, 14, 15]] = 0
    dead_(net[0], 4)
    small = halved(net, x, exclude=["2.o"])
    assert small.plan.sizes["0"] == 4
    assert off(small, net, x) <= EXACT


@pytest.mark.parametrize("restore", ["images", "noise"])
def test_what_was_undone_stays_so_when_the_layers_are_solved(restore: str) -> None:
    net, x = attention(FROM_THE_WIDTH["sdpa"]).float(), tokens().float()
    images = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(2))
    small = halved(net, x, restore=restore, images=images if restore == "images" else None)
    assert oracle.relative_difference([small.model(x).detach()], [net(x).detach()]) <= 1e-3


def test_a_plan_with_scales_is_carried_out_again(tmp_path: Path) -> None:
    net, x = attention(FROM_THE_WIDTH["divided"]), tokens()
    plan = halved(net, x).plan
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert loaded == plan
    again = apply(net, loaded, x)
    assert again.plan == plan
    assert off(again, net, x) <= EXACT


def test_channels_that_attend_to_themselves_are_undone_on_both_sides() -> None:
    torch.manual_seed(0)
    net = Wired(
        lambda n, x: n.o(F.scaled_dot_product_attention(a := n.a(x).relu(), a, a)),
        a=nn.Linear(8, 16), o=nn.Linear(16, 3),
    ).double()  # fmt: skip
    dead_(net.a, 8)
    small = halved(net, tokens())
    scale = small.plan.maps["a"].scale
    assert scale is not None
    assert scale.tolist() == pytest.approx([0.5**0.25, 2**0.25])
    assert off(small, net, tokens()) <= EXACT


def test_steps_undo_what_each_of_them_changes() -> None:
    net, x = attention(FROM_THE_WIDTH["divided"]), tokens()
    small = compress_in_steps(net, x, 0.5, 2, reducer="select", restore=None)
    assert small.plan.sizes == {"q": 8, "v": 8}
    assert off(small, net, x) <= EXACT
    scale = small.plan.maps["q"].scale
    assert scale is not None
    assert scale.tolist() == pytest.approx([1.0, 0.5**0.5])


# ---- between layers -------------------------------------------------------------------------------------------------


def between(operation: Callable[[Tensor], Tensor], read: int = 16) -> nn.Module:
    """A linear layer with 16 channels of which 8 are dead, an operation, and a linear layer that reads it."""
    torch.manual_seed(0)
    net = Wired(lambda n, x: n.head(operation(n.a(x))), a=nn.Linear(8, 16), head=nn.Linear(read, 3))
    dead_(net.a, 8)
    return net.double().eval()


@pytest.mark.parametrize(
    "operation",
    [
        lambda a: a.relu() * a.size(1) ** -0.5,
        lambda a: a.sin() / a.shape[1],
        lambda a: a.relu() / a.shape[1] / 2,
        lambda a: (a.relu() / a.shape[1]).tanh(),
        lambda a: (a * a.shape[-1] ** 0.5).sigmoid() - 0.5,
        lambda a: torch.cat([a, a], 1) / a.shape[1],
        lambda a: a.relu() / torch.tensor(a.shape[1]).float().sqrt(),  # rounded to single precision
    ],
)
def test_a_factor_between_two_layers_is_undone(operation: Callable[[Tensor], Tensor]) -> None:
    net, x = between(operation, operation(torch.zeros(1, 16)).shape[1]), torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {"a": 8}
    assert off(small, net, x) <= EXACT


def test_a_mean_that_is_linear_in_what_is_averaged_is_undone_at_the_producer() -> None:
    net, x = between(lambda a: a.mean(1, keepdim=True), 1), torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {"a": 8}
    assert off(small, net, x) <= EXACT


@pytest.mark.parametrize(
    ("operation", "read", "words"),
    [
        (lambda a: (a.sin() / a.shape[1]).tanh(), 16, "0.0625|16 in div"),
        (lambda a: a + a.shape[1], 16, "16 in add in the network becomes 8"),
        (lambda a: a.sin().mean(1, keepdim=True), 1, "0.0625 in mean in the network becomes 0.125"),
        (lambda a: a.sin().sum(1, keepdim=True) / a.shape[1], 1, "16 in div in the network becomes 8"),
    ],
)
def test_what_no_scale_undoes_is_left_alone_in_words(
    operation: Callable[[Tensor], Tensor], read: int, words: str
) -> None:
    net, x = between(operation, read), torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {}
    why = small.rolled_back["a"]
    assert why.startswith("the forward derives a factor from the width: ")
    assert any(w in why for w in words.split("|"))
    assert off(small, net, x) == 0.0


def test_a_sum_over_channels_is_reduced_as_it_is() -> None:
    net, x = between(lambda a: torch.cat([a.sin(), a.sum(1, keepdim=True)], 1), 17), torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {"a": 8}
    assert off(small, net, x) <= EXACT


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: b * a.mean(1, keepdim=True),
        lambda a, b: b * a.sum(1, keepdim=True) / a.shape[1],
        lambda a, b: F.pad(a.relu(), (0, b.shape[1] - a.shape[1])) + b,
    ],
)
def test_a_group_of_which_one_channel_is_left_is_compared_like_others(
    operation: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """One channel has no name in a trace; the reason was that another group is no longer seen, or a factor unknown."""
    torch.manual_seed(0)
    net = Wired(
        lambda n, x: n.head(operation(n.a(x), n.b(x))), a=nn.Linear(8, 3), b=nn.Linear(8, 8), head=nn.Linear(8, 3)
    )
    dead_(net.a, 1)
    dead_(net.b, 1)
    net, x = net.double().eval(), torch.randn(6, 8).double()
    small = compress(net, x, 0.34, reducer="select", restore=None)
    assert not small.rolled_back
    assert 1 in small.plan.sizes.values()
    assert off(small, net, x) <= EXACT


def test_distances_to_learned_centres_lose_the_terms_of_removed_channels() -> None:
    torch.manual_seed(0)
    wiring = lambda n, x: n.o(torch.cdist(n.a(x), n.centres))  # noqa: E731
    net = Wired(wiring, a=nn.Linear(8, 16), centres=nn.Parameter(torch.randn(5, 16)), o=nn.Linear(5, 3)).double()
    net.a.weight.data[8:] /= 100
    net.centres.data[:, 8:] /= 100
    x = torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {"a": 8}
    assert small.plan.decisions[0].proof == "function"
    dead_(net.a, 8)
    net.centres.data[:, 8:] = 0
    assert off(small, net, x) <= EXACT


def test_the_others_are_reduced_where_one_is_left_alone() -> None:
    torch.manual_seed(0)
    net = Wired(
        lambda n, x: n.head((n.b(n.a(x).relu()) + n.b.weight.shape[0]).tanh()),
        a=nn.Linear(8, 16), b=nn.Linear(16, 6), head=nn.Linear(6, 3),
    ).double()  # fmt: skip
    dead_(net.a, 8)
    x = torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {"a": 8}
    assert set(small.rolled_back) == {"b"}
    assert off(small, net, x) <= EXACT


# ---- what looks at all channels together ----------------------------------------------------------------------------


def normed(operation: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Wired(lambda n, x: n.head(operation(n, n.a(x))), a=nn.Linear(8, 16), head=nn.Linear(16, 3), **parts)
    return net.double().eval()


def centred(n: Any, a: Tensor) -> Tensor:
    a = a - a.mean(-1, keepdim=True)
    return a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def with_var(n: Any, a: Tensor) -> Tensor:
    return (a - a.mean(-1, keepdim=True)) * torch.rsqrt(a.var(-1, unbiased=False, keepdim=True) + 1e-5)


def with_var_mean(n: Any, a: Tensor) -> Tensor:
    variance, mean = torch.var_mean(a, -1, correction=0, keepdim=True)
    scale = (variance + 1e-5).rsqrt()
    return a * scale + -mean * scale


@pytest.mark.parametrize("norm", [centred, with_var, with_var_mean])
def test_a_layer_norm_by_hand_is_cut_as_one_of_torch(norm: Callable[[Any, Tensor], Tensor]) -> None:
    hand, torchs = normed(norm), normed(lambda n, a: n.norm(a), norm=nn.LayerNorm(16))
    x = torch.randn(6, 8).double()
    small, expected = halved(hand, x), halved(torchs, x)
    assert small.plan.sizes == expected.plan.sizes == {"a": 8}
    assert off(small, expected.model, x) <= EXACT
    assert [d.proof for d in small.plan.decisions if d.reduced] == ["symmetry"]
    assert "1 group is proved by symmetry only" in str(small)


def test_a_root_mean_square_that_counts_its_channels_is_undone_before_and_behind_it() -> None:
    net = normed(lambda n, a: a / (a.square().sum(-1, keepdim=True) / a.shape[-1] + 1e-5).sqrt())
    dead_(net.a, 8)
    x = torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {"a": 8}
    assert off(small, net, x) <= EXACT


def test_a_layer_norm_that_counts_its_channels_is_left_alone() -> None:
    def norm(n: Any, a: Tensor) -> Tensor:
        a = a - a.sum(-1, keepdim=True) / a.shape[-1]
        return a / (a.square().sum(-1, keepdim=True) / a.shape[-1] + 1e-5).sqrt()

    small = halved(normed(norm), torch.randn(6, 8).double())
    assert small.rolled_back["a"].startswith("the forward derives a factor from the width: 16 in div")


def test_a_factor_beside_a_norm_leaves_the_group_alone() -> None:
    net = normed(lambda n, a: n.norm(a) * a.shape[-1] ** 0.5, norm=nn.LayerNorm(16))
    small = halved(net, torch.randn(6, 8).double())
    assert (
        small.rolled_back["a"] == "the forward derives a factor from the width: 4 in mul in the network becomes 2.828"
    )


def test_which_groups_zeros_count_for() -> None:
    together = lambda net, x: trace(net, x)["a"].together  # noqa: E731
    x = torch.randn(6, 8).double()
    assert together(normed(lambda n, a: n.norm(a), norm=nn.GroupNorm(1, 16)), x).startswith("norm statistics")
    assert together(normed(lambda n, a: a.softmax(-1)), x).startswith("softmax over channels")
    assert together(normed(lambda n, a: a * a.amax(-1, keepdim=True)), x) == "reduced together: amax in the network"
    assert together(normed(centred), x) == "reduced together: mean in the network"
    assert together(between(lambda a: a.sin().mean(1, keepdim=True), 1), x) is None
    assert together(normed(lambda n, a: F.normalize(a, dim=-1)), x) is None
    assert together(normed(lambda n, a: n.norm(a), norm=nn.BatchNorm1d(16)), x) is None


# ---- weights that layers do not use as they are ---------------------------------------------------------------------


def standardised(conv: nn.Conv2d, x: Tensor) -> Tensor:
    weight = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), conv.bias)


def test_a_reader_whose_other_columns_would_change_is_left_alone() -> None:
    torch.manual_seed(0)
    net = Wired(
        lambda n, x: n.head(standardised(n.b, standardised(n.a, x).relu()).relu()),
        a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 3), head=nn.Conv2d(6, 2, 1),
    ).double()  # fmt: skip
    dead_(net.b, 3)
    x = torch.randn(2, 3, 9, 9).double()
    small = halved(net, x)
    assert set(small.rolled_back) == {"a"}
    assert small.rolled_back["a"].startswith(
        "the smaller network is not the original without these channels: b.weight is used through "
    )
    assert small.plan.sizes == {"b": 3}


@pytest.mark.parametrize(("dim", "convolution"), [(None, False), (None, True), (1, True)])
def test_a_weight_norm_that_is_not_followed_leaves_its_groups_alone(dim: int | None, convolution: bool) -> None:
    torch.manual_seed(0)
    layer = partial(nn.Conv2d, kernel_size=3) if convolution else nn.Linear
    norm = partial(nn.utils.parametrizations.weight_norm, dim=dim)
    net = nn.Sequential(norm(layer(3, 8)), nn.Sigmoid(), norm(layer(8, 6)), nn.Tanh(), layer(6, 2)).double().eval()
    x = torch.randn(4, 3, 9, 9).double() if convolution else torch.randn(4, 3).double()
    small = halved(net, x)
    why = small.rolled_back["0"]
    assert "without these channels: 2.parametrizations.weight.original1 is used through norm in 2." in why
    assert off(small, net, x) == 0.0


def test_a_reader_with_spectral_norm_is_left_alone() -> None:
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), norm(nn.Linear(8, 3))).double().eval()
    small = halved(net, torch.randn(3, 6).double())
    assert small.rolled_back["0"].startswith("the smaller network is not the original without these channels")
    assert small.rolled_back["0"].endswith(
        "after training, torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') folds that in (module: 2)"
    )


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("layer", [nn.Linear, partial(nn.Conv2d, kernel_size=1)])
def test_what_a_spectral_norm_makes_is_left_alone(
    layer: Callable[..., nn.Module], norm: Callable[[nn.Module], nn.Module]
) -> None:
    """Without some of the rows the norm would be less, and all that stays would be multiplied by what that changes."""
    torch.manual_seed(0)
    net = nn.Sequential(layer(6, 9), nn.ReLU(), norm(layer(9, 8)), nn.ReLU(), layer(8, 3)).double()
    x = torch.randn(3, 6, 2, 2).double() if isinstance(net[0], nn.Conv2d) else torch.randn(3, 6).double()
    net(x)
    small = halved(net.eval(), x)
    why = small.rolled_back["2"]
    assert why.startswith("the smaller network is not the original without these channels: 2.")
    assert "is used through div in 2" in why
    assert off(small, net, x) == 0.0


@pytest.mark.parametrize("change", [F.softplus, torch.tanh, lambda w: w * (w.abs() > 0.1)])
def test_a_reader_of_changed_entries_is_proved_on_what_it_uses(change: Callable[[Tensor], Tensor]) -> None:
    """softplus of a column of zeros is no column of zeros."""
    torch.manual_seed(0)
    net = Wired(
        lambda n, x: F.linear(n.a(x).relu(), change(n.head.weight), n.head.bias),
        a=nn.Linear(8, 16), head=nn.Linear(16, 3),
    ).double()  # fmt: skip
    dead_(net.a, 8)
    x = torch.randn(6, 8).double()
    small = halved(net, x)
    assert small.plan.sizes == {"a": 8}
    assert [d.proof for d in small.plan.decisions if d.reduced] == ["function"]
    assert off(small, net, x) <= EXACT


def test_the_network_and_the_graph_stay_as_they_were() -> None:
    net, x = attention(FROM_THE_WIDTH["sdpa"]), tokens()
    graph, before = inspect(net, x), {n: t.clone() for n, t in net.state_dict().items()}
    halved(net, x)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert inspect(net, x).factors == graph.factors


class Attending(nn.Module):
    """PyTorch's attention, whose width is that of the stream: neither can be cut without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(5, 24), nn.LayerNorm(24), nn.Linear(24, 3)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.leave(x + self.mlp(x))


def test_heads_as_wide_as_the_stream_are_proved_with_frozen_norms() -> None:
    """All cut at once it runs; without the stream, which a norm sees, it does not."""
    small = compress(Attending().eval(), torch.randn(2, 4, 5), 0.5, reducer="select", restore=None)
    assert small.rolled_back == {}
    proofs = {d.group: d.proof for d in small.plan.decisions if d.reduced}
    assert proofs.pop("enter") == "symmetry"
    assert len(proofs) == 7
    assert set(proofs.values()) == {"function"}


class Waving(Attending):
    """What it does with the width no number on the maps undoes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        h = self.norm(x)
        x = x + torch.sin(x.shape[-1] * self.attention(h, h, h, need_weights=False)[0])
        return self.leave(x + self.mlp(x))


def test_groups_that_cannot_be_compared_alone_and_are_wrong_are_left_alone() -> None:
    net, x = Waving().eval(), torch.randn(2, 4, 5)
    small = compress(net, x, 0.5, reducer="select", restore=None)
    assert small.plan.sizes == {"mlp.0": 8}
    gone = torch.ones(16, dtype=torch.bool)
    gone[(net.mlp[0].weight[:, None] == small.model.mlp[0].weight).all(2).any(1)] = False
    with torch.no_grad():
        net.mlp[2].weight[:, gone] = 0
        torch.testing.assert_close(small.model(x), net(x))
