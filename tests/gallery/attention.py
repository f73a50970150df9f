"""Attention of every kind: PyTorch's own, by hand, grouped-query, rotary, over space, over channels; embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case, image, parameter

Built = tuple[nn.Module, Inputs]

DECODER_STREAM = "e t.layers.0.self_attn.out_proj t.layers.0.multihead_attn.out_proj t.layers.0.linear2"
VIT_STREAM = "patch layers.0.self_attn.out_proj layers.0.linear2 layers.1.self_attn.out_proj layers.1.linear2"


@case(
    {
        VIT_STREAM: 24,
        "layers.0.self_attn": (8,) * 6,
        "layers.1.self_attn": (8,) * 6,
        "layers.0.linear1": 20,
        "layers.1.linear1": 20,
    },
    blocks={"layers.0.self_attn": 3, "layers.1.self_attn": 3},
    blocked={"head": "output"},
)
def vision_transformer() -> Built:
    """Three heads of eight: per head, q pairs with k, and v with the columns of the output projection."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([net.cls.expand(len(x), -1, -1), x], 1) + net.pos
        for layer in net.layers:
            x = layer(x)
        return net.head(net.norm(x)[:, 0])

    layer = nn.TransformerEncoderLayer(24, 3, 20, 0.0, "gelu", batch_first=True, norm_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers
    parts = {"patch": nn.Conv2d(3, 24, 4, 4), "cls": parameter(1, 1, 24), "pos": parameter(1, 10, 24)}
    return Wired(wiring, **parts, layers=layers, norm=nn.LayerNorm(24), head=nn.Linear(24, 5)), image()


@case(
    {
        DECODER_STREAM: 16,
        "t.layers.0.self_attn": (8,) * 4,
        "t.layers.0.multihead_attn": (8,) * 4,
        "t.layers.0.linear1": 12,
    },
    blocks={"t.layers.0.self_attn": 2, "t.layers.0.multihead_attn": 2},
    blocked={"head": "output"},
)
def transformer_decoder() -> Built:
    """Cross-attention: queries from one sequence, keys and values from another. The stream is shared by both."""

    def wiring(net: Any, x: Tensor, memory: Tensor) -> Tensor:
        return net.head(net.t(net.e(x), net.e(memory)))

    layer = nn.TransformerDecoderLayer(16, 2, 12, 0.0, batch_first=True)
    net = Wired(wiring, e=nn.Linear(5, 16), t=nn.TransformerDecoder(layer, 1), head=nn.Linear(16, 3))
    return net, (torch.randn(2, 4, 5), torch.randn(2, 6, 5))


@case(
    {"stem attn.out_proj": 8, "attn": (4,) * 4},
    blocks={"attn": 2},
    blocked={"head": "output"},
)
def multihead_attention_causal() -> Built:
    """Sequence first, with a causal mask, and the mean of the weights over heads asked for but not used."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        y, _ = net.attn(x, x, x, attn_mask=mask, need_weights=True)
        return net.head(F.gelu(x + y))

    net = Wired(wiring, stem=nn.Linear(3, 8), attn=nn.MultiheadAttention(8, 2), head=nn.Linear(8, 2))
    return net, torch.randn(5, 2, 3)


@case({"q": 8, "a": 5, "b": 6, "attn": (4,) * 4, "attn.out_proj": 8}, blocked={"head": "output"})
def multihead_attention_of_other_widths() -> Built:
    """kdim and vdim: three projections in three parameters, and a learned extra key and value."""

    def wiring(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, _ = net.attn(net.q(q), net.a(k).tanh(), net.b(v).tanh())
        return net.head(F.gelu(y))

    attn = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True, batch_first=True)
    parts = {"q": nn.Linear(3, 8), "a": nn.Linear(3, 5), "b": nn.Linear(3, 6), "attn": attn, "head": nn.Linear(8, 2)}
    return Wired(wiring, **parts), (torch.randn(2, 4, 3), torch.randn(2, 6, 3), torch.randn(2, 6, 3))


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def projections(width: int, inner: int, keys: int, outputs: int = 2) -> dict[str, nn.Module]:
    """stem, q, k, v, o, head: the layers of one attention block."""
    layers: dict[str, nn.Module] = {"stem": nn.Linear(3, width), "q": nn.Linear(width, inner)}
    layers["k"] = nn.Linear(width, keys)
    return layers | {"v": nn.Linear(width, keys), "o": nn.Linear(inner, width), "head": nn.Linear(width, outputs)}


@case({"q k": (4, 4), "v": (4, 4), "stem o": 6}, blocks={"q k v": 2}, blocked={"head": "output"})
def attention_by_hand() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = (split_heads(layer(x), 2) for layer in (net.q, net.k, net.v))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
        return net.head(F.gelu(x + net.o(join_heads(weights @ v))))

    return Wired(wiring, **projections(6, 8, 8)), torch.randn(2, 5, 3)


@case({"q k": (4, 4), "v": (4, 4), "stem o": 6}, blocks={"q k v": 2}, blocked={"head": "output"})
def attention_by_einsum() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = (layer(x).unflatten(-1, (2, 4)) for layer in (net.q, net.k, net.v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return net.head(F.gelu(x + net.o(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))))

    return Wired(wiring, **projections(6, 8, 8)), torch.randn(2, 5, 3)


@case({"q k": (4, 4), "v": (4, 4), "stem o": 6}, blocks={"q k v": 2}, blocked={"head": "output"})
def grouped_query_attention() -> Built:
    """Four query heads, two key-value heads: a key channel pairs with the same channel of two query heads."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = split_heads(net.q(x), 4), split_heads(net.k(x), 2), split_heads(net.v(x), 2)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        return net.head(F.gelu(x + net.o(join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))))

    return Wired(wiring, **projections(6, 16, 8)), torch.randn(2, 5, 3)


@case({"q k": (4, 4), "v": (4, 4), "stem o": 6}, blocks={"q k v": 2}, blocked={"head": "output"})
def grouped_query_attention_built_in() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = split_heads(net.q(x), 4), split_heads(net.k(x), 2), split_heads(net.v(x), 2)
        return net.head(F.gelu(x + net.o(join_heads(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))))

    return Wired(wiring, **projections(6, 16, 8)), torch.randn(2, 5, 3)


@case({"stem o": 6}, partial=True, blocked={"head": "output"})
def attention_of_parameters_with_a_dimension_of_heads() -> Built:
    """XLNet: queries and keys are parameters (width, heads, dimensions), which have a channel nowhere alone."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k = (torch.einsum("bih,hnd->bind", x, weight) for weight in (net.q, net.k))
        weights = torch.einsum("bind,bjnd->bnij", q, k).softmax(-1)
        return net.head(F.gelu(x + net.o(join_heads(weights @ split_heads(net.v(x), 2)))))

    layers = {name: layer for name, layer in projections(6, 8, 8).items() if name not in "qk"}
    return Wired(wiring, **layers, q=parameter(6, 2, 4), k=parameter(6, 2, 4)), torch.randn(2, 5, 3)


@case({"q k": 8, "v": 8, "stem o": 6}, blocked={"head": "output"})
def multi_query_attention() -> Built:
    """Two query heads share one key-value head."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = split_heads(net.q(x), 2), split_heads(net.k(x), 1), split_heads(net.v(x), 1)
        weights = (q @ k.mT).softmax(-1)
        return net.head(F.gelu(x + net.o(join_heads(weights @ v))))

    return Wired(wiring, **projections(6, 16, 8)), torch.randn(2, 5, 3)


@case({"v": (4, 4), "stem o": 6}, blocks={"q k v": 2}, blocked={"head": "output", "q": "", "k": ""})
def rotary_attention() -> Built:
    """Channels j and j + 2 of q and k are rotated by an angle of their own: each pair stands alone."""

    def rotate(x: Tensor) -> Tensor:
        position = torch.arange(x.shape[-2], dtype=x.dtype)
        angle = position[:, None] / torch.tensor([1.0, 10.0], dtype=x.dtype)
        cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = (split_heads(layer(x), 2) for layer in (net.q, net.k, net.v))
        weights = (rotate(q) @ rotate(k).mT).softmax(-1)
        return net.head(F.gelu(x + net.o(join_heads(weights @ v))))

    return Wired(wiring, **projections(6, 8, 8)), torch.randn(2, 5, 3)


@case({"q k": (4, 4), "v": (4, 4), "stem o": 6}, blocks={"q k v": 2}, blocked={"head": "output"})
def attention_with_head_parameters() -> Built:
    """A temperature per head, a relative position bias per head and pair, a norm over each query."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = (split_heads(layer(x), 2) for layer in (net.q, net.k, net.v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * net.temperature + net.bias
        return net.head(F.gelu(x + net.o(join_heads(weights.softmax(-1) @ v))))

    parameters = {"temperature": parameter(2, 1, 1), "bias": parameter(2, 5, 5)}
    return Wired(wiring, **projections(6, 8, 8), **parameters), torch.randn(2, 5, 3)


@case({"stem": (4, 4, 4), "other": 8}, blocks={"stem": 3}, blocked={"head": "output"}, unmixable=("stem",))
def graph_attention_with_heads() -> Built:
    """GAT: each head scores its edges by two vectors of its own, which are rows of two matrices."""

    def wiring(net: Any, x: Tensor, edges: Tensor) -> Tensor:
        h = net.stem(x).unflatten(-1, (3, -1))
        scores = (h * net.source).sum(-1)[:, None] + (h * net.target).sum(-1)[None]
        weights = F.leaky_relu(scores).masked_fill(edges[..., None] == 0, -1e9).softmax(1)
        return net.head(F.elu(net.other(torch.einsum("ijh,jhd->ihd", weights, h).flatten(1))))

    layers = {"stem": nn.Linear(3, 12), "other": nn.Linear(12, 8), "head": nn.Linear(8, 2)}
    edges = (torch.rand(6, 6) > 0.4).float() + torch.eye(6)
    return Wired(wiring, **layers, source=parameter(3, 4), target=parameter(3, 4)), (torch.randn(6, 3), edges)


def rows(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (net.a(x).unflatten(-1, (2, -1)) * net.scale).unbind(1)
    return a.relu(), b.tanh()


@case({"a": (6, 6), "b": 5}, blocked={"head": "output"})
def scale_of_rows() -> Built:
    """Rows of one scale lie along halves of one layer, which are twins."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.b(torch.cat(rows(net, x), 1)))

    layers = {"a": nn.Linear(4, 12), "b": nn.Linear(12, 5), "head": nn.Linear(5, 2)}
    return Wired(wiring, **layers, scale=parameter(2, 6)), torch.randn(5, 4)


@case({"b": 5}, blocked={"head": "output", "a": "slices of scale hold channels of different kinds"})
def scale_of_uneven_rows() -> Built:
    """Only one half is added to another layer's channels: no twins, and the scale has one width for both."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        first, second = rows(net, x)
        return net.head(net.b(torch.cat([first, second + net.c(x)], 1)))

    layers = {"a": nn.Linear(4, 12), "b": nn.Linear(12, 5), "c": nn.Linear(4, 6), "head": nn.Linear(5, 2)}
    return Wired(wiring, **layers, scale=parameter(2, 6)), torch.randn(5, 4)


@case({"a b": 6}, partial=True, blocked={"head": "output"})
def scale_of_stacked_layers() -> Built:
    """Rows of one scale lie along two layers, whose channels move together as the scale has one width."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head((torch.stack([net.a(x), net.b(x)], 1) * net.scale).flatten(1).relu())

    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "head": nn.Linear(12, 2)}
    return Wired(wiring, **layers, scale=parameter(2, 6)), torch.randn(5, 4)


