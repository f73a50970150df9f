from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion import inspect
from intrafusion.importance import ObservationError, Taylor
from intrafusion.observe.observe import observe_for
from intrafusion.planning import fold_weights

X, LABELS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Softplus(), nn.Linear(5, 2))
    nn.init.uniform_(model[1].weight, 0.5, 2)
    return model.eval()


MODEL = network()
GRAPH = inspect(MODEL, X)
SEEN = observe_for(Taylor(), MODEL, GRAPH, GRAPH.reducible, [(X, LABELS)])["0"]


@torch.no_grad()
def loss_without(channel: int, step: float) -> Tensor:
    """The loss if everything that channel c sends on shrinks by `step`."""
    model = copy.deepcopy(MODEL).double()
    model[3].weight.data[:, channel] *= 1 - step
    return F.cross_entropy(model(X.double()), LABELS)


def test_the_joint_change_is_that_of_the_loss_to_first_order() -> None:
    h = 1e-5
    expected = [float(abs(loss_without(c, h) - loss_without(c, -h)) / (2 * h)) for c in range(5)]
    found = Taylor(multivariable=True, reduction="last", normalizer=None)(GRAPH["0"], {}, SEEN)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)


def test_the_default_sums_absolute_changes_over_the_members() -> None:
    twin = copy.deepcopy(MODEL)
    F.cross_entropy(twin(X), LABELS).backward()
    products = {name: (p * p.grad).detach().double() for name, p in twin.named_parameters()}  # type: ignore[operator]
    first, last = products["0.weight"].abs().sum(1), products["3.weight"].abs().sum(0)
    torch.testing.assert_close(Taylor(normalizer=None)(GRAPH["0"], {}, SEEN), (first + last) / 2)
    with_biases = Taylor(reduction="sum", normalizer=None, bias=True)(GRAPH["0"], {}, SEEN)
    torch.testing.assert_close(with_biases, first + last + products["0.bias"].abs() + products["1.bias"].abs())


def test_folding_norms_changes_nothing() -> None:
    """w dL/dw of the producer is the same for the network whose norm is folded away."""
    weights = fold_weights(MODEL, GRAPH, GRAPH.reducible)
    plain = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Softplus(), nn.Linear(5, 2)).eval()
    state = {k: weights[k].float() for k in ("0.weight", "3.weight")}
    plain.load_state_dict({**state, "0.bias": weights["1.bias"].float(), "3.bias": MODEL[3].bias.detach()})
    graph = inspect(plain, X)
    seen = observe_for(Taylor(), plain, graph, graph.reducible, [(X, LABELS)])["0"]
    torch.testing.assert_close(Taylor()(graph["0"], {}, seen), Taylor()(GRAPH["0"], {}, SEEN), rtol=1e-4, atol=1e-6)


class Singular(nn.Module):
    """The derivative of the square root at 0 is infinite, and 0 times it is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)
        nn.init.zeros_(self.first.weight.data[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).abs().sqrt())


@pytest.mark.parametrize("multivariable", [False, True])
def test_never_nan(multivariable: bool) -> None:
    model = Singular().eval()
    graph = inspect(model, X)
    seen = observe_for(Taylor(), model, graph, graph.reducible, X)["first"]
    assert not bool(torch.isfinite(seen.gradients["first.weight"]).all()), "the case is not the one it should be"  # type: ignore[index]
    scores = Taylor(multivariable)(graph["first"], {}, seen)
    assert bool(torch.isfinite(scores).all())
    assert int(scores.argmin()) == 1


def test_a_loss_that_no_weight_changes_gives_equal_finite_scores() -> None:
    model = network()
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    graph = inspect(network(), X)
    seen = observe_for(Taylor(), model, graph, graph.reducible, X)["0"]
    assert Taylor()(graph["0"], {}, seen).tolist() == [0.0] * 5


def test_without_images_it_names_itself_and_the_argument() -> None:
    with pytest.raises(ObservationError, match=r"importance Taylor\(multivariable=False.* on images.* pass images="):
        Taylor()(GRAPH["0"], {})
