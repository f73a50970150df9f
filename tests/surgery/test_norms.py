from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intrafusion.graph import FoldableNorm
from intrafusion.surgery.norms import fold_norms, unfold_norms

N = 6
FULL = FoldableNorm("w", 0, "b", "g", "beta", "mu", "v", eps=1e-3)
NO_BIAS = FoldableNorm("w", 0, None, "g", "beta", "mu", "v", eps=1e-3)
NO_AFFINE = FoldableNorm("w", 0, "b", None, None, "mu", "v", eps=1e-3)
BARE = FoldableNorm("w", 0, None, None, None, "mu", "v", eps=1e-3)
KINDS = {"full": FULL, "no producer bias": NO_BIAS, "no affine": NO_AFFINE, "no bias, no affine": BARE}


def random_weights(norm: FoldableNorm, seed: int = 0) -> dict[str, Tensor]:
    """A (N, 4, 3, 3) convolution and its norm; gamma has both signs."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    tensors = {"w": normal(N, 4, 3, 3), "b": normal(N), "g": normal(N), "beta": normal(N), "mu": normal(N)}
    tensors |= {"v": torch.rand(N, generator=draw) + 0.1, "other": normal(3), "steps": torch.tensor(7)}
    absent = {n for n, given in (("b", norm.producer_bias), ("g", norm.weight), ("beta", norm.bias)) if given is None}
    return {name: tensor for name, tensor in tensors.items() if name not in absent}


def run(weights: Mapping[str, Tensor], norm: FoldableNorm) -> Tensor:
    """What PyTorch computes with these tensors, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = F.conv2d(x, w["w"], w.get("b"))
    return F.batch_norm(y, w["mu"], w["v"], w.get("g"), w.get("beta"), eps=norm.eps)


def merged(folded: Mapping[str, Tensor], merge: Tensor) -> dict[str, Tensor]:
    """The folded tensors with every channel axis merged; scale and variance are left wrong, as nobody reads them."""
    out = dict(folded)
    for name in ("w", "b", "beta", "mu"):
        if name in folded:
            out[name] = torch.tensordot(merge, folded[name], dims=1)
    out["v"] = folded["v"][: len(merge)]
    if "g" in folded:
        out["g"] = folded["g"][: len(merge)]
    return out


@pytest.mark.parametrize("norm", KINDS.values(), ids=KINDS)
def test_a_folded_norm_computes_the_same(norm):
    weights = random_weights(norm)
    folded = fold_norms(weights, [norm])
    torch.testing.assert_close(run(folded, norm), run(weights, norm), rtol=1e-10, atol=1e-10)


def test_a_folded_norm_is_the_identity_plus_a_bias():
    weights = random_weights(FULL)
    folded = fold_norms(weights, [FULL])
    scale = weights["g"].double() / (weights["v"].double() + 1e-3).sqrt()
    torch.testing.assert_close(folded["beta"], (weights["b"] - weights["mu"].double()) * scale + weights["beta"])
    torch.testing.assert_close(folded["w"], weights["w"] * scale[:, None, None, None])
    assert folded["g"].tolist() == [1.0] * N
    assert folded["mu"].tolist() == [0.0] * N
    assert folded["b"].tolist() == [0.0] * N
    assert ((folded["v"] + 1e-3).sqrt() == 1.0).all()


def test_fold_copies_and_leaves_other_tensors_alone():
    weights = random_weights(FULL)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    folded = fold_norms(weights, [FULL])
    folded["other"].zero_()
    folded["steps"].zero_()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert fold_norms(weights, [])["steps"].dtype == torch.int64
    assert folded["other"].dtype == torch.float64


def test_fold_works_along_the_output_dimension_of_a_transposed_convolution():
    norm = FoldableNorm("w", 1, None, "g", "beta", "mu", "v", eps=1e-3)
    weights = random_weights(norm) | {"w": torch.randn(4, N, 2, 2, generator=torch.Generator().manual_seed(1))}
    folded = fold_norms(weights, [norm])
    x = torch.ones(1, 4, 3, 3, dtype=torch.float64)
    w = {name: tensor.double() for name, tensor in weights.items()}
    expected = F.batch_norm(F.conv_transpose2d(x, w["w"]), w["mu"], w["v"], w["g"], w["beta"], eps=1e-3)
    torch.testing.assert_close(F.conv_transpose2d(x, folded["w"]) + folded["beta"][:, None, None], expected)


@pytest.mark.parametrize("norm", KINDS.values(), ids=KINDS)
def test_nothing_reduced_gives_the_original_back_bit_by_bit(norm):
    weights = random_weights(norm)
    if norm.weight is not None:
        weights["g"][2] = 0.0  # the row cannot be recovered from the folded tensors
    final = unfold_norms(fold_norms(weights, [norm]), weights, [norm], {})
    assert all(torch.equal(final[name], weights[name].double()) for name in ("w", "mu", "v"))
    assert all(torch.equal(final[name], weights[name].double()) for name in ("b", "g", "beta") if name in weights)