@case({"qkv": (4,) * 4, "stem o": 6}, blocks={"qkv": 2}, blocked={"head": "output"})
def attention_fused() -> Built:
    """One projection for q, k and v: (3, heads, width) in one axis."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = net.qkv(net.norm(x)).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (q * 0.5 @ k.mT).softmax(-1)
        return net.head(F.gelu(x + net.o(join_heads(weights @ v))))

    layers = {"stem": nn.Linear(3, 6), "qkv": nn.Linear(6, 24), "o": nn.Linear(8, 6), "head": nn.Linear(6, 2)}
    return Wired(wiring, **layers, norm=nn.LayerNorm(6)), torch.randn(2, 5, 3)


@case({"theta phi": 4, "g": 4, "stem out": 6}, blocked={"head": "output"})
def non_local_block() -> Built:
    """Attention between all pixels: theta and phi are contracted with each other."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        theta, phi, g = (layer(x).flatten(2) for layer in (net.theta, net.phi, net.g))
        y = g @ (theta.mT @ phi).softmax(-1).mT
        return net.head(F.relu(x + net.out(y.unflatten(-1, x.shape[2:]))))

    convs = {name: nn.Conv2d(6, 4, 1) for name in ("theta", "phi", "g")}
    return Wired(wiring, stem=nn.Conv2d(3, 6, 3), **convs, out=nn.Conv2d(4, 6, 1), head=nn.Conv2d(6, 2, 1)), image(
        size=6
    )


