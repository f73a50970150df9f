"""Chains of layers and convolutions of every kind: grouped, depthwise, transposed, in one and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case, chain, conv_bn, image, parameter, pooled

Built = tuple[nn.Module, Inputs]


@case({"a": 12, "b": 10}, blocked={"head": "output"})
def mlp() -> Built:
    net = chain(a=nn.Linear(6, 12), relu=nn.ReLU(), b=nn.Linear(12, 10), gelu=nn.GELU(), head=nn.Linear(10, 4))
    return net, torch.randn(3, 6)


@case({"0": 8, "2": 5}, blocked={"4": "output"})
def unnamed_sequential() -> Built:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(3, 6)


@case({"a": 7}, blocked={"head": "output"})
def without_biases() -> Built:
    net = chain(a=nn.Linear(6, 7, bias=False), relu=nn.ReLU(), head=nn.Linear(7, 4, bias=False))
    return net, torch.randn(3, 6)


@case({"stem": 8, "body": 6}, blocked={"head": "output"})
def conv_bn_chain() -> Built:
    net = chain(
        stem=conv_bn(3, 8),
        relu=nn.ReLU(inplace=True),
        body=conv_bn(8, 6),
        relu6=nn.ReLU6(inplace=True),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(6, 4),
    )
    return net, image()


@case({"a": 8, "b": 6}, blocked={"head": "output"})
def conv_1d() -> Built:
    net = chain(
        a=nn.Conv1d(3, 8, 5),
        bn=nn.BatchNorm1d(8),
        relu=nn.ReLU(),
        b=nn.Conv1d(8, 6, 3, dilation=2),
        pool=nn.AdaptiveMaxPool1d(1),
        flat=nn.Flatten(),
        head=nn.Linear(6, 4),
    )
    return net, torch.randn(2, 3, 20)


@case({"a": 6, "b": 6}, blocked={"head": "output"})
def causal_conv_1d() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(F.pad(x, (2, 0))))
        return net.head(F.relu(net.b(F.pad(x, (4, 0))))[:, :, -1])

    return Wired(wiring, a=nn.Conv1d(3, 6, 3), b=nn.Conv1d(6, 6, 3, dilation=2), head=nn.Linear(6, 4)), torch.randn(
        2, 3, 9
    )


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def conv_3d() -> Built:
    net = chain(
        a=nn.Conv3d(2, 6, 3, padding=1),
        bn=nn.BatchNorm3d(6),
        relu=nn.ReLU(),
        pool=nn.MaxPool3d(2),
        b=nn.ConvTranspose3d(6, 5, 2, 2),
        silu=nn.SiLU(),
        head=nn.Conv3d(5, 2, 1),
    )
    return net, torch.randn(2, 2, 6, 6, 6)


@case({"a": (4, 4, 4, 4), "g": (4, 4, 4, 4), "c skip": 10}, blocks={"a g": 4}, blocked={"head": "output"})
def resnext() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        y = net.c(F.relu(net.g(F.relu(net.a(x)))))
        return net.head(pooled(F.relu(y + net.skip(x))))

    parts = {"a": conv_bn(3, 16, 1), "g": conv_bn(16, 16, 3, groups=4), "c": conv_bn(16, 10, 1)}
    return Wired(wiring, **parts, skip=conv_bn(3, 10, 1), head=nn.Linear(10, 3)), image()


@case({"a": (4, 4), "g": (6, 6)}, blocks={"a g": 2}, blocked={"head": "output"})
def grouped_unequal() -> Built:
    """Four inputs and six outputs per group: positions of the input and of the output must not be confused."""
    net = chain(
        a=nn.Conv2d(3, 8, 1),
        relu=nn.ReLU(),
        g=nn.Conv2d(8, 12, 3, groups=2),
        silu=nn.SiLU(),
        head=nn.Conv2d(12, 3, 1),
    )
    return net, image()


@case({"a": (2, 2, 2, 2)}, blocks={"a g": 4}, blocked={"head": "output", "g": ""})
def grouped_one_output_per_group() -> Built:
    net = chain(
        a=nn.Conv2d(3, 8, 1), relu=nn.ReLU(), g=nn.Conv2d(8, 4, 3, groups=4), silu=nn.SiLU(), head=nn.Conv2d(4, 3, 1)
    )
    return net, image()


@case({"a": (4, 4), "up": (6, 6)}, blocks={"a": 2}, blocked={"head": "output"})
def grouped_transposed() -> Built:
    net = chain(
        a=nn.Conv2d(3, 8, 1),
        tanh=nn.Tanh(),
        up=nn.ConvTranspose2d(8, 12, 2, 2, groups=2),
        relu=nn.ReLU(),
        head=nn.Conv2d(12, 3, 1),
    )
    return net, image()


@case({"a": 4}, blocked={"head": "output"})
def depthwise_multiplier() -> Built:
    """Two outputs per depthwise channel: one channel covers two positions behind it."""
    net = chain(a=nn.Conv2d(3, 4, 1), dw=nn.Conv2d(4, 8, 3, groups=4), relu=nn.ReLU(), head=nn.Conv2d(8, 3, 1))
    return net, image()


@case({"a": 4}, blocked={"head": "output"})
def depthwise_multiplier_transposed() -> Built:
    net = chain(
        a=nn.Conv2d(3, 4, 1),
        dw=nn.ConvTranspose2d(4, 8, 2, 2, groups=4),
        relu=nn.ReLU(),
        head=nn.Conv2d(8, 3, 1),
    )
    return net, image()


@case({"a": 4, "pw": 6}, blocked={"head": "output"})
def depthwise_separable_multiplier_bn() -> Built:
    net = chain(
        a=conv_bn(3, 4),
        relu=nn.ReLU(),
        dw=nn.Conv2d(4, 8, 3, groups=4, bias=False),
        bn=nn.BatchNorm2d(8),
        silu=nn.SiLU(),
        pw=nn.Conv2d(8, 6, 1),
        tanh=nn.Tanh(),
        head=nn.Conv2d(6, 3, 1),
    )
    return net, image()


@case({"a": 6}, blocked={"head": "output"})
def depthwise_1d() -> Built:
    net = chain(
        a=nn.Linear(3, 6), swap=Wired(lambda net, x: x.transpose(1, 2)), dw=nn.Conv1d(6, 6, 3, groups=6),
        relu=nn.ReLU(), head=nn.Conv1d(6, 2, 1),
    )  # fmt: skip
    return net, torch.randn(2, 9, 3)


@case({"stem project": 8, "expand restore": 24, "reduce": 6}, blocked={"head": "output"})
def inverted_residual_squeeze_excite() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu6(net.stem(x))
        h = F.hardswish(net.dw(F.relu6(net.expand(x))))
        h = h * torch.sigmoid(net.restore(F.relu(net.reduce(h.mean((2, 3), keepdim=True)))))
        return net.head(pooled(net.project(h) + x))

    squeeze = {"reduce": nn.Conv2d(24, 6, 1), "restore": nn.Conv2d(6, 24, 1)}
    convs = {"stem": conv_bn(3, 8), "expand": conv_bn(8, 24, 1), "dw": conv_bn(24, 24, 3, groups=24)}
    return Wired(wiring, **convs, **squeeze, project=conv_bn(24, 8, 1), head=nn.Linear(8, 4)), image()


@case({"conv": 6, "fc": 9}, blocked={"head": "output"})
def conv_flatten_linear() -> Built:
    """Each of 6 channels covers 49 columns of the linear layer."""
    net = chain(
        conv=nn.Conv2d(3, 6, 3),
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        flat=nn.Flatten(),
        fc=nn.Linear(6 * 49, 9),
        tanh=nn.Tanh(),
        head=nn.Linear(9, 2),
    )
    return net, image(size=16)


@case({"conv": 5}, blocked={"head": "output"})
def conv_flatten_linear_odd() -> Built:
    """Odd, unequal sizes: 15 x 9 -> 8 x 5 -> 3 x 2."""
    net = chain(
        conv=nn.Conv2d(3, 5, 3, stride=2, padding=1),
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(3, 2),
        flat=nn.Flatten(),
        head=nn.Linear(5 * 3 * 2, 3),
    )
    return net, torch.randn(2, 3, 15, 9)


@case({"a": 6}, blocked={"b": "output"})
def linear_unflatten_conv() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.b(F.relu(net.a(x).view(-1, 6, 4, 4)))

    return Wired(wiring, a=nn.Linear(5, 96), b=nn.Conv2d(6, 3, 3)), torch.randn(2, 5)


@case({"a": 6, "b": 10, "up": 5, "c": 7}, blocked={"head": "output"})
def unet() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        up = net.up(F.relu(net.b(F.max_pool2d(a, 2))))
        return net.head(F.relu(net.c(torch.cat([up, a], 1))))

    convs = {"a": conv_bn(3, 6), "b": conv_bn(6, 10), "c": conv_bn(11, 7)}
    return Wired(wiring, **convs, up=nn.ConvTranspose2d(10, 5, 2, 2), head=nn.Conv2d(7, 2, 1)), image()


@case({"stem": 6}, blocked={"head": "output"})
def pixel_shuffle() -> Built:
    """Four channels become one channel at twice the resolution."""
    return chain(stem=conv_bn(3, 24), up=nn.PixelShuffle(2), act=nn.PReLU(6), head=nn.Conv2d(6, 3, 3)), image()


@case({"stem": 4, "body": 6}, blocked={"head": "output"})
def pixel_unshuffle() -> Built:
    net = chain(
        stem=conv_bn(3, 4),
        relu=nn.ReLU(),
        down=nn.PixelUnshuffle(2),
        body=nn.Conv2d(16, 6, 3),
        silu=nn.SiLU(),
        head=nn.Conv2d(6, 2, 1),
    )
    return net, image()


@case({"a": 5}, blocked={"head": "output"})
def unfold_patches() -> Built:
    """Convolution written as unfold + linear: one channel covers nine columns."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.unfold(F.relu(net.a(x)), 3, padding=1).transpose(1, 2))

    return Wired(wiring, a=nn.Conv2d(3, 5, 3), head=nn.Linear(45, 3)), image(size=8)


