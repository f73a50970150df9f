"""Norms and activations with parameters: batch, group, instance, layer, RMS, local response; PReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case, chain, conv_bn, image, parameter, pooled

Built = tuple[nn.Module, Inputs]


@case({"conv": (4, 4, 4, 4)}, blocks={"conv": 4}, blocked={"head": "output"})
def group_norm() -> Built:
    """Channels of one norm group are interchangeable, and so are whole groups."""
    net = chain(conv=nn.Conv2d(3, 16, 3), norm=nn.GroupNorm(4, 16), silu=nn.SiLU(), head=nn.Conv2d(16, 5, 3))
    return net, image()


@case({"conv": 8}, blocked={"head": "output"})
def group_norm_of_one_group() -> Built:
    net = chain(conv=nn.Conv2d(3, 8, 3), norm=nn.GroupNorm(1, 8), silu=nn.SiLU(), head=nn.Conv2d(8, 5, 3))
    return net, image()


@case({"conv": 8}, blocked={"head": "output"})
def group_norm_of_single_channels() -> Built:
    """As many groups as channels: an instance norm."""
    net = chain(conv=nn.Conv2d(3, 8, 3), norm=nn.GroupNorm(8, 8), silu=nn.SiLU(), head=nn.Conv2d(8, 5, 3))
    return net, image()


@case({"a": (4, 4), "stem b": (4, 4)}, blocks={"a": 2, "stem b": 2}, blocked={"head": "output"})
def group_norm_in_a_residual() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.b(F.relu(net.norm2(net.a(F.relu(net.norm1(x))))))
        return net.head(F.relu(x))

    convs = {"stem": nn.Conv2d(3, 8, 3), "a": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 8, 1), "head": nn.Conv2d(8, 2, 1)}
    return Wired(wiring, **convs, norm1=nn.GroupNorm(2, 8), norm2=nn.GroupNorm(2, 8)), image()


@case({"conv": 8}, blocked={"head": "output"})
def instance_norm_and_prelu() -> Built:
    net = chain(
        conv=nn.Conv2d(3, 8, 3), norm=nn.InstanceNorm2d(8, affine=True), act=nn.PReLU(8), head=nn.Conv2d(8, 5, 3)
    )
    return net, image()


@case({"conv": 8}, blocked={"head": "output"})
def instance_norm_without_parameters() -> Built:
    net = chain(conv=nn.Conv2d(3, 8, 3), norm=nn.InstanceNorm2d(8), act=nn.PReLU(), head=nn.Conv2d(8, 5, 3))
    return net, image()


@case({"conv": 8}, blocked={"head": "output"})
def instance_norm_with_running_statistics() -> Built:
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    return chain(conv=nn.Conv2d(3, 8, 3), norm=norm, relu=nn.ReLU(), head=nn.Conv2d(8, 5, 3)), image()


@case({"conv": 8}, blocked={"head": "output"})
def batch_norm_without_parameters() -> Built:
    norm = nn.BatchNorm2d(8, affine=False)
    return chain(conv=nn.Conv2d(3, 8, 3), norm=norm, relu=nn.ReLU(), head=nn.Conv2d(8, 5, 3)), image()


@case({"conv": 8}, blocked={"head": "output"})
def batch_norm_without_running_statistics() -> Built:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    return chain(conv=nn.Conv2d(3, 8, 3), norm=norm, relu=nn.ReLU(), head=nn.Conv2d(8, 5, 3)), image()


@case({"a": 6}, blocked={"head": "output"})
def batch_norm_over_tokens() -> Built:
    """BatchNorm1d on (batch, tokens, channels) normalises tokens: its entries do not follow the channels."""
    net = chain(a=nn.Linear(3, 6), norm=nn.BatchNorm1d(4), relu=nn.ReLU(), head=nn.Linear(6, 2))
    return net, torch.randn(5, 4, 3)


@case({"a": 8, "b": 5}, blocked={"head": "output"})
def batch_norm_of_features() -> Built:
    net = chain(
        a=nn.Linear(3, 8), bn=nn.BatchNorm1d(8), relu=nn.ReLU(), b=nn.Linear(8, 5), bn2=nn.BatchNorm1d(5),
        tanh=nn.Tanh(), head=nn.Linear(5, 2),
    )  # fmt: skip
    return net, torch.randn(5, 3)


@case({"stem body": 6}, blocked={"head": "output"})
def batch_norm_before_the_conv() -> Built:
    """Pre-activation: the norm reads a stream, so it belongs to no single convolution."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.body(F.relu(net.norm(x)))
        return net.head(F.relu(x))

    convs = {"stem": nn.Conv2d(3, 6, 3), "body": nn.Conv2d(6, 6, 3, padding=1), "head": nn.Conv2d(6, 2, 1)}
    return Wired(wiring, **convs, norm=nn.BatchNorm2d(6)), image()


@case({"conv": 6}, blocked={"head": "output"})
def hand_written_batch_norm() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        y = F.batch_norm(y, net.mean, net.var, net.scale, net.shift, training=False)
        return net.head(y.relu())

    statistics = {"mean": torch.randn(6), "var": torch.rand(6) + 0.5}
    affine = {"scale": parameter(6), "shift": parameter(6)}
    return Wired(wiring, conv=nn.Conv2d(3, 6, 3), **statistics, **affine, head=nn.Conv2d(6, 2, 1)), image()


@case({"a": 6}, blocked={"head": "output"})
def layer_norm() -> Built:
    net = chain(a=nn.Linear(3, 6), norm=nn.LayerNorm(6), relu=nn.ReLU(), head=nn.Linear(6, 2))
    return net, torch.randn(5, 4, 3)