@pytest.mark.parametrize("norm", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("as_matrix", [True, False])
def test_a_selection_gives_the_selected_entries_of_the_original(norm, as_matrix):
    weights = random_weights(norm)
    kept = [0, 3, 4]
    merge = torch.eye(N)[kept] if as_matrix else torch.tensor(kept)
    final = unfold_norms(
        merged(fold_norms(weights, [norm]), torch.eye(N).double()[kept]), weights, [norm], {"mu": merge}
    )
    for name in ("w", "b", "g", "beta", "mu", "v"):
        if name in weights:
            torch.testing.assert_close(final[name], weights[name].double()[kept], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("norm", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows_sum_to", [1.0, 2.5])
def test_unfolding_a_merge_keeps_the_function(norm, rows_sum_to):
    weights = random_weights(norm)
    merge = torch.rand(3, N, generator=torch.Generator().manual_seed(2)).double()
    merge *= rows_sum_to / merge.sum(1, keepdim=True)
    reduced = merged(fold_norms(weights, [norm]), merge)
    final = unfold_norms(reduced, weights, [norm], {"mu": merge})
    expected = torch.einsum("mn,bnhw->bmhw", merge, run(weights, norm))
    torch.testing.assert_close(run(final, norm), expected, rtol=1e-9, atol=1e-9)


def test_statistics_of_a_merge_are_averages_of_the_merged_channels():
    weights = random_weights(FULL)
    weights["g"] = weights["g"].abs()
    merge = torch.zeros(2, N).double()
    merge[0, :2], merge[1, 2:] = 1.5, 0.5
    final = unfold_norms(merged(fold_norms(weights, [FULL]), merge), weights, [FULL], {"mu": merge})
    sigma = (weights["v"].double() + 1e-3).sqrt()
    for name, values in (
        ("g", weights["g"].double()),
        ("beta", weights["beta"].double()),
        ("b", weights["b"].double()),
    ):
        torch.testing.assert_close(final[name], torch.stack([values[:2].mean(), values[2:].mean()]))
    torch.testing.assert_close(final["v"], torch.stack([sigma[:2].mean(), sigma[2:].mean()]) ** 2 - 1e-3)


def test_a_merge_with_negative_entries_weighs_by_their_size():
    weights = random_weights(FULL)
    merge = torch.zeros(1, N).double()
    merge[0, :2] = torch.tensor([1.5, -0.5])
    final = unfold_norms(merged(fold_norms(weights, [FULL]), merge), weights, [FULL], {"mu": merge})
    sigma = (weights["v"].double() + 1e-3).sqrt()
    torch.testing.assert_close(final["v"], (0.75 * sigma[:1] + 0.25 * sigma[1:2]) ** 2 - 1e-3)
    expected = torch.einsum("mn,bnhw->bmhw", merge, run(weights, FULL))
    torch.testing.assert_close(run(final, FULL), expected, rtol=1e-9, atol=1e-9)


def test_gammas_that_cancel_are_replaced_by_their_magnitude():
    weights = random_weights(FULL)
    weights["g"][:2] = torch.tensor([0.7, -0.7])
    merge = torch.zeros(1, N).double()
    merge[0, :2] = 0.5
    final = unfold_norms(merged(fold_norms(weights, [FULL]), merge), weights, [FULL], {"mu": merge})
    torch.testing.assert_close(final["g"], torch.tensor([0.7], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(run(final, FULL), run(weights, FULL)[:, :2].mean(1, keepdim=True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("merge", [torch.eye(N)[[1, 2]], torch.zeros(2, N)], ids=["selected", "empty rows"])
def test_a_channel_without_scale_stays_constant_and_finite(merge):
    weights = random_weights(FULL)
    weights["g"][:] = 0.0
    merge = merge.double()
    final = unfold_norms(merged(fold_norms(weights, [FULL]), merge), weights, [FULL], {"mu": merge})
    assert all(bool(torch.isfinite(tensor).all()) for tensor in final.values())
    assert final["g"].tolist() == [1.0, 1.0]
    expected = torch.einsum("mn,bnhw->bmhw", merge, run(weights, FULL))
    torch.testing.assert_close(run(final, FULL), expected, rtol=1e-12, atol=1e-12)


def test_a_tiny_variance_survives_the_round_trip():
    weights = random_weights(FULL) | {"v": torch.zeros(N)}
    final = unfold_norms(
        merged(fold_norms(weights, [FULL]), torch.eye(N).double()[:2]), weights, [FULL], {"mu": torch.eye(N)[:2]}
    )
    assert (final["v"] >= 0).all()
    assert (final["v"] < 1e-15).all()


def test_a_changed_row_under_an_unchanged_width_keeps_its_statistics():
    """The producer only lost input channels: the norm goes back to its own statistics."""
    weights = random_weights(FULL)
    reduced = fold_norms(weights, [FULL])
    reduced["w"] = reduced["w"][:, :2]
    final = unfold_norms(reduced, weights, [FULL], {})
    torch.testing.assert_close(final["w"], weights["w"][:, :2].double(), rtol=1e-13, atol=1e-13)
    for name in ("g", "beta", "mu", "v"):
        torch.testing.assert_close(final[name], weights[name].double(), rtol=1e-12, atol=1e-12)


def test_a_shift_added_to_the_folded_bias_moves_the_mean():
    weights = random_weights(FULL)
    reduced = fold_norms(weights, [FULL])
    reduced["b"] = reduced["b"] + 0.25
    final = unfold_norms(reduced, weights, [FULL], {})
    torch.testing.assert_close(run(final, FULL), run(weights, FULL) + 0.25, rtol=1e-10, atol=1e-10)
