"""Padded tokens: whatever is computed with a mask is what is computed of the same sentences without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from breadth import EXHAUSTIVE
from torch import Tensor, nn

import intrafusion
from intrafusion import IntrafusionWarning, ModelError
from intrafusion.importance.observation import NEEDS
from intrafusion.measure.closeness import Yardstick
from intrafusion.network.batches import as_call, double_first, join_batches, read_batches, take_images
from intrafusion.network.calibration_images import as_calls
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import RowWeights, find_unknown_masks, find_weights, select_counted
from intrafusion.network.sources import import_transformers
from intrafusion.observe.moments import measure_moments
from intrafusion.observe.observe import observe
from intrafusion.restore import ActivationRepair, LeastSquares

TOKENS, LENGTH, MORE = 40, 9, 5
transformers = pytest.importorskip("transformers", exc_type=ImportError)


def bert() -> nn.Module:
    t = import_transformers()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return t.BertModel(t.BertConfig(vocab_size=TOKENS, max_position_embeddings=32, **small), add_pooling_layer=False)


def llama() -> nn.Module:
    t = import_transformers()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = t.LlamaConfig(vocab_size=TOKENS, num_key_value_heads=2, use_cache=False, bos_token_id=1, **small)
    return t.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    t = import_transformers()
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=TOKENS, n_positions=32, n_embd=16, n_layer=1, n_head=2, use_cache=False, **ends)
    )


FAMILIES = {"bert": bert, "llama": llama, "gpt2": gpt2}


def network(family: str) -> nn.Module:
    """Weights larger than at the start of training, so that no activation is close to linear."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def sentences(count: int) -> Tensor:
    return torch.randint(3, TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def ragged(count: int) -> list[Tensor]:
    return [row[: 4 + i % (LENGTH - 3)] for i, row in enumerate(sentences(count))]


def pad(texts: list[Tensor], length: int, token: int) -> dict[str, Tensor]:
    ids = torch.full((len(texts), length), token)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def whole(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read_one_by_one(model: nn.Module, name: str, texts: list[Tensor]) -> Tensor:
    """What a layer reads, sentence by sentence without padding, (tokens, channels) float64."""
    rows: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2).detach()))
    with torch.no_grad():
        for text in texts:
            model(**whole(text[None]))
    handle.remove()
    return torch.cat(rows).double()