@case({"a": 6}, blocked={"head": "output"})
def layer_norm_over_the_whole_map() -> Built:
    """The norm's weight has the shape of the feature map; only its first axis follows the channels."""
    net = chain(a=nn.Conv2d(3, 6, 3), norm=nn.LayerNorm([6, 6, 6]), relu=nn.ReLU(), head=nn.Conv2d(6, 2, 1))
    return net, image(size=8)


@case({"stem pw2": 8, "pw1": 16}, blocked={"head": "output"})
def convnext_block() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.norm(net.dw(x).permute(0, 2, 3, 1))
        y = net.gamma * net.pw2(F.gelu(net.pw1(y)))
        return net.head(F.gelu(pooled(x + y.permute(0, 3, 1, 2))))

    convs = {"stem": nn.Conv2d(3, 8, 2, 2), "dw": nn.Conv2d(8, 8, 3, padding=1, groups=8)}
    linears = {"pw1": nn.Linear(8, 16), "pw2": nn.Linear(16, 8), "head": nn.Linear(8, 2)}
    return Wired(wiring, **convs, **linears, norm=nn.LayerNorm(8), gamma=parameter(8)), image()


@case({"e down": 8, "up": 10}, blocked={"head": "output"})
def rms_norm_and_glu() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.e(x)
        return net.head(F.relu(net.down(F.glu(net.up(net.norm(x)))) + x))

    linears = {"e": nn.Linear(4, 8), "up": nn.Linear(8, 20), "down": nn.Linear(10, 8), "head": nn.Linear(8, 3)}
    return Wired(wiring, **linears, norm=nn.RMSNorm(8)), torch.randn(2, 5, 4)


@case({"a": 6}, blocked={"head": "output"})
def hand_written_rms_norm() -> Built:
    """Computed in float32, as in the language models."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        wide = a.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return net.head((net.weight * wide.to(a.dtype)).tanh())

    return Wired(wiring, a=nn.Linear(3, 6), weight=parameter(6), head=nn.Linear(6, 2)), torch.randn(2, 4, 3)


@case({"a": 6}, blocked={"head": "output"})
def unit_length() -> Built:
    """Features divided by their length over the channels, and centred."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.normalize(net.a(x), dim=-1)
        return net.head((a - a.mean(-1, keepdim=True)).relu())

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": 6}, blocked={"head": "output"})
def global_response_norm() -> Built:
    """ConvNeXt V2: every channel is scaled by its share of the total norm."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x).relu()
        norm = a.norm(p=2, dim=(2, 3), keepdim=True)
        share = norm / (norm.mean(1, keepdim=True) + 1e-6)
        return net.head((a * share) * net.scale[:, None, None] + net.shift[:, None, None] + a)

    affine = {"scale": parameter(6), "shift": parameter(6)}
    return Wired(wiring, a=nn.Conv2d(3, 6, 3), **affine, head=nn.Conv2d(6, 2, 1)), image()


@case(blocked={"a": "", "head": "output"})
def local_response_norm() -> Built:
    """AlexNet: each channel is divided by the size of its neighbours, so neighbours must stay neighbours."""
    net = chain(a=nn.Conv2d(3, 8, 3), norm=nn.LocalResponseNorm(3, alpha=0.5), relu=nn.ReLU(), head=nn.Conv2d(8, 2, 1))
    return net, image()


@case({"a": 8, "b": 6}, blocked={"head": "output"})
def prelu_shared_and_per_channel() -> Built:
    net = chain(a=nn.Conv2d(3, 8, 3), one=nn.PReLU(1), b=nn.Conv2d(8, 6, 3), many=nn.PReLU(6), head=nn.Conv2d(6, 2, 1))
    return net, image()


@case({"a": 6}, blocked={"head": "output"})
def learned_activation() -> Built:
    """A slope, a threshold and an exponent per channel, by hand."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = torch.maximum(net.a(x) * net.slope, net.floor).sigmoid() ** net.power.exp()
        return net.head(torch.minimum(a, net.ceiling))

    vectors = {name: parameter(6, 1, 1) for name in ("slope", "floor", "power", "ceiling")}
    return Wired(wiring, a=nn.Conv2d(3, 6, 3), **vectors, head=nn.Conv2d(6, 2, 1)), image()


@case({"stem": 8}, blocked={"head": "output"})
def dropout_of_every_kind() -> Built:
    """Switched off in eval mode."""
    net = chain(
        stem=conv_bn(3, 8),
        alpha=nn.AlphaDropout(0.3),
        relu=nn.RReLU(),
        drop=nn.Dropout2d(0.3),
        head=nn.Conv2d(8, 2, 1),
    )
    return net, image()


@case({"a": 4}, blocked={"head": "output"})
def layer_norm_of_flattened() -> Built:
    """Norms behind a flatten: one channel covers nine entries of each."""
    net = chain(
        a=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), flat=nn.Flatten(), norm=nn.LayerNorm(36), bn=nn.BatchNorm1d(36),
        tanh=nn.Tanh(), head=nn.Linear(36, 2),
    )  # fmt: skip
    return net, image(size=5)


@case({"a b": 6}, blocked={"head": "output"})
def layer_norm_used_twice() -> Built:
    """Two streams share nothing but a norm."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.cat([net.norm(net.a(x)).relu(), net.norm(net.b(x)).sin()], -1))

    layers = {"a": nn.Linear(3, 6), "b": nn.Linear(3, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(12, 2)}
    return Wired(wiring, **layers), torch.randn(4, 3)
