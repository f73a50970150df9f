from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGroup, Member, Role
from intrafusion.importance import IMPORTANCES, Magnitude, Observation, ObservationError, get_importance
from intrafusion.importance.aggregate import NORMALIZERS, aggregate


def member(tensor: str, dim: int, role: Role) -> Member:
    return Member(tensor, dim, np.arange(3)[:, None], frozenset({role}))


GROUP = ChannelGroup(
    "fc1",
    3,
    (
        member("fc1.weight", 0, Role.PRODUCES),
        member("fc1.bias", 0, Role.SHIFTS),
        member("bn.weight", 0, Role.SCALES),
        member("fc2.weight", 1, Role.CONSUMES),
    ),
)
WEIGHTS = {
    "fc1.weight": torch.tensor([[1.0, -2.0], [0.0, 4.0], [-3.0, 0.0]]),
    "fc1.bias": torch.tensor([10.0, 20.0, -30.0]),
    "bn.weight": torch.tensor([7.0, 7.0, 7.0]),
    "fc2.weight": torch.tensor([[2.0, 0.0, -1.0], [0.0, 6.0, 1.0]]),
}


@pytest.mark.parametrize(
    ("p", "produce", "consume"),
    [
        (1.0, [3.0, 4.0, 3.0], [2.0, 6.0, 2.0]),
        (2.0, [5.0, 16.0, 9.0], [4.0, 36.0, 2.0]),
        (math.inf, [2.0, 4.0, 3.0], [2.0, 6.0, 1.0]),
    ],
)
def test_sum_of_powers_per_member_then_the_reduction(p, produce, consume):
    pair = np.array([produce, consume])
    for name, expected in (
        ("mean", pair.mean(0)),
        ("sum", pair.sum(0)),
        ("max", pair.max(0)),
        ("prod", pair.prod(0)),
        ("first", pair[0]),
        ("last", pair[1]),
    ):
        assert Magnitude(p, name, normalizer=None, folded=True)(GROUP, WEIGHTS).tolist() == expected.tolist(), name


def test_bias_is_a_member_only_if_asked():
    own = Magnitude(1.0, "sum", None, folded=True)
    with_bias = replace(own, bias=True)(GROUP, WEIGHTS) - own(GROUP, WEIGHTS)
    assert with_bias.tolist() == [10.0, 20.0, 30.0]


@pytest.mark.parametrize("p", [1.0, math.inf])
def test_asking_for_the_bias_of_a_group_without_any_changes_nothing(p):
    bare = replace(GROUP, members=tuple(m for m in GROUP.members if m.tensor != "fc1.bias"))
    for reduction in ("mean", "prod", "last"):
        asked, not_asked = (
            Magnitude(p, reduction, None, bias=bias, folded=True)(bare, WEIGHTS) for bias in (True, False)
        )
        assert asked.tolist() == not_asked.tolist()


def test_default_is_the_mean_divided_by_its_mean():
    raw = np.array([5.0, 10.0, 5.0]) / 2
    folded = get_importance({"name": "l1", "folded": True})
    np.testing.assert_allclose(folded(GROUP, WEIGHTS).numpy(), raw / raw.mean(), rtol=1e-15)


def test_not_folded_the_weights_of_the_network_count_and_the_scales_of_its_norms():
    own = {**WEIGHTS, "fc1.weight": 10 * WEIGHTS["fc1.weight"], "bn.weight": torch.tensor([-1.0, 2.0, 3.0])}
    scores = Magnitude(1.0, "sum", None)(GROUP, WEIGHTS, Observation(tensors=own))
    assert scores.tolist() == [30.0 + 1 + 2, 60.0 - 20 + 2 + 6, 30.0 + 3 + 2]
    with pytest.raises(ObservationError, match=r"Magnitude\(p=1.0.*group 'fc1': expected an Observation with tensors"):
        Magnitude()(GROUP, WEIGHTS)


@pytest.mark.parametrize("name", [None, *NORMALIZERS])
def test_members_are_normalised_before_they_are_reduced(name):
    rows = [torch.tensor([3.0, 4.0, 3.0]), torch.tensor([2.0, 6.0, 2.0])]
    own = [r if name is None else aggregate(r[None], "mean", name) for r in rows]
    found = Magnitude(1.0, "sum", None, member_normalizer=name, folded=True)(GROUP, WEIGHTS)
    np.testing.assert_allclose(found.numpy(), sum(own).numpy(), rtol=1e-12)
    louder = {**WEIGHTS, "fc2.weight": 100 * WEIGHTS["fc2.weight"]}
    again = Magnitude(1.0, "sum", None, member_normalizer=name, folded=True)(GROUP, louder)
    assert torch.allclose(found, again) == (name is not None)