@case(blocked={"head": "output"})
def channel_attention() -> Built:
    """XCiT: the attention map is between channels, not tokens."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = (layer(x).mT for layer in (net.q, net.k, net.v))
        return net.head(F.gelu(x + net.o(((q @ k.mT).softmax(-1) @ v).mT)))

    return Wired(wiring, **projections(6, 8, 8)), torch.randn(2, 5, 3)


@case(blocked={"head": "output"})
def linear_attention() -> Built:
    """Keys meet values before they meet queries: (k^T v) has channels on both axes."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = net.q(x).softmax(-1), net.k(x).softmax(-2), net.v(x)
        return net.head(F.gelu(x + net.o(q @ (k.mT @ v))))

    return Wired(wiring, **projections(6, 8, 8)), torch.randn(2, 5, 3)


@case(blocked={"head": "output"})
def gram_matrix() -> Built:
    """Second-order pooling: products of all pairs of channels."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x)).flatten(2)
        return net.head((a @ a.mT).flatten(1))

    return Wired(wiring, a=nn.Conv2d(3, 4, 3), head=nn.Linear(16, 2)), image(size=6)


@case(blocked={"head": "output"})
def learned_queries() -> Built:
    """Pooling by attention: the queries are a parameter, the keys are the tokens themselves.

    Its six channels are interchangeable, but the product of two parameters' axes may be refused.
    """

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        weights = (net.queries @ x.mT).softmax(-1)
        return net.head(F.gelu(weights @ x).flatten(1))

    net = Wired(wiring, stem=nn.Linear(3, 6), queries=parameter(2, 6), head=nn.Linear(12, 2))
    return net, torch.randn(2, 5, 3)


@case({"patch": 6}, blocked={"head": "output"})
def position_table_interpolated() -> Built:
    """DINOv2: the table of positions is resized to the image at hand."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.patch(x)
        pos = F.interpolate(net.pos, size=x.shape[2:], mode="bicubic", align_corners=False)
        return net.head(F.gelu(x + pos))

    return Wired(wiring, patch=nn.Conv2d(3, 6, 2, 2), pos=parameter(1, 6, 4, 4), head=nn.Conv2d(6, 2, 1)), image()