READERS = {
    "bert": ("encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"),
    "llama": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"),
    "gpt2": ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_sentences_one_by_one(family: str) -> None:
    model, texts = network(family), ragged(30)
    graph = intrafusion.inspect(model, whole(sentences(2)))
    moments = measure_moments(model, graph, pad(texts, LENGTH, token=0))
    group, reader = READERS[family]
    name = next(n for n in moments if n.startswith(group))
    rows = read_one_by_one(model, reader, texts)
    torch.testing.assert_close(
        moments[name].covariances[0].diagonal(),
        rows.var(0, correction=0) if float(moments[name].means.abs().max()) else rows.square().mean(0),
        rtol=1e-4,
        atol=1e-6,
    )
    if float(moments[name].means.abs().max()):
        torch.testing.assert_close(moments[name].means[0], rows.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_solved_for_sentences_one_by_one(family: str) -> None:
    """Nothing was reduced and one layer was spoilt: it becomes the ridge solution on the rows without padding."""
    model, texts = network(family), ragged(60)
    name = READERS[family][1]
    example = whole(sentences(2))
    graph = intrafusion.inspect(model, example)
    recipe = intrafusion.Recipe.of(keep=1.0, restore=None, reducer="select")
    small = intrafusion.apply(model, intrafusion.decide(model, graph, recipe), example, graph=graph)
    layer = small.model.get_submodule(name)
    layer.weight.data += 0.3 * torch.randn_like(layer.weight)
    spoilt = layer.weight.detach().double()
    LeastSquares(scarcity=0.0, strength=1e-2, drift=False)(small, model, graph, pad(texts, LENGTH + MORE, token=0))
    x = read_one_by_one(model, name, texts)
    old = model.get_submodule(name).weight.detach().double()
    swapped = family == "gpt2"  # (inputs, outputs)
    lost = x @ (old - spoilt if swapped else (old - spoilt).T)
    x, lost = (x, lost) if family == "llama" else (x - x.mean(0), lost - lost.mean(0))
    damped = x.T @ x / len(x) + 1e-2 * x.square().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    change = torch.linalg.solve(damped, x.T @ lost / len(x))
    torch.testing.assert_close(
        layer.weight.detach().double() - spoilt, change if swapped else change.T, rtol=1e-3, atol=1e-4
    )


HIDDEN = {"bert": "*intermediate*", "llama": "*gate_proj", "gpt2": "*c_fc"}
OPTIONS: dict[str, dict[str, Any]] = {
    "pivot": {},
    "target": {"target": {"params": 0.8}},
    "taylor": {"importance": "taylor", "reducer": "select", "restore": None},
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, "pivot") for family in FAMILIES if family != "gpt2"),
        *(
            pytest.param(*both, marks=EXHAUSTIVE)
            for both in (("gpt2", "pivot"), ("bert", "target"), ("llama", "taylor"))
        ),
    ],
)
def test_the_whole_compression_does_not_see_padding(family: str, options: str) -> None:
    model, ids = network(family), sentences(60)
    how = OPTIONS[options]
    how = how if "target" in how else {"keep": {HIDDEN[family]: 0.5}, **how}
    plain = intrafusion.compress(model, whole(ids[:2]), inputs=whole(ids), **how)
    padded = intrafusion.compress(model, whole(ids[:2]), inputs=pad(list(ids), LENGTH + MORE, token=0), **how)
    assert plain.plan.sizes
    assert padded.plan.sizes == plain.plan.sizes
    for (name, a), (_, b) in zip(padded.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert padded.comparison is not None
    assert plain.comparison is not None
    errors = [c.held_out.after.error for c in (padded.comparison, plain.comparison) if c.held_out is not None]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert "could not be told" not in str(padded)


def test_without_the_mask_padding_is_seen() -> None:
    """The test above can fail."""
    model, ids = network("llama"), sentences(60)
    how: dict[str, Any] = {"keep": {"*gate_proj": 0.5}}
    plain = intrafusion.compress(model, whole(ids[:2]), inputs=whole(ids), **how)
    loose = {**pad(list(ids), LENGTH + MORE, token=0)}
    loose["attention_mask"] = torch.ones_like(loose["attention_mask"])
    padded = intrafusion.compress(model, whole(ids[:2]), inputs=loose, **how)
    weight = "model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(plain.model.get_parameter(weight), padded.model.get_parameter(weight), atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_held_out_error_is_that_of_sentences_one_by_one(family: str) -> None:
    model, texts = network(family), ragged(20)
    other = network(family)
    for parameter in other.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    found = Yardstick(model, as_call(pad(texts, LENGTH + MORE, token=0))).measure(other).error
    with torch.no_grad():
        rows = [torch.cat([m(**whole(text[None]))[0][0].double() for text in texts]) for m in (other, model)]
    lost = float((rows[0] - rows[1]).square().sum() / (rows[1] - rows[1].mean(0)).square().sum())
    assert found == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_criteria_look_at_does_not_see_padding(family: str) -> None:
    model, ids = network(family), sentences(20)
    graph = intrafusion.inspect(model, whole(ids[:2]))
    groups = [g for g in graph.reducible if g.is_channel][-2:]
    plain, padded = (
        observe(model, graph, groups, given, sorted(NEEDS))
        for given in (whole(ids), pad(list(ids), LENGTH + MORE, token=0))
    )
    for group in groups:
        a, b = padded[group.name], plain[group.name]
        assert a.activations is not None
        assert b.activations is not None
        torch.testing.assert_close(a.activations.mean, b.activations.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.contributions, b.contributions, rtol=1e-3, atol=1e-4)
        for name, gradient in (b.gradients or {}).items():
            torch.testing.assert_close((a.gradients or {})[name], gradient, rtol=1e-3, atol=1e-3)


def test_repair_does_not_see_padding() -> None:
    model, ids = network("gpt2"), sentences(60)
    example = whole(ids[:2])
    graph = intrafusion.inspect(model, example)
    recipe = intrafusion.Recipe.of(keep={"*c_fc": 0.5}, reducer="select", restore=None)
    plan = intrafusion.decide(model, graph, recipe)
    both = [intrafusion.apply(model, plan, example, graph=graph) for _ in range(2)]
    for small, given in zip(both, (whole(ids), pad(list(ids), LENGTH + MORE, token=0)), strict=True):
        ActivationRepair()(small, model, graph, given)
    for a, b in zip(*(small.model.parameters() for small in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# ---- which rows are which positions ---------------------------------------------------------------------------------

TABLE = torch.tensor([[1.0, 1, 0], [1, 0, 0]]).double()


def mapped(x: Tensor, *tables: Tensor, doubled: int = 0) -> tuple[list[float], set[str]]:
    weights = RowWeights(tables or (TABLE,), doubled=doubled)
    return weights.of_rows(x, "here").flatten().tolist(), weights.lost


def test_rows_are_found_by_the_shape() -> None:
    c = 4
    flat = TABLE.flatten().tolist()
    assert mapped(torch.zeros(2, 3, c)) == (flat, set())
    assert mapped(torch.zeros(3, 2, c)) == (TABLE.T.flatten().tolist(), set())
    assert mapped(torch.zeros(2, 5, 3, c)) == (TABLE[:, None].expand(2, 5, 3).flatten().tolist(), set())
    assert mapped(torch.zeros(2, 3, 5, c)) == (TABLE[:, :, None].expand(2, 3, 5).flatten().tolist(), set())
    assert mapped(torch.zeros(2, c)) == ([1, 1], set())  # pooled
    assert mapped(torch.zeros(2, 1, c)) == ([1, 1], set())  # a class token


def test_where_the_shape_does_not_tell_all_rows_count_and_it_is_said() -> None:
    assert mapped(torch.zeros(2, 7, 4)) == ([1.0] * 14, {"here"})
    assert mapped(torch.zeros(9, 4)) == ([1.0] * 9, {"here"})
    assert mapped(torch.zeros(2, 3, 3, 4)) == ([1.0] * 18, {"here"})
    assert mapped(torch.randn(6, 4)) == ([1.0] * 6, {"here"})
    assert mapped(torch.zeros(2, 2, 4), torch.tensor([[1.0, 0], [1, 1]])) == ([1.0] * 4, {"here"})
    other = torch.tensor([[1.0, 1, 1], [1, 1, 0]]).double()
    assert mapped(torch.zeros(2, 3, 4), TABLE, other) == ([1.0] * 6, {"here"})


@pytest.mark.parametrize("order", [0, 1])
def test_flattened_rows_are_found_by_the_sample_that_stands_there_twice(order: int) -> None:
    table = torch.cat([TABLE, TABLE[:1] * 0])
    x = torch.randn(3, 3, 4)
    x = torch.cat([x[:2], x[:1]])[:, :2]  # three samples of two positions, the last is the first
    table = table[:, :2]
    rows = x if order == 0 else x.transpose(0, 1)
    wanted = table if order == 0 else table.T
    assert mapped(rows.reshape(-1, 4), table, doubled=1) == (wanted.flatten().tolist(), set())


def test_a_sequence_stands_there_twice_and_batches_are_never_as_long_as_sequences() -> None:
    call = as_call(pad(ragged(LENGTH - 1), LENGTH, token=0))
    twice = double_first(call)
    assert [len(t) for t in twice.tensors()] == [LENGTH + 1] * 2
    assert twice.weights is not None
    assert twice.weights.tables[0][-2:].count_nonzero() == 0
    assert torch.equal(twice.tensors()[0][-1], call.tensors()[0][0])
    assert double_first(twice) is twice
    assert double_first(Inputs((torch.zeros(2, 3),))).weights is None


def test_weights_go_where_the_rows_go() -> None:
    texts = ragged(10)
    parts = [pad(texts[:6], LENGTH, 0), pad(texts[6:], LENGTH, 0)]
    joined = join_batches(read_batches(parts))
    assert joined.weights is not None
    assert torch.equal(joined.weights.tables[0], pad(texts, LENGTH, 0)["attention_mask"].double())
    cut = take_images(joined, 2, 5)
    assert cut.weights is not None
    assert torch.equal(cut.weights.tables[0], cut.tensors()[1].double())


def test_rows_may_count_by_any_number() -> None:
    """Twice is as if the row stood there twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(50, 4)
    graph = intrafusion.inspect(model, x[:2])
    counts = torch.tensor([1.0, 2.0]).repeat(25).double()
    weighed = Inputs((x,), weights=RowWeights((counts[:, None],)))
    found = measure_moments(model, graph, weighed)["0"]
    again = measure_moments(model, graph, torch.cat([x, x[1::2]]))["0"]
    torch.testing.assert_close(found.means, again.means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.covariances[0].diagonal(), again.covariances[0].diagonal(), rtol=1e-5, atol=1e-6)
    rows = select_counted([x], weighed.weights)[0]
    torch.testing.assert_close(rows[1], x[1] * 2**0.5)


def test_labels_of_a_decoder_are_its_mask() -> None:
    mask, labels = torch.ones(2, 5), torch.tensor([[4, 5, -100], [4, -100, -100]])
    found = find_weights({"attention_mask": mask, "labels": labels}, "images")
    assert found is not None
    assert found.tables[1].tolist() == [[1, 1, 0], [1, 0, 0]]
    padding = find_weights({"src_key_padding_mask": torch.tensor([[False, True]])}, "images")
    assert padding is not None
    assert padding.tables[0].tolist() == [[1, 0]]


# ---- masks that are none --------------------------------------------------------------------------------------------

IDS = torch.ones(3, 4, dtype=torch.long)
WRONG = {
    "another shape": (torch.ones(3, 5), r"attention_mask: expected one number for each token, \[3, 4\], got \[3, 5\]"),
    "no batch": (torch.ones(4), r"attention_mask: expected one number for each token, \[3, 4\], got \[4\]"),
    "all zeros": (torch.zeros(3, 4), "attention_mask: expected at least one token .* nothing of every sequence; leave"),
    "a row of zeros": (
        torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]),
        "batch 0 of images: attention_mask: expected at least one token .* nothing of sequence 1; leave such",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_masks_that_are_wrong_are_told_of(case: str) -> None:
    mask, message = WRONG[case]
    with pytest.raises(ModelError, match=message):
        read_batches([{"input_ids": IDS, "attention_mask": mask}])


KEPT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
CAUSAL = KEPT[:, None, None].bool() & torch.ones(4, 4, dtype=torch.bool).tril()
PAIRS = {
    "allowed": CAUSAL,
    "of every head": CAUSAL.expand(3, 2, 4, 4),
    "of keys": KEPT[:, None, None].bool(),
    "without heads": CAUSAL[:, 0].long(),
    "added": torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
    "added, infinite": torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, -torch.inf),
    "added to scores of all": torch.zeros(3, 4).masked_fill(KEPT == 0, -1e9),
    "multiplied": CAUSAL.float(),
}


@pytest.mark.parametrize("form", PAIRS)
def test_what_no_position_may_look_at_is_padding(form: str) -> None:
    found = find_weights({"input_ids": IDS, "attention_mask": PAIRS[form]}, "images")
    assert found is not None
    assert found.tables[0].tolist() == KEPT.tolist()
    assert not found.lost


def test_nothing_is_padding_where_nothing_is_added_to_scores() -> None:
    found = find_weights({"input_ids": IDS, "attention_mask": torch.zeros(3, 1, 4, 4)}, "images")
    assert found is not None
    assert bool(found.tables[0].all())


def test_masks_that_do_not_go_with_the_sequences_are_left_to_the_network_and_it_is_said() -> None:
    """One for all sequences, as of a causal decoder."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.first, self.last = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.words(input_ids)
            mixed = nn.functional.scaled_dot_product_attention(x, x, x, attention_mask)
            return self.last(self.first(mixed).relu())

    ids, mask = torch.randint(11, (40, 5)), torch.ones(1, 5, 5, dtype=torch.bool).tril()
    found = find_weights({"input_ids": ids, "attention_mask": mask}, "images")
    assert found is not None
    assert (found.tables, found.lost) == ((), {"attention_mask"})
    given = {"input_ids": ids, "attention_mask": mask}
    with pytest.warns(IntrafusionWarning, match="where all rows count"):
        small = intrafusion.compress(Causal(), {"input_ids": ids[:2], "attention_mask": mask}, 0.5, inputs=given)
    assert small.model.get_submodule("first").out_features == 6


@pytest.mark.parametrize(("name", "mask"), [("pad_mask", KEPT == 0), ("lengths", KEPT.sum(1)), ("mask", KEPT)])
def test_what_may_be_a_mask_of_padding_under_another_name_is_told_of(name: str, mask: Tensor) -> None:
    assert find_unknown_masks({"ids": IDS, name: mask}, 3) == [name]
    assert not find_unknown_masks({"ids": IDS, name: torch.ones_like(mask)}, 3)  # it leaves nothing out
    assert not find_unknown_masks({"ids": IDS, name: torch.ones(4, 4).tril()}, 4)  # of pairs of positions
    assert not find_unknown_masks({"attention_mask": KEPT, "token_type_ids": KEPT}, 3)


def test_a_result_says_that_a_mask_under_another_name_was_not_looked_at() -> None:
    class Masked(nn.Sequential):
        def forward(self, x: Tensor, pad_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * ~pad_mask[..., None]

    model = Masked(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    images = {"x": torch.randn(40, 5, 3), "pad_mask": torch.arange(5) >= torch.randint(2, 6, (40, 1))}
    with pytest.warns(IntrafusionWarning, match="pad_mask: where this is a mask of padding, padded positions count"):
        intrafusion.compress(model, {name: t[:2] for name, t in images.items()}, 0.5, inputs=images)


class Shuffled(nn.Module):
    """Its hidden layer reads pairs of neighbouring tokens: half as many rows as positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.first, self.last = nn.Embedding(11, 8), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) * attention_mask[..., None]
        return self.last(self.first(x.reshape(len(x), -1, 16)).relu())


def test_a_result_says_where_padding_was_not_told_from_the_rest() -> None:
    ids = torch.randint(11, (60, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:30, 4:] = 0
    model = Shuffled().eval()
    with pytest.warns(IntrafusionWarning, match="could not be told from the shape of what"):
        small = intrafusion.compress(model, (ids[:2], mask[:2]), 0.5, inputs=[(ids, mask)])
    assert "where all rows count, padded ones too" in " ".join(str(small).split())


def test_positional_masks_are_read_by_the_names_of_forward() -> None:
    ids = torch.ones(4, 6, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    calls = as_calls([(ids, mask)], Shuffled(), Inputs((ids[:2], mask[:2])))
    assert calls is not None
    [call] = list(calls)
    assert call.weights is not None
    assert torch.equal(call.weights.tables[0], mask.double())
