"""Merged key/value heads: where nothing is lost, what is refused, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion.errors import BudgetError, ModelError, PlanError, RecipeError
from intrafusion.measure.closeness import Closeness, Yardstick
from intrafusion.merge import merge_heads
from intrafusion.network.sources import import_transformers
from intrafusion.reduce import ReductionMap
from intrafusion.restore.solver import LayerSolver

WIDTH, D = 24, 4


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of (batch, heads, tokens, D), halves as real and imaginary parts."""
    angles = torch.arange(x.shape[2])[:, None] / 3.0 ** torch.arange(D // 2)
    cos, sin = torch.cat([angles.cos()] * 2, 1).to(x), torch.cat([angles.sin()] * 2, 1).to(x)
    return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin


class Attention(nn.Module):
    def __init__(self, heads: int, shared: int, *, rotary: bool, bias: bool) -> None:
        super().__init__()
        self.shared, self.rotary = shared, rotary
        self.query = nn.Linear(WIDTH, heads * shared * D, bias=bias)
        self.key, self.value = (nn.Linear(WIDTH, heads * D, bias=bias) for _ in range(2))
        self.out = nn.Linear(heads * shared * D, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, D)).transpose(1, 2) for p in (self.query, self.key, self.value))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        k, v = (t[:, :, None].expand(-1, -1, self.shared, -1, -1).flatten(1, 2) for t in (k, v))
        z = (q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v
        return self.out(z.transpose(1, 2).flatten(2))


class Network(nn.Module):
    def __init__(self, heads: int = 4, shared: int = 2, *, rotary: bool = True, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, WIDTH)
        self.attention = Attention(heads, shared, rotary=rotary, bias=bias)
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.attention(h))


def attention(model: nn.Module) -> Attention:
    found = model.get_submodule("attention")
    assert isinstance(found, Attention)
    return found


X = torch.randn(64, 7, 6, generator=torch.Generator().manual_seed(1))


def liken_(model: Network, pairs: tuple[tuple[int, int], ...], *, rotary: bool) -> None:
    """Make key and value heads of these pairs the same but for a factor, and for any matrix."""
    key, value = model.attention.key, model.attention.value
    half = D // 2
    with torch.no_grad():
        for a, b in pairs:
            own, other = (slice(D * h, D * h + D) for h in (a, b))
            for t in (key.weight, key.bias):
                x, y = t[own][:half].clone(), t[own][half:].clone()
                mixed = torch.cat([0.6 * x - 0.8 * y, 0.8 * x + 0.6 * y])
                t[other] = 1.5 * mixed if rotary else torch.randn(D, D, generator=G()) @ t[own]
            for t in (value.weight, value.bias):
                t[other] = torch.randn(D, D, generator=G()) @ t[own]


def G() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("rotary", [True, False])
def test_heads_that_differ_by_what_commutes_merge_without_loss(rotary: bool) -> None:
    """Whichever lie beside each other: 0 and 3, 1 and 2."""
    model = Network(rotary=rotary).eval()
    liken_(model, ((0, 3), (2, 1)), rotary=rotary)
    small = merge_heads(model, X[:2], 2, inputs=X)
    assert small.plan.sizes == {"attention.key:merged": 2}
    assert small.plan.maps["attention.key:merged"].unmerge.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    assert small.plan.decisions[0].proof == "function"
    assert attention(small.model).key.weight.shape == attention(small.model).value.weight.shape == (2 * D, WIDTH)
    assert attention(small.model).shared == 4
    assert small.after.params == small.before.params - 2 * 2 * D * (WIDTH + 1)
    torch.testing.assert_close(small.model(X), model(X), rtol=1e-3, atol=1e-4)


def test_all_heads_become_one() -> None:
    model = Network().eval()
    liken_(model, ((0, 1), (0, 2), (0, 3)), rotary=True)
    small = merge_heads(model, X[:2], 1, inputs=X)
    assert attention(small.model).shared == 8
    torch.testing.assert_close(small.model(X), model(X), rtol=1e-3, atol=1e-4)


def test_as_many_heads_as_there_are_leave_everything_as_it_is() -> None:
    model = Network().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = merge_heads(model, X[:2], 4, inputs=X)
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(model.state_dict()[name], before[name])
    assert attention(small.model).shared == 2


def test_solving_makes_up_for_a_part_and_beats_dropping_heads() -> None:
    model = Network().eval()
    small = merge_heads(model, X[:2], 2, inputs=X)
    (step,) = small.restored
    assert step.error_before is not None
    assert step.error_after is not None
    assert step.error_after <= step.error_before
    dropped = intrafusion.compress(model, X[:2], {"*:blocks": 0.5, "*": 1.0}, inputs=X).model
    off = lambda net: float((net(X) - model(X)).square().mean().detach())  # noqa: E731
    assert off(small.model) < off(dropped)