@case({"a": 6}, blocked={"head": "output"})
def position_buffer() -> Built:
    """A sine table kept as a buffer and sliced to the length at hand."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.gelu(net.a(x) + net.table[: x.shape[1]]))

    return Wired(wiring, a=nn.Linear(3, 6), table=torch.randn(9, 6), head=nn.Linear(6, 2)), torch.randn(2, 5, 3)


@case({"a pos": 6}, blocked={"head": "output"})
def position_embedding() -> Built:
    """Learned positions, looked up by arange."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.gelu(net.a(x) + net.pos(torch.arange(x.shape[1]))))

    return Wired(wiring, a=nn.Linear(3, 6), pos=nn.Embedding(9, 6), head=nn.Linear(6, 2)), torch.randn(2, 5, 3)


@case({"emb": 6, "up": 8}, blocked={"head": "output"})
def embedding_untied() -> Built:
    def wiring(net: Any, ids: Tensor) -> Tensor:
        return net.head(F.gelu(net.up(net.emb(ids))))

    return Wired(wiring, emb=nn.Embedding(11, 6), up=nn.Linear(6, 8), head=nn.Linear(8, 11)), torch.randint(
        0, 11, (2, 5)
    )


@case({"emb down": 6, "up": 8}, unmixable=("emb down",))
def embedding_tied() -> Built:
    """The embedding is the output layer too: one axis produces and consumes the same channels."""

    def wiring(net: Any, ids: Tensor) -> Tensor:
        x = net.emb(ids)
        return F.linear(F.layer_norm(x + net.down(F.gelu(net.up(x))), (x.shape[-1],)), net.emb.weight)

    return Wired(wiring, emb=nn.Embedding(11, 6), up=nn.Linear(6, 8), down=nn.Linear(8, 6)), torch.randint(
        0, 11, (2, 5)
    )


