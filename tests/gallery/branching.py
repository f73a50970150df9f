"""Branches that join: sums, concatenations, gates, several heads, and layers that are used more than once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case, chain, conv_bn, image, parameter, pooled

Built = tuple[nn.Module, Inputs]


@case({"stem b": 8, "a": 6, "c": 10, "d skip": 12}, blocked={"head": "output"})
def residual_identity_and_projection() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = F.relu(net.b(F.relu(net.a(x))) + x)
        y = net.d(F.relu(net.c(x)))
        y += net.skip(x)
        return net.head(pooled(F.relu(y)))

    first = {"stem": conv_bn(3, 8), "a": conv_bn(8, 6), "b": conv_bn(6, 8)}
    second = {"c": conv_bn(8, 10, stride=2), "d": conv_bn(10, 12), "skip": conv_bn(8, 12, 1, 2)}
    return Wired(wiring, **first, **second, head=nn.Linear(12, 4)), image()


@case({"stem b1 b2": 4, "b2": 4, "a1": 6, "a2": 7}, blocked={"head": "output"})
def residual_zero_padded() -> Built:
    """The shortcut of the CIFAR ResNets: every second pixel, and two zero channels on either side.

    The four channels of the first stage are channels 2..5 of the second; 0, 1, 6 and 7 belong to `b2` alone.
    """

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = F.relu(net.b1(F.relu(net.a1(x))) + x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return net.head(pooled(F.relu(net.b2(F.relu(net.a2(x))) + shortcut)))

    first = {"stem": conv_bn(3, 4), "a1": conv_bn(4, 6), "b1": conv_bn(6, 4)}
    second = {"a2": conv_bn(4, 7, stride=2), "b2": conv_bn(7, 8)}
    return Wired(wiring, **first, **second, head=nn.Linear(8, 4)), image()


@case({"a": 5}, blocked={"b": "input", "head": "output"})
def residual_from_the_input() -> Built:
    """x + b(a(x)): the output channels of `b` are added to the three input channels."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(x + net.b(F.relu(net.a(x)))))

    convs = {"a": nn.Conv2d(3, 5, 3, padding=1), "b": nn.Conv2d(5, 3, 3, padding=1)}
    return Wired(wiring, **convs, head=nn.Conv2d(3, 2, 1)), image()


@case({"stem b": 6, "a": 5}, blocked={"head": "output"})
def residual_layer_scale() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.gamma * net.b(F.gelu(net.a(x)))
        return net.head(F.gelu(x))

    layers = {"stem": nn.Linear(4, 6), "a": nn.Linear(6, 5), "b": nn.Linear(5, 6)}
    return Wired(wiring, **layers, gamma=parameter(6), head=nn.Linear(6, 2)), torch.randn(2, 7, 4)


@case({"stem b": 6, "a": 5}, blocked={"head": "output"})
def residual_scaled_by_one_number() -> Built:
    """ReZero: one learned number scales the whole branch, and dropout is switched off."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(F.gelu(x + net.alpha * net.drop(net.b(F.gelu(net.a(x))))))

    layers = {"stem": nn.Linear(4, 6), "a": nn.Linear(6, 5), "b": nn.Linear(5, 6)}
    return Wired(wiring, **layers, drop=nn.Dropout(0.5), alpha=parameter(1), head=nn.Linear(6, 2)), torch.randn(3, 4)


@case({"stem": 8, "a": 4, "b": 4}, blocked={"head": "output"})
def densenet() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = torch.cat([x, net.a(F.relu(net.bn1(x)))], 1)
        x = torch.cat([x, net.b(F.relu(net.bn2(x)))], 1)
        return net.head(F.relu(pooled(x)))

    convs = {"a": nn.Conv2d(8, 4, 3, padding=1), "b": nn.Conv2d(12, 4, 3, padding=1)}
    norms = {"bn1": nn.BatchNorm2d(8), "bn2": nn.BatchNorm2d(12)}
    return Wired(wiring, stem=conv_bn(3, 8), **convs, **norms, head=nn.Linear(16, 5)), image()


@case({"a": 4, "b": 6, "c": 5, "join": 7}, blocked={"head": "output"})
def inception() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        branches = [net.a(x), net.b(x), F.max_pool2d(net.c(x), 3, 1, 1)]
        return net.head(F.relu(net.join(F.relu(torch.cat(branches, 1)))))

    convs = {"a": conv_bn(3, 4, 1), "b": conv_bn(3, 6), "c": nn.Conv2d(3, 5, 1), "join": nn.Conv2d(15, 7, 3)}
    return Wired(wiring, **convs, head=nn.Conv2d(7, 2, 1)), image()


@case({"a": 3, "b": 4, "c": 5}, blocked={"head": "output"})
def concat_of_concat() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        inner = F.relu(torch.cat([net.b(x), net.a(x)], 1))
        return net.head(torch.cat([inner, F.relu(net.c(x))], 1))

    return Wired(wiring, a=nn.Linear(6, 3), b=nn.Linear(6, 4), c=nn.Linear(6, 5), head=nn.Linear(12, 2)), torch.randn(
        3, 6
    )


@case({"a": 6}, blocked={"head": "output"})
def concat_of_the_same_twice() -> Built:
    """Each channel is read at two places."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        return net.head(torch.cat([a, a], 1))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(12, 2)), torch.randn(3, 4)