@case({"a": 6}, blocked={"head": "output"})
def upsampling() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        small = F.interpolate(F.avg_pool2d(a, 2), size=a.shape[-2:], mode="bilinear", align_corners=False)
        return net.head(F.interpolate(small * a, scale_factor=2, mode="nearest"))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 3)), image()


@case({"a": 6}, blocked={"head": "output"})
def blur_pool() -> Built:
    """One fixed 3 x 3 kernel, repeated over however many channels there are."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        kernel = net.kernel.expand(a.shape[1], 1, 3, 3)
        return net.head(F.conv2d(F.pad(a, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=a.shape[1]))

    kernel = torch.tensor([1.0, 2.0, 1.0])
    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 1), kernel=torch.outer(kernel, kernel)), image()


@case({"a": 8}, blocked={"head": "output"})
def padded_space() -> Built:
    """Padding of space, with a value and by reflection, is no trouble."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.pad(net.a(x), (1, 2, 0, 1), value=0.5)
        return net.head(F.pad(F.relu(x), (2, 2, 2, 2), mode="reflect"))

    return Wired(wiring, a=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 2, 3)), image()


@case({"wide": 8}, blocked={"head": "output"})
def one_channel() -> Built:
    """A channel axis of size one: nothing to choose from."""
    net = chain(
        narrow=nn.Conv2d(3, 1, 3), relu=nn.ReLU(), wide=nn.Conv2d(1, 8, 3), silu=nn.SiLU(), head=nn.Conv2d(8, 2, 1)
    )
    return net, image()