@pytest.mark.parametrize(("name", "p"), [("l1", 1.0), ("l2", 2.0), ("linf", math.inf)])
def test_names(name, p):
    assert IMPORTANCES[name] == Magnitude(p=p)


def test_agrees_with_torch_pruning_on_a_residual_network():
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)

    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, padding=1)
            self.head = torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head((x + self.inner(x.relu())).mean((2, 3)))

    net = Residual()
    graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
    theirs = graph.get_pruning_group(net.stem, tp.prune_conv_out_channels, idxs=list(range(8)))
    each = np.arange(8)[:, None]
    ours = ChannelGroup(
        "stem",
        8,
        tuple(
            Member(name, dim, each, frozenset({role}))
            for name, dim, role in (
                ("stem.weight", 0, Role.PRODUCES),
                ("inner.weight", 1, Role.CONSUMES),
                ("inner.weight", 0, Role.PRODUCES),
                ("head.weight", 1, Role.CONSUMES),
            )
        ),
    )
    for p, reduction, normalizer in ((1, "mean", "mean"), (2, "sum", "max"), (2, "max", "sum"), (1, "prod", None)):
        expected = tp.importance.MagnitudeImportance(p=p, group_reduction=reduction, normalizer=normalizer)(theirs)
        score = Magnitude(float(p), reduction, normalizer, folded=True)(ours, dict(net.state_dict()))
        torch.testing.assert_close(score.float(), expected, rtol=1e-5, atol=1e-7)


def test_normalizers():
    scores = torch.tensor([[4.0, 1.0, 3.0]], dtype=torch.float64)
    expected = {
        "mean": [1.5, 0.375, 1.125],
        "sum": [0.5, 0.125, 0.375],
        "max": [1.0, 0.25, 0.75],
        "standardize": [1.0, 0.0, 2 / 3],
        "gaussian": ((np.array([4.0, 1, 3]) - 8 / 3) / np.std([4, 1, 3])).tolist(),
        "lamp": [1.0, 1 / 8, 3 / 7],
    }
    assert set(expected) == set(NORMALIZERS)
    for name, values in expected.items():
        np.testing.assert_allclose(
            aggregate(scores, "mean", name).numpy(), values, rtol=1e-12, atol=1e-15, err_msg=name
        )


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_constant_scores_stay_finite_and_equal(name, value):
    scores = aggregate(torch.full((2, 4), value), "mean", name)
    assert bool(torch.isfinite(scores).all())
    if name != "lamp":
        assert len(set(scores.tolist())) == 1


def test_relabelling_permutes_the_scores():
    flipped = {name: w.flip(1 if name == "fc2.weight" else 0) for name, w in WEIGHTS.items()}
    scores = Magnitude(p=2.0, folded=True)
    assert torch.equal(scores(GROUP, flipped), scores(GROUP, WEIGHTS).flip(0))


def test_errors():
    with pytest.raises(ValueError, match="p: expected p > 0, got 0"):
        Magnitude(p=0.0)
    with pytest.raises(ValueError, match="unknown reduction 'meen'. Did you mean 'mean'"):
        Magnitude(reduction="meen")
    with pytest.raises(ValueError, match="unknown normalizer 'maks'. Did you mean 'max'"):
        Magnitude(normalizer="maks")
    with pytest.raises(ValueError, match="unknown normalizer 'maks'. Did you mean 'max'"):
        Magnitude(member_normalizer="maks")
    with pytest.raises(ValueError, match="unknown reduction 'x'"):
        aggregate(torch.ones(1, 2), "x", None)
    with pytest.raises(ValueError, match="unknown normalizer 'x'"):
        aggregate(torch.ones(1, 2), "mean", "x")
    with pytest.raises(ModelError, match="group 'empty': no weight to measure"):
        Magnitude(folded=True)(ChannelGroup("empty", 3, ()), WEIGHTS)
    with pytest.raises(ValueError, match="unknown importance 'l3'. Did you mean 'l1'|'l2'"):
        get_importance("l3")
    with pytest.raises(RecipeError, match="expected a name, a mapping with a name or a callable"):
        get_importance(Magnitude)  # type: ignore[arg-type]