@case({"a": 6}, blocked={"head": "output"})
def concat_with_the_input() -> Built:
    """The columns of the input come first and stay."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.cat([x, F.relu(net.a(x))], 1))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(10, 2)), torch.randn(3, 4)


@case({"a": 6}, blocked={"head": "output"})
def concat_of_coordinates() -> Built:
    """CoordConv: two constant channels that vary over space are appended."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        line = torch.linspace(-1, 1, a.shape[-1], dtype=a.dtype)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(a), -1, -1, -1)
        return net.head(torch.cat([a, grid], 1))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(8, 2, 3)), image(size=8)


@case({"a": 6}, blocked={"head": "output"})
def concat_of_both_signs() -> Built:
    """CReLU: a channel and its negative."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(F.relu(torch.cat([a, -a], 1)))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(12, 2, 1)), image()


@case({"a": 6, "a b": 6, "c": 6}, blocked={"head": "output"})
def c2f() -> Built:
    """Split in two, let one half grow branch by branch, join everything in reverse order."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        y = list(net.a(x).chunk(2, 1))
        y.append(F.silu(net.b(y[-1])) + y[-1])
        y.append(net.c(y[-1]))
        return net.head(F.relu(torch.cat(y[::-1], 1)))

    return Wired(wiring, a=conv_bn(3, 12), b=conv_bn(6, 6), c=conv_bn(6, 6), head=nn.Conv2d(24, 4, 1)), image()