@case({"emb": 6}, partial=True, blocked={"head": "output"})
def embedding_of_a_lookup_table() -> Built:
    """Two lookups in one table, by embedding and by index, added."""

    def wiring(net: Any, ids: Tensor) -> Tensor:
        return net.head(F.gelu(net.emb(ids) + net.emb.weight[ids.flip(1)]))

    return Wired(wiring, emb=nn.Embedding(11, 6), head=nn.Linear(6, 2)), torch.randint(0, 11, (2, 5))


@case(blocked={"head": "output"})
def embedding_bag() -> Built:
    def wiring(net: Any, ids: Tensor) -> Tensor:
        return net.head(F.gelu(net.emb(ids)))

    return Wired(wiring, emb=nn.EmbeddingBag(11, 6), head=nn.Linear(6, 2)), torch.randint(0, 11, (2, 5))


@case({"stem channel2": 6, "channel1": 8}, blocked={"head": "output"}, unmixable=("stem channel2",))
def mlp_mixer() -> Built:
    """Linear layers over tokens and over channels in turn: what mixes tokens does so for each channel alike."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.token2(F.gelu(net.token1(net.norm1(x).mT))).mT
        x = x + net.channel2(F.gelu(net.channel1(net.norm2(x))))
        return net.head(F.gelu(x.mean(1)))

    tokens = {"token1": nn.Linear(5, 7), "token2": nn.Linear(7, 5)}
    channels = {"channel1": nn.Linear(6, 8), "channel2": nn.Linear(8, 6)}
    norms = {"norm1": nn.LayerNorm(6), "norm2": nn.LayerNorm(6)}
    return Wired(wiring, stem=nn.Linear(3, 6), **tokens, **channels, **norms, head=nn.Linear(6, 2)), torch.randn(
        2, 5, 3
    )


@case({"stem channel2": 6, "channel1": 8}, blocked={"head": "output"}, unmixable=("stem channel2",))
def mixer_of_convolutions() -> Built:
    """The same, its tokens mixed by convolutions of width one that slide over the channels."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.token2(F.gelu(net.token1(net.norm1(x))))
        x = x + net.channel2(F.gelu(net.channel1(net.norm2(x))))
        return net.head(F.gelu(x.mean(1)))

    tokens = {"token1": nn.Conv1d(5, 7, 1), "token2": nn.Conv1d(7, 5, 1)}
    channels = {"channel1": nn.Linear(6, 8), "channel2": nn.Linear(8, 6)}
    norms = {"norm1": nn.LayerNorm(6), "norm2": nn.LayerNorm(6)}
    parts = {"stem": nn.Linear(3, 6), **tokens, **channels, **norms, "head": nn.Linear(6, 2)}
    return Wired(wiring, **parts), torch.randn(2, 5, 3)


@case({"up": 8}, blocked={"down": "output"})
def spatial_gating_unit() -> Built:
    """gMLP: half of the channels, normalised and mixed along the tokens, gates the other half."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v = F.gelu(net.up(x)).chunk(2, -1)
        return net.down(u * net.spatial(net.norm(v)))

    parts = {"up": nn.Linear(3, 16), "norm": nn.LayerNorm(8), "spatial": nn.Conv1d(5, 5, 1), "down": nn.Linear(8, 2)}
    return Wired(wiring, **parts), torch.randn(2, 5, 3)


@case({"up": 8}, blocked={"down": "output"})
def convolved_along_time_beside_the_channels() -> Built:
    """A convolution over (tokens, channels) as an image, of a kernel (3, 1): it slides along the tokens alone."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.down(F.relu(net.time(F.relu(net.up(x))[:, None])).flatten(1, 2))

    parts = {"up": nn.Linear(3, 8), "time": nn.Conv2d(1, 2, (3, 1), padding=(1, 0)), "down": nn.Linear(8, 2)}
    return Wired(wiring, **parts), torch.randn(2, 5, 3)


