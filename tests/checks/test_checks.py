"""Every registered method keeps the laws, and every law can be broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intrafusion.checks import LAWS, LawError, check_importance, check_reducer, check_restorer
from intrafusion.errors import IntrafusionError
from intrafusion.importance import IMPORTANCES, Magnitude, TorchPruning
from intrafusion.network.inputs import Inputs
from intrafusion.reduce import REDUCERS, IntraFusion, ReductionMap, ReductionProblem, Select, selection_map
from intrafusion.restore import RESTORERS, Distill

# ---- every registered method keeps them -----------------------------------------------------------------------------

ON_IMAGES = {"taylor", "chip", "contribution"}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_registered_importance(name: str) -> None:
    expected = {"shape", "finite", "deterministic", "inputs untouched", "relabelling", "works somewhere"}
    expected -= {"relabelling"} if name == "random" else set()
    expected |= {"needs"} if name in ON_IMAGES else set()
    assert set(check_importance(IMPORTANCES[name])) == expected


@pytest.mark.parametrize(
    "criterion",
    [
        Magnitude(p=2, reduction="prod", normalizer="gaussian", bias=True),
        Magnitude(folded=True, member_normalizer="max"),
        type(IMPORTANCES["fpgm"])(reduction="mean", member_normalizer="mean", folded=True),  # type: ignore[call-arg]
        type(IMPORTANCES["taylor"])(multivariable=True, bias=True, reduction="max", normalizer="standardize"),  # type: ignore[call-arg]
    ],
    ids=repr,
)
def test_other_hyper_parameters_of_importance(criterion: Any) -> None:
    check_importance(criterion)


@pytest.mark.parametrize("name", ["MagnitudeImportance", "TaylorImportance", "FPGMImportance", "RandomImportance"])
def test_criteria_of_torch_pruning(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    normal = {} if name == "RandomImportance" else {"normalizer": None}  # theirs divide by a mean that may be 0
    laws = check_importance(TorchPruning(getattr(tp.importance, name)(**normal)))
    assert ("relabelling" in laws) == (name != "RandomImportance")


@pytest.mark.parametrize("name", REDUCERS)
def test_registered_reducer(name: str) -> None:
    reducer = REDUCERS[name]()
    expected = {"shape", "finite", "deterministic", "inputs untouched", "relabelling", "identity"}
    expected |= {"selects"} if not reducer.mixes else set()
    expected |= {"absorbs duplicates"} if getattr(reducer, "absorbs_duplicates", False) else set()
    assert set(check_reducer(reducer)) == expected


@pytest.mark.parametrize("normalization", ["source", "target", "function"])
@pytest.mark.parametrize("marginal", ["uniform", "importance", "softmax", "radical"])
def test_other_hyper_parameters_of_the_fusion(normalization: str, marginal: str) -> None:
    check_reducer(IntraFusion(normalization, p=2.0, source_marginal=marginal, bias=False))


@pytest.mark.parametrize("name", RESTORERS)
def test_registered_restorer(name: str) -> None:
    expected = {"network untouched", "finite", "reference untouched", "inputs untouched", "deterministic", "lossless"}
    expected |= {"needs", "works somewhere"}
    restorer = Distill(steps=8) if name == "distill" else RESTORERS[name]()  # by default it takes minutes
    assert set(check_restorer(restorer)) - {"all or nothing"} == expected


def test_on_a_network_of_ones_own() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.last(self.norm(self.first(x)).relu()) * scale

    model = Mixer().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    call = {"x": torch.randn(30, 4), "scale": 2.0}
    assert "needs" in check_importance(IMPORTANCES["chip"], model=model, example_inputs=call, images=[call])
    assert "lossless" in check_restorer(RESTORERS["reestimate"](), model=model, example_inputs=call, images=call)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="example_inputs: expected what one call of the model takes"):
        check_importance(Magnitude(), model=model)


# ---- every law can be broken ----------------------------------------------------------------------------------------


class Refusal(IntrafusionError):
    pass


def refuses(*_: Any) -> Any:
    raise Refusal("not this one")


@dataclass(frozen=True)
class Score:
    """A criterion made of a function."""

    of: Callable[..., Any]
    needs: frozenset[str] = frozenset()

    def __call__(self, group: Any, weights: Any, observations: Any = None) -> Any:
        return self.of(group, weights, observations)


def l1(group: Any, weights: Any, observations: Any = None) -> Tensor:
    return Magnitude(folded=True)(group, weights)


def spoils_weights(group: Any, weights: Any, observations: Any) -> Tensor:
    scores = l1(group, weights)
    weights[group.members[0].tensor].mul_(2)
    return scores


def spoils_gradients(group: Any, weights: Any, observations: Any) -> Tensor:
    if observations is None:
        raise Refusal("give images=")
    next(iter(observations.gradients.values())).zero_()
    return l1(group, weights)


BROKEN_IMPORTANCE = {
    "too many": (
        lambda g, w, o: torch.ones(g.size + 1),
        "shape",
        r"expected 8 floating-point scores, got float32\[9\]",
    ),
    "a list": (lambda g, w, o: [1.0] * g.size, "shape", "expected 8 floating-point scores, got list"),
    "whole numbers": (lambda g, w, o: torch.ones(g.size, dtype=torch.long), "shape", r"got int64\[8\]"),
    "log": (lambda g, w, o: l1(g, w).log(), "finite", "all channels dead.*the score of channel 0 is -inf"),
    "divided": (
        lambda g, w, o: l1(g, w) / l1(g, w).max(),
        "finite",
        "all channels dead.*the score of channel 0 is nan",
    ),
    "draws": (
        lambda g, w, o: torch.rand(g.size),
        "deterministic",
        r"asked again: at \[0\]: expected 0\.\d+, got 0\.\d+",
    ),
    "writes": (spoils_weights, "inputs untouched", r"\['weights'\]\['stem.weight'\]"),
    "by index": (
        lambda g, w, o: torch.arange(g.size).float(),
        "relabelling",
        r"a network with batch norms, group 'stem': at \[0\]: expected \d, got 0",
    ),
    "refuses": (refuses, "works somewhere", "every group of every network was refused"),
}


@pytest.mark.parametrize("name", BROKEN_IMPORTANCE)
def test_broken_importance(name: str) -> None:
    function, law, detail = BROKEN_IMPORTANCE[name]
    with pytest.raises(LawError, match=rf"Score\(.*breaks the law '{law}'.*{detail}"):
        check_importance(Score(function))


def test_broken_needs_of_an_importance() -> None:
    with pytest.raises(LawError, match="'needs'.*without images, expected an error.*`images=`, got 'it answered'"):
        check_importance(Score(l1, frozenset({"gradients"})))
    with pytest.raises(LawError, match="'needs'.*unknown observation 'weather'"):
        check_importance(Score(l1, frozenset({"weather"})))
    with pytest.raises(LawError, match=r"'inputs untouched'.*\['observations'\]\.gradients\['stem.weight'\]"):
        check_importance(Score(spoils_gradients, frozenset({"gradients"})))


@dataclass(frozen=True)
class Reduce:
    """A reducer made of a function of a problem and of what plain pruning answers."""

    of: Callable[[ReductionProblem, ReductionMap], Any]
    mixes: Any = True
    absorbs_duplicates: bool = False

    def __call__(self, problem: ReductionProblem) -> Any:
        return self.of(problem, Select()(problem))


def first_channels(problem: ReductionProblem, _: ReductionMap) -> ReductionMap:
    return selection_map(torch.arange(problem.size), len(problem.importance))


def spoils_features(problem: ReductionProblem, answer: ReductionMap) -> ReductionMap:
    problem.features.zero_()
    return answer


BROKEN_REDUCERS = {
    "two tensors": (lambda p, s: (s.merge, s.unmerge), "shape", "expected a ReductionMap, got tuple"),
    "swapped": (
        lambda p, s: ReductionMap(s.unmerge, s.merge),
        "shape",
        r"8 random channels to 5: merge: expected float64\[5, 8\], got float64\[8, 5\]",
    ),
    "single precision": (lambda p, s: ReductionMap(s.merge.float(), s.unmerge), "shape", r"got float32\[5, 8\]"),
    "one over zero": (
        lambda p, s: ReductionMap(s.merge / p.features.norm(dim=1), s.unmerge),
        "finite",
        "every other channel is zero: merge holds 12 NaN or infinite entries",
    ),
    "draws": (
        lambda p, s: ReductionMap(s.merge + torch.rand(()), s.unmerge),
        "deterministic",
        r"merge, asked again: at \[0, 0\]: expected 0\.\d+, got 0\.\d+",
    ),
    "writes": (spoils_features, "inputs untouched", r"\.features: at \[0, 0\]: expected -?\d\.\d+, got 0"),
    "by index": (first_channels, "relabelling", r"8 random channels to 5, in the order \[.*\]"),
    "same twice": (
        lambda p, s: ReductionMap(s.merge[:1].expand(p.size, -1), s.unmerge) if p.size > 1 else s,
        "relabelling",
        "two new channels are the same one",
    ),
    "halves": (
        lambda p, s: ReductionMap(s.merge / 2, s.unmerge * 2),
        "identity",
        r"keeping 1 of 1 channels, merge: at \[0, 0\]: expected 1, got 0.5",
    ),
    "drops": (
        lambda p, s: ReductionMap(s.merge, 0.9 * s.unmerge),
        "identity",
        "keeping 1 of 1 channels, unmerge: .*expected 1, got 0.9",
    ),
}


@pytest.mark.parametrize("name", BROKEN_REDUCERS)
def test_broken_reducer(name: str) -> None:
    function, law, detail = BROKEN_REDUCERS[name]
    with pytest.raises(LawError, match=rf"Reduce\(.*breaks the law '{law}'.*{detail}"):
        check_reducer(Reduce(function))


def test_broken_claims_of_a_reducer() -> None:
    with pytest.raises(LawError, match="'shape'.*expected an attribute mixes, True or False"):
        check_reducer(Reduce(lambda p, s: s, mixes=None))
    with pytest.raises(LawError, match="'selects'.*expected one 1 in each row of merge, got"):
        check_reducer(Reduce(lambda p, s: ReductionMap(s.merge * 0.5, s.unmerge), mixes=False))
    with pytest.raises(LawError, match="'selects'"):
        check_reducer(Reduce(lambda p, s: ReductionMap(s.merge[:1].expand(p.size, -1), s.unmerge), mixes=False))
    with pytest.raises(LawError, match="'absorbs duplicates'.*4 channels, 2, 2, 2, 2 times, merged into 4: at"):
        check_reducer(Reduce(lambda p, s: s, absorbs_duplicates=True))
    # exact while every channel is there equally often, which is not enough
    with pytest.raises(LawError, match="'absorbs duplicates'.*4 channels, 1, 4, 2, 3 times, merged into 4: at"):
        check_reducer(Reduce(lambda p, s: IntraFusion("function")(p), absorbs_duplicates=True))


@dataclass(frozen=True)
class Restore:
    """A restorer made of a function."""

    of: Callable[[Any, nn.Module, Any], Any]
    needs_data: Any = False

    def __call__(self, compressed: Any, reference: nn.Module, graph: Any, images: Any) -> None:
        self.of(compressed, reference, images)


def on_weights(function: Callable[[Tensor], Any]) -> Callable[..., None]:
    def restore(compressed: Any, reference: nn.Module, images: Any) -> None:
        for parameter in compressed.model.parameters():
            function(parameter.data)

    return restore


def writes_and_fails(compressed: Any, reference: nn.Module, images: Any) -> None:
    on_weights(Tensor.zero_)(compressed, reference, images)
    with torch.no_grad():
        Inputs.of(images).call(reference)


def new_parameter(compressed: Any, reference: nn.Module, images: Any) -> None:
    compressed.model.head.bias = nn.Parameter(compressed.model.head.bias.detach().clone())


def spoils_images(compressed: Any, reference: nn.Module, images: Any) -> None:
    if images is not None:
        Inputs.of(images).tensors()[0].mul_(2)


def spoils_the_plan(compressed: Any, reference: nn.Module, images: Any) -> None:
    next(iter(compressed.plan.maps.values())).merge.zero_()


BROKEN_RESTORERS = {
    "no class attribute": (Restore(lambda *_: None, needs_data=None), "needs", "expected an attribute needs_data"),
    "does without": (Restore(lambda *_: None, needs_data=True), "needs", "asks for images, got None"),
    "fails at the end": (
        Restore(writes_and_fails, needs_data=True),
        "all or nothing",
        r"without images, after .*stem.weight: at \[0, 0, 0, 0\]: expected -?0\.\d+, got (-)?0\.",
    ),
    "fails on a shape": (
        Restore(lambda c, r, i: writes_and_fails(c, r, i) if i is not None else None),
        "all or nothing",
        "on images of a wrong shape, after",
    ),
    "mode": (
        Restore(lambda c, r, i: c.model.eval()),
        "network untouched",
        "expected _Example, training True.*got .*False",
    ),
    "flags": (Restore(lambda c, r, i: c.model.requires_grad_(True)), "network untouched", "requires_grad False.*got"),
    "precision": (Restore(lambda c, r, i: c.model.double()), "network untouched", r"expected float32\[4, 3, 3, 3\]"),
    "object": (Restore(new_parameter), "network untouched", "tensor head.bias: expected .* object"),
    "hook": (
        Restore(lambda c, r, i: c.model.head.register_forward_hook(lambda *_: None)),
        "network untouched",
        "module 'head': expected Linear, .*0 hooks, got Linear, .*1 hooks",
    ),
    "more": (
        Restore(lambda c, r, i: c.model.register_buffer("extra", torch.zeros(1))),
        "network untouched",
        "tensor extra: expected nothing",
    ),
    "NaN": (Restore(on_weights(lambda w: w.fill_(float("nan")))), "finite", "stem.weight holds 108 NaN"),
    "reference": (Restore(lambda c, r, i: r.train()), "reference untouched", "the original: its tensors, modes"),
    "weights of the reference": (
        Restore(lambda c, r, i: r.head.bias.data.zero_()),
        "reference untouched",
        "the original, head.bias: at",
    ),
    "plan": (Restore(spoils_the_plan), "reference untouched", "the plan has changed"),
    "images": (Restore(spoils_images), "inputs untouched", "images"),
    "draws": (
        Restore(on_weights(lambda w: w.add_(torch.randn(())))),
        "deterministic",
        r"stem.weight, done again: at \[0, 0, 0, 0\]: expected",
    ),
    "scales": (
        Restore(on_weights(lambda w: w.mul_(1.01))),
        "lossless",
        r"channels duplicated, exact duplicates merged: .* off by \d(\.\d)?e-1\d \(relative\), now by 0\.0\d",
    ),
    "refuses": (Restore(refuses), "works somewhere", "every network was refused"),
}


@pytest.mark.parametrize("name", BROKEN_RESTORERS)
def test_broken_restorer(name: str) -> None:
    restorer, law, detail = BROKEN_RESTORERS[name]
    with pytest.raises(LawError, match=rf"(?s)Restore\(.*breaks the law '{law}'.*{detail}"):
        check_restorer(restorer)


def laws_tried() -> Iterator[str]:
    for _, law, _ in BROKEN_IMPORTANCE.values():
        yield law
    for _, law, _ in BROKEN_REDUCERS.values():
        yield law
    for _, law, _ in BROKEN_RESTORERS.values():
        yield law
    yield from ("selects", "absorbs duplicates")


def test_no_law_is_left_untried() -> None:
    assert set(laws_tried()) == set(LAWS)