@case({"trunk": 6, "left": 5}, blocked={"right": "output", "out": "output"})
def two_heads() -> Built:
    def wiring(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        trunk = F.relu(net.trunk(x))
        return net.out(F.relu(net.left(trunk))), net.right(trunk)

    heads = {"left": nn.Linear(6, 5), "out": nn.Linear(5, 2), "right": nn.Linear(6, 3)}
    return Wired(wiring, trunk=nn.Linear(4, 6), **heads), torch.randn(3, 4)


@case({"a": 5}, blocked={"b": "output", "head": "output"})
def output_is_a_hidden_activation() -> Built:
    """Features returned beside the logits may not be permuted."""

    def wiring(net: Any, x: Tensor) -> dict[str, Any]:
        features = F.relu(net.b(F.relu(net.a(x))))
        return {"logits": net.head(features), "features": [features.flatten(1)]}

    layers = {"a": nn.Conv2d(3, 5, 3), "b": nn.Conv2d(5, 6, 3)}
    return Wired(wiring, **layers, head=nn.Conv2d(6, 2, 1)), image(size=8)


@case(blocked={"a": "output", "head": "output"})
def output_is_a_pooled_activation() -> Built:
    """The output is only the mean of the hidden channels over space, but it still has one entry per channel."""

    def wiring(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(net.a(x))
        return net.head(a), pooled(a)

    return Wired(wiring, a=nn.Conv2d(3, 5, 3), head=nn.Conv2d(5, 2, 1)), image(size=8)


@case({"e h": 8}, blocked={"head": "output"})
def layer_used_twice() -> Built:
    """The same square layer twice in a row: its inputs and its outputs become the same channels."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.h(F.relu(net.h(F.relu(net.e(x)))))))

    return Wired(wiring, e=nn.Linear(5, 8), h=nn.Linear(8, 8), head=nn.Linear(8, 3)), torch.randn(3, 5)


@case({"a b": 6, "c": 5}, blocked={"head": "output"})
def layer_used_on_two_branches() -> Built:
    """One layer reads two branches: their channels pair up; its own outputs are concatenated."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.cat([F.relu(net.c(F.relu(net.a(x)))), torch.tanh(net.c(torch.tanh(net.b(x))))], 1))

    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "c": nn.Linear(6, 5)}
    return Wired(wiring, **layers, head=nn.Linear(10, 3)), torch.randn(3, 4)


@case({"a": 4, "c": 4}, blocked={"head": "output"})
def layer_used_on_two_halves() -> Built:
    """Both halves of `a` pass through the same layer: channel i pairs up with channel i + 4."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v = F.relu(net.a(x)).chunk(2, 1)
        return net.head(F.relu(torch.cat([net.c(u), net.c(v)], 1)))

    return Wired(wiring, a=nn.Linear(3, 8), c=nn.Linear(4, 4), head=nn.Linear(8, 3)), torch.randn(3, 3)


@case({"stem conv": 6}, blocked={"head": "output"})
def conv_used_at_two_resolutions() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = F.relu(net.conv(x))
        return net.head(F.relu(net.conv(F.max_pool2d(x, 2))))

    return Wired(wiring, stem=nn.Conv2d(3, 6, 3), conv=conv_bn(6, 6), head=nn.Conv2d(6, 2, 1)), image()


@case({"a b": 6}, blocked={"head": "output"})
def norm_used_twice() -> Built:
    """Two layers that share nothing but their batch norm."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(torch.cat([net.bn(net.a(x)), net.bn(net.b(x))], 1)))

    convs = {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(3, 6, 3)}
    return Wired(wiring, **convs, bn=nn.BatchNorm2d(6), head=nn.Conv2d(12, 2, 1)), image()


@case({"a": 6}, blocked={"head": "output"})
def module_under_two_names() -> Built:
    """The same layer is an attribute twice: its parameters count once."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.cat([F.relu(net.a(x)), torch.tanh(net.again(x))], 1))

    shared = nn.Linear(4, 6)
    return Wired(wiring, a=shared, again=shared, head=nn.Linear(12, 2)), torch.randn(3, 4)


@case({"stem b": 6}, blocked={"head": "output"})
def tied_square_layers() -> Built:
    """Two layers whose weight is one parameter: inputs and outputs of both become the same channels."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.c(F.relu(net.b(F.relu(net.stem(x)))))))

    layers = {"stem": nn.Linear(4, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6, bias=False)}
    layers["c"].weight = layers["b"].weight
    return Wired(wiring, **layers, head=nn.Linear(6, 2)), torch.randn(3, 4)


@case({"a b": 8}, blocked={"head": "output"})
def stack_and_sum() -> Built:
    """Branches stacked on a new axis and summed over it: a_i and b_i are one channel, as where they are added."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(torch.stack([net.a(x), net.b(x)]).sum(0)))

    return Wired(wiring, a=nn.Linear(4, 8), b=nn.Linear(4, 8), head=nn.Linear(8, 2)), torch.randn(3, 4)


@case({"a b excite": 6, "squeeze": 3}, blocked={"head": "output"})
def selective_kernel() -> Built:
    """SKNet: branches stacked, weighted by a softmax over the branches, summed.

    A channel of either branch goes with the two rows of `excite` that weigh it.
    """

    def wiring(net: Any, x: Tensor) -> Tensor:
        both = torch.stack([F.relu(net.a(x)), F.relu(net.b(x))], 1)
        weights = net.excite(F.relu(net.squeeze(both.sum(1).mean((2, 3))))).view(-1, 2, 6).softmax(1)
        return net.head((both * weights[..., None, None]).sum(1))

    convs = {"a": nn.Conv2d(3, 6, 3, padding=1), "b": nn.Conv2d(3, 6, 5, padding=2)}
    linears = {"squeeze": nn.Linear(6, 3), "excite": nn.Linear(3, 12)}
    return Wired(wiring, **convs, **linears, head=nn.Conv2d(6, 2, 1)), image(size=8)


@case({"stem up": 8, "down": 4}, blocked={"head": "output"})
def squeeze_excite_with_views() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        n, c, _, _ = x.shape
        gate = net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1).view(n, c)))).sigmoid().view(n, c, 1, 1)
        return net.head(x * gate.expand_as(x))

    linears = {"down": nn.Linear(8, 4), "up": nn.Linear(4, 8)}
    return Wired(wiring, stem=nn.Conv2d(3, 8, 3), **linears, head=nn.Conv2d(8, 2, 1)), image()


@case({"a": 8, "spatial": 3}, blocked={"head": "output"})
def spatial_attention() -> Built:
    """CBAM: mean and maximum over the channels, one attention map for all of them."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        summary = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return net.head(x * net.gate(F.relu(net.spatial(summary))).sigmoid())

    parts = {"a": nn.Conv2d(3, 8, 3), "spatial": nn.Conv2d(2, 3, 3, padding=1), "gate": nn.Conv2d(3, 1, 1)}
    return Wired(wiring, **parts, head=nn.Conv2d(8, 2, 1)), image()


@case({"a film": 6, "z": 5}, blocked={"head": "output"})
def film() -> Built:
    """Feature-wise modulation: one layer makes scale and shift of every channel from a second input."""

    def wiring(net: Any, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = net.film(F.relu(net.z(condition))).chunk(2, -1)
        return net.head(F.relu(net.a(x) * (1 + scale[..., None, None]) + shift[..., None, None]))

    parts = {"a": nn.Conv2d(3, 6, 3), "z": nn.Linear(4, 5), "film": nn.Linear(5, 12)}
    return Wired(wiring, **parts, head=nn.Conv2d(6, 2, 1)), (image(), torch.randn(2, 4))


@case({"a": 6}, blocked={"head": "output"})
def added_parameter() -> Built:
    """A bias that is no layer's bias, and a scale per channel."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu((net.a(x) + net.shift[None, :, None, None]) * net.scale))

    conv = nn.Conv2d(3, 6, 3, bias=False)
    return Wired(wiring, a=conv, shift=parameter(6), scale=parameter(6, 1, 1), head=nn.Conv2d(6, 2, 1)), image()


@case({"a": 6}, blocked={"head": "output"})
def normalised_by_buffers() -> Built:
    """(h - mean) / std with buffers, on hidden channels and on the input."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = (x - net.mean) / net.std
        return net.head(F.relu((net.a(x) - net.hidden_mean) / net.hidden_std))

    outer = {"mean": torch.randn(3, 1, 1), "std": torch.rand(3, 1, 1) + 0.5}
    inner = {"hidden_mean": torch.randn(6, 1, 1), "hidden_std": torch.rand(6, 1, 1) + 0.5}
    return Wired(wiring, a=nn.Conv2d(3, 6, 3), **outer, **inner, head=nn.Conv2d(6, 2, 1)), image()


@case({"a": 6}, blocked={"head": "output"})
def masked_by_where() -> Built:
    """A mask over space, a condition on each channel, and clamps."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        a = torch.where(a > 0, a, 0.1 * a).clamp(max=3.0)
        inside = torch.ones(a.shape[-2:], dtype=torch.bool).tril()
        return net.head(torch.where(inside, a, torch.zeros_like(a)).masked_fill(~inside.T, 0.5))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 3)), image(size=8)


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def in_place_operations() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        a.relu_().add_(1.0).mul_(0.5)
        a += a.mean((2, 3), keepdim=True)
        b = net.b(a)
        F.silu(b, inplace=True)
        return net.head(b.clamp_(max=2.0))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 3), head=nn.Conv2d(5, 2, 1)), image()


@case({"gate up": 12, "stem down": 6}, blocked={"head": "output"})
def swiglu() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(F.gelu(x + net.down(F.silu(net.gate(x)) * net.up(x))))

    layers = {"gate": nn.Linear(6, 12, bias=False), "up": nn.Linear(6, 12, bias=False), "down": nn.Linear(12, 6)}
    return Wired(wiring, stem=nn.Linear(4, 6), **layers, head=nn.Linear(6, 2)), torch.randn(2, 3, 4)


@case({"fused": 5}, blocked={"head": "output"})
def geglu_fused() -> Built:
    """Value and gate are two halves of one layer: positions i and i + 5 are one channel."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        value, gate = net.fused(x).chunk(2, -1)
        return net.head(value * F.gelu(gate))

    return Wired(wiring, fused=nn.Linear(4, 10), head=nn.Linear(5, 2)), torch.randn(3, 4)


@case({"fused": 5}, blocked={"head": "output"})
def geglu_interleaved() -> Built:
    """Value and gate alternate: positions 2i and 2i + 1 are one channel."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        y = net.fused(x)
        return net.head(y[..., ::2] * F.gelu(y[..., 1::2]))

    return Wired(wiring, fused=nn.Linear(4, 10), head=nn.Linear(5, 2)), torch.randn(3, 4)


@case({"a b": 6, "c": 5}, blocked={"head": "output"})
def product_and_quotient() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        y = net.a(x) / (1 + net.b(x).exp())
        return net.head(F.relu(torch.addcmul(net.c(y), net.c(y), net.c(y), value=0.1)))

    return Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 5), head=nn.Linear(5, 2)), torch.randn(
        3, 4
    )


@case(
    {"experts.0.0": 5, "experts.1.0": 5, "router": 4, "experts.0.2 experts.1.2": 6},
    blocked={"gate": "several channels", "head": "output"},
)
def soft_mixture_of_experts() -> Built:
    """Every expert runs; their outputs are weighted by a router and summed. Each has hidden channels of its own."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        weights = net.gate(F.relu(net.router(x))).softmax(-1)
        outputs = torch.stack([expert(x) for expert in net.experts], -1)
        return net.head(F.relu((outputs * weights[:, None, :]).sum(-1)))

    experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(2)])
    router = {"router": nn.Linear(4, 4), "gate": nn.Linear(4, 2)}
    return Wired(wiring, experts=experts, **router, head=nn.Linear(6, 2)), torch.randn(3, 4)