@case({"a": 6}, blocked={"head": "output"})
def batch_of_one_squeezed() -> Built:
    """`squeeze()` drops the batch axis too; the channel axis is then the first."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(F.adaptive_avg_pool2d(net.a(x), 1).squeeze()))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 2)), image(batch=1)


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def channels_last_memory() -> Built:
    """Strides in another order than sizes."""
    net = chain(a=conv_bn(3, 6), relu=nn.ReLU(inplace=True), b=nn.Conv2d(6, 5, 3), silu=nn.SiLU(),
                flat=nn.Flatten(), head=nn.Linear(5 * 100, 3))  # fmt: skip
    image_last = image().to(memory_format=torch.channels_last)
    return net.to(memory_format=torch.channels_last), image_last  # pyright: ignore[reportCallIssue]


@case({"a": 6}, blocked={"head": "output"})
def keyword_inputs() -> Built:
    """Keyword arguments, an argument that is None, a dictionary as output."""

    def wiring(net: Any, *, image: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        hidden = F.relu(net.a(image)) * scale
        return {"logits": net.head(hidden if mask is None else hidden * mask), "extra": None}

    net = Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 1))
    return net, {"image": image(), "mask": None, "scale": 0.5}


@case({"a": 6}, blocked={"head": "output"}, warns="unused")
def unused_layer() -> Built:
    """A layer that the forward pass never reaches is no group, and is mentioned."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x)))

    return Wired(wiring, a=nn.Linear(3, 6), unused=nn.Linear(6, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"": 10})
def einsum_with_parameters() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return torch.einsum("bnh,ho->bno", F.gelu(torch.einsum("bnd,dh->bnh", x, net.a)), net.b)

    return Wired(wiring, a=parameter(6, 10), b=parameter(10, 3)), torch.randn(2, 4, 6)


@case({"layers": (7, 5)}, blocked={"head": "output"})
def parameter_list() -> Built:
    """Parameters kept in a list and used with `@`, transposed and not."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.tanh(F.relu(x @ net.layers[0]) @ net.layers[1].T))

    layers = nn.ParameterList([parameter(6, 7), parameter(5, 7)])
    return Wired(wiring, layers=layers, head=nn.Linear(5, 2)), torch.randn(3, 6)