@pytest.mark.parametrize("rotary", [True, False])
def test_keys_queries_and_values_are_solved_for_what_merging_makes_of_the_originals(
    rotary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer, which reads what it did: the matrix that is given leads from its old to its new outputs."""
    model, seen = Network(rotary=rotary).eval(), dict[str, Tensor]()
    solve = LayerSolver.solve_

    def watch(self: LayerSolver, small: nn.Module, maps: dict[str, ReductionMap], *others: Any, **more: Any) -> Any:
        with torch.no_grad():
            h = model.first(X)
            for name in ("key", "query", "value"):
                was, becomes = (net.get_submodule(f"attention.{name}")(h).double() for net in (model, small))
                seen[name] = was @ maps[f"attention.{name}:rows"].merge.T - becomes
        return solve(self, small, maps, *others, **more)

    monkeypatch.setattr(LayerSolver, "solve_", watch)
    merge_heads(model, X[:2], 2, inputs=X)
    assert seen.keys() == {"key", "query", "value"}
    assert all(float(off.abs().max()) < 1e-5 for off in seen.values())


def test_a_solution_whose_outputs_are_no_numbers_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.5, float("nan")])
    monkeypatch.setattr(Yardstick, "measure", lambda *_: Closeness(next(found)))
    model = Network().eval()
    (step,) = merge_heads(model, X[:2], 2, inputs=X).restored
    assert step.undone


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = Network().eval()
    small = merge_heads(model, X[:2], 2, inputs=X)
    small.save(tmp_path / "small")
    again = intrafusion.load(tmp_path / "small", Network)
    assert torch.equal(again.eval()(X), small.model(X))
    assert attention(again).shared == 4
    assert intrafusion.Plan.from_json(small.plan.to_json(), small.plan.maps) == small.plan
    with pytest.raises(PlanError, match=r"group 'attention.key:merged' is not the same here"):
        intrafusion.apply(model, small.plan, X[:2])


def test_merging_is_an_option_of_compress_and_of_its_recipe() -> None:
    """Of the seed alone, and written down, so that it can be done again."""
    model = Network().eval()
    small = intrafusion.compress(model, X[:2], merge_heads=2, inputs=X)
    assert all(
        map(torch.equal, small.model.state_dict().values(), merge_heads(model, X[:2], 2, X).model.state_dict().values())
    )
    recipe = intrafusion.Recipe.from_yaml(small.plan.recipe.to_yaml())
    assert recipe == small.plan.recipe
    assert recipe.merge_heads == 2
    graph = intrafusion.inspect(model, X[:2])
    with pytest.raises(RecipeError, match="merge_heads: no plan merges heads"):
        intrafusion.decide(model, graph, recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5}, "merge_heads: goes without keep; merge first, and compress what comes out"),
        ({"target": {"params": 0.5}}, "merge_heads: goes without target"),
        ({"round_to": 8, "exclude": "first"}, "merge_heads: goes without round_to, exclude"),
        ({"restore": None}, "merge_heads: goes without restore"),
        ({"inplace": True}, "merge_heads: expected a copy to be made, got inplace=True too"),
    ],
)
def test_options_that_merging_does_not_take_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        intrafusion.compress(Network().eval(), X[:2], merge_heads=2, inputs=X, **options)


def test_a_number_of_heads_that_is_none_is_refused() -> None:
    with pytest.raises(BudgetError, match="merge_heads: expected a whole number >= 1, got 0"):
        intrafusion.compress(Network().eval(), X[:2], merge_heads=0, inputs=X)


def test_a_configuration_says_how_many_heads_there_are_and_masks_count(tmp_path: Path) -> None:
    """With a mask, the number of queries for each key is read that the example does not show."""
    pytest.importorskip("transformers")
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 40, (40, 9), generator=G())
    example = {"input_ids": tokens[:2], "use_cache": False}
    small = merge_heads(model, example, 2, inputs=[{"input_ids": tokens}]).model
    assert small.get_parameter("model.layers.0.self_attn.k_proj.weight").shape == (8, 32)
    small.save_pretrained(tmp_path / "small")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert again.config.num_key_value_heads == 2
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        given = [net(input_ids=tokens[:2], use_cache=False, **options).logits for net in (small, again)]
        torch.testing.assert_close(*given)


def test_it_can_be_compressed_further() -> None:
    small = merge_heads(Network().eval(), X[:2], 2, inputs=X)
    again = intrafusion.compress(small.model, X[:2], 0.5, inputs=X)
    assert again.after.params < small.after.params


@pytest.mark.parametrize("heads", [3, 5])
def test_numbers_that_halving_does_not_reach_are_refused(heads: int) -> None:
    with pytest.raises(BudgetError, match=f"attention.*has 4; expected one of 4, 2, 1, got {heads}"):
        merge_heads(Network().eval(), X[:2], heads, inputs=X)


def test_a_network_without_such_heads_is_refused() -> None:
    with pytest.raises(ModelError, match="merge_heads: there are no key/value heads here"):
        merge_heads(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), X[:2], 1, inputs=X)