@case({"w1": 5}, partial=True)
def batched_experts() -> Built:
    """All experts in one 3-d parameter, multiplied by `bmm`: a channel of the axis runs through all of them."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.bmm(x.expand(3, -1, -1), net.w1.w))
        return torch.bmm(hidden, net.w2.w).mean(0)

    parts = {"w1": nn.ParameterDict({"w": parameter(3, 4, 5)}), "w2": nn.ParameterDict({"w": parameter(3, 5, 2)})}
    return Wired(wiring, **parts), torch.randn(6, 4)


@case({"a": 7}, blocked={"head": "output"})
def custom_autograd_function() -> Built:
    """A hand-written backward pass changes nothing for the forward pass."""

    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x.sigmoid()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (x,) = ctx.saved_tensors
            return grads[0] * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))

    return chain(a=nn.Linear(3, 7), swish=Wired(lambda net, x: Swish.apply(x)), head=nn.Linear(7, 2)), torch.randn(4, 3)


@case({"a": 6}, blocked={"head": "output"})
def checkpointed() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.utils.checkpoint.checkpoint(lambda y: F.relu(net.a(y)), x, use_reentrant=False))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a b": 6}, blocked={"head": "output"})
def stacked_branches_summed() -> Built:
    """Two branches, stacked and averaged: the same as their sum."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        both = torch.stack([net.a(x), net.b(x)], 1).tanh()
        return net.head(both.sum(1) * both.mean(1))

    return Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(3, 4)