@case(blocked={"up": "convolved along channels"})
def convolved_at_every_second_channel() -> Built:
    """A kernel of width one that steps over channels leaves some of them out."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.down(F.relu(net.tokens(F.relu(net.up(x)))))

    parts = {"up": nn.Linear(3, 8), "tokens": nn.Conv1d(5, 5, 1, stride=2), "down": nn.Linear(4, 2)}
    return Wired(wiring, **parts), torch.randn(2, 5, 3)


@case({"q k": 4, "v": 6}, blocked={"head": "output"})
def keys_of_fewer_tokens() -> Built:
    """Linformer: keys and values of all tokens become those of a few, by a matrix over tokens."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        k, v = net.fewer(net.k(x).mT).mT, net.fewer(net.v(x).mT).mT
        return net.head((net.q(x) @ k.mT).softmax(-1) @ v)

    heads = {"q": nn.Linear(3, 4), "k": nn.Linear(3, 4), "v": nn.Linear(3, 6)}
    return Wired(wiring, **heads, fewer=nn.Linear(5, 2, bias=False), head=nn.Linear(6, 2)), torch.randn(2, 5, 3)


@case({"v": (4, 4), "stem o": 6}, partial=True, blocks={"q k v": 2}, blocked={"head": "output"})
def query_and_key_norms() -> Built:
    """Qwen3: one norm weight per channel of a head serves all heads."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = (split_heads(layer(x), 2) for layer in (net.q, net.k, net.v))
        y = F.scaled_dot_product_attention(net.q_norm(q), net.k_norm(k), v)
        return net.head(F.gelu(x + net.o(join_heads(y))))

    return Wired(wiring, **projections(6, 8, 8), q_norm=nn.RMSNorm(4), k_norm=nn.RMSNorm(4)), torch.randn(2, 5, 3)


@case({"stem": 8}, partial=True, blocked={"head": "output"})
def multihead_attention_with_zero_attention() -> Built:
    """A row of zeros is appended to keys and values; padded keys are masked."""

    def wiring(net: Any, x: Tensor, padding: Tensor) -> Tensor:
        x = net.stem(x).tanh()
        y, _ = net.attn(x, x, x, key_padding_mask=padding)
        return net.head(F.gelu(y))

    attn = nn.MultiheadAttention(8, 2, add_zero_attn=True, batch_first=True)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    return Wired(wiring, stem=nn.Linear(3, 8), attn=attn, head=nn.Linear(8, 2)), (torch.randn(2, 4, 3), padding)


@case({"layer.linear1": 12, "stem layer.self_attn.out_proj layer.linear2": 8}, partial=True, blocked={"head": "output"})
def encoder_layer_with_padding_mask() -> Built:
    """Post-norm; in eval mode PyTorch would take a fused path that hides every step."""

    def wiring(net: Any, x: Tensor, padding: Tensor) -> Tensor:
        return net.head(net.layer(net.stem(x), src_key_padding_mask=padding))

    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    return Wired(wiring, stem=nn.Linear(3, 8), layer=layer, head=nn.Linear(8, 2)), (torch.randn(2, 4, 3), padding)


@case({"stem codes": 6, "back": 5}, partial=True, blocked={"head": "output"})
def vector_quantiser() -> Built:
    """VQ-VAE: the nearest row of a table replaces each token, with a straight-through estimator.

    The six channels of `stem` are the six columns of the table, and may be permuted together.
    """

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        table = net.codes.weight
        distance = x.pow(2).sum(-1, keepdim=True) - 2 * x @ table.t() + table.pow(2).sum(-1)
        nearest = net.codes(distance.argmin(-1))
        return net.head(F.relu(net.back(x + (nearest - x).detach())))

    parts = {"stem": nn.Linear(3, 6), "codes": nn.Embedding(7, 6), "back": nn.Linear(6, 5), "head": nn.Linear(5, 2)}
    return Wired(wiring, **parts), torch.randn(2, 5, 3)


@case({"a": 6}, partial=True, unmixable=("a",))
def similarity_of_samples() -> Built:
    """Contrastive heads: inner products between samples. A copied channel would count twice."""
    return Wired(lambda net, x: net.a(x) @ net.a(x).mT, a=nn.Linear(4, 6)), torch.randn(3, 4)


@case({"a": 6}, unmixable=("a",))
def cosine_classifier() -> Built:
    """Features and class vectors of unit length: merging columns changes the length of the class vectors."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return F.linear(F.normalize(net.a(x).tanh(), dim=-1), F.normalize(net.classes, dim=-1))

    return Wired(wiring, a=nn.Linear(4, 6), classes=parameter(3, 6)), torch.randn(5, 4)
