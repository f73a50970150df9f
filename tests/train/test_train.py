"""The loop: its update by hand, resumed like uninterrupted, what is trained and what stays, objectives and masks."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion import IntrafusionError, ModelError
from intrafusion.errors import FolderError
from intrafusion.factorize import Smooth
from intrafusion.lab import zoo
from intrafusion.lab.zoo import Images
from intrafusion.lab.zoo.networks import BasicBlock, ResNet
from intrafusion.measure.accuracy import accuracy
from intrafusion.train import (
    Block,
    Distillation,
    Labels,
    Training,
    adapt,
    apply_masks_,
    load_masks,
    masks_of,
    merges_of,
    reconstruct_,
    save_masks,
    train_,
)
from intrafusion.train.masks import contribution, wanda


def blobs(count: int = 40, seed: int = 0) -> Images:
    """Three classes of points, apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Images(torch.randn(count, 4, generator=generator) + 3 * F.one_hot(labels, 4), labels)


def points() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def image_network() -> ResNet:
    return ResNet(BasicBlock, [1, 1], [4, 6], channels=1, num_classes=3)


def pictures(count: int = 24) -> Images:
    labels = torch.arange(count) % 3
    return Images(torch.randn(count, 1, 6, 6) + labels[:, None, None, None], labels)


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the update -----------------------------------------------------------------------------------------------------


def test_two_updates_are_those_of_sgd_by_hand() -> None:
    data, model = blobs(6), nn.Linear(4, 3, bias=False)
    weight, velocity = model.weight.detach().clone(), torch.zeros(3, 4)
    how = Training(epochs=2, batch_size=6, optimizer="sgd", lr=0.1, warmup=0.0, decay="linear")
    history = train_(model, data, how)
    losses = []
    for step in range(2):
        scores = data.images @ weight.T
        losses.append(float(F.cross_entropy(scores, data.labels)))
        gradient = (scores.softmax(1) - F.one_hot(data.labels, 3)).T @ data.images / 6
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (1 - step / 2) * velocity
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-4, atol=1e-6)
    assert [e.loss for e in history.epochs] == pytest.approx(losses, rel=1e-5)
    assert (history.steps, history.trained, history.best) == (2, 12, 1)


def test_the_rate_rises_over_a_tenth_and_falls_to_zero() -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted)
        train_(nn.Linear(4, 3), blobs(40), Training(epochs=5, batch_size=10, lr=1.0, warmup=0.2))
    rise, fall = [0.25, 0.5, 0.75, 1.0], [1 - k / 16 for k in range(16)]
    assert rates == pytest.approx(rise + fall)


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_the_first_update_of_other_optimizers_is_the_one_by_hand(optimizer: str) -> None:
    data, model = blobs(6), nn.Linear(4, 3, bias=False)
    weight = model.weight.detach().clone()
    gradient = ((data.images @ weight.T).softmax(1) - F.one_hot(data.labels, 3)).T @ data.images / 6
    gradient = gradient if optimizer == "adam" else gradient + 0.5 * weight  # adam: the sign alone counts
    how = Training(epochs=1, optimizer=optimizer, lr=0.01, weight_decay=0.0 if optimizer == "adam" else 0.5, warmup=0.0)
    train_(model, data, how)
    step = 1.9 * gradient if optimizer == "nesterov" else gradient.sign()
    torch.testing.assert_close(model.weight.detach(), weight - 0.01 * step, rtol=1e-4, atol=1e-6)


def test_gradients_from_before_do_not_count() -> None:
    start, found = points(), []
    for touched in (False, True):
        model = copy.deepcopy(start)
        if touched:
            model(torch.randn(5, 4)).square().sum().backward()
            model.load_state_dict(start.state_dict())  # the statistics of its batch norm
        train_(model, blobs(), Training(epochs=1, batch_size=20, optimizer="sgd", lr=0.1))
        assert all(p.grad is None for p in model.parameters())
        found.append(state(model))
    assert same(found[0], found[1])


def test_the_rate_halves() -> None:
    how = Training(epochs=5, batch_size=4, lr=0.1, warmup=0.0, decay="halving", halve_every=2)
    history = train_(nn.Linear(4, 3), blobs(8), how)
    assert [e.lr for e in history.epochs] == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_in_evaluation_mode_nothing_is_dropped_and_norms_keep_their_statistics() -> None:
    model, modes = points(), list[bool]()
    model[3].register_forward_hook(lambda module, args, output: modes.append(module.training))
    before = state(model)
    train_(model, blobs(), Training(epochs=2, batch_size=20, evaluating=True))
    assert modes == [False] * 4
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert model.training


def test_in_evaluation_mode_norms_may_follow_the_batches() -> None:
    """Dropout does not."""
    model, modes = points(), list[tuple[bool, ...]]()
    model.register_forward_hook(lambda module, args, output: modes.append(tuple(m.training for m in module)))
    before = state(model)
    train_(model, blobs(), Training(epochs=1, batch_size=20, evaluating=True, norms=True))
    assert modes == [tuple(isinstance(m, nn.BatchNorm1d) for m in model)] * 2
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert model.training


def test_the_rate_falls_with_the_time_where_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("intrafusion.train.loop.time.perf_counter", lambda: clock[0])

    def pass_second(images: Tensor, generator: torch.Generator) -> Tensor:
        clock[0] += 1.0
        return images

    how = Training(epochs=100, batch_size=40, warmup=0.0, lr=1.0, seconds=20.0)
    history = train_(nn.Linear(4, 3), blobs(40), how, augment=pass_second)
    assert history.steps == 20
    rates = [epoch.lr for epoch in history.epochs]
    assert rates[:9] == pytest.approx([1 - k / 100 for k in range(9)])  # the first do not tell how long they take
    assert rates[11:] == pytest.approx([1 - 5 * (k + 1) / 100 for k in range(11, 20)], abs=0.051)
    assert rates[-1] < 0.06
    slow = train_(nn.Linear(4, 3), blobs(40), replace(how, seconds=1000.0), augment=pass_second)
    assert slow.steps == 100


def test_a_function_of_the_network_may_judge_it() -> None:
    model, seen = nn.Linear(4, 3), list[Tensor]()

    def judge(network: nn.Module) -> float:
        seen.append(network.weight.detach().clone())
        return [0.1, 0.7, 0.3][len(seen) - 1]

    history = train_(model, blobs(), Training(epochs=3, batch_size=20, lr=0.1), validation=judge)
    assert [epoch.validation for epoch in history.epochs] == [0.1, 0.7, 0.3]
    assert history.best == 1
    assert torch.equal(model.weight, seen[1])


def seen_in(how: Training, count: int) -> list[list[int]]:
    """The numbers of the images in each batch."""
    batches: list[list[int]] = []
    images = torch.arange(count).float()[:, None].expand(count, 4)

    def note(images: Tensor, generator: torch.Generator) -> Tensor:
        batches.append(images[:, 0].int().tolist())
        return images

    train_(nn.Linear(4, 3), Images(images, torch.zeros(count, dtype=torch.long)), how, augment=note)
    return batches


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"),
    [(8, True, [3, 3]), (8, False, [3, 3, 2]), (7, False, [3, 3]), (1, False, [1]), (2, True, [2])],
)
def test_what_does_not_fill_a_batch(count: int, drop_last: bool, sizes: list[int]) -> None:
    how = Training(epochs=2, batch_size=3, lr=1e-3, drop_last=drop_last)
    assert [len(batch) for batch in seen_in(how, count)] == 2 * sizes


def test_orders_of_one_stream_and_of_a_seed_for_each_epoch() -> None:
    draw = lambda generator: torch.randperm(6, generator=generator).tolist()  # noqa: E731
    stream = torch.Generator().manual_seed(4)
    how = Training(epochs=3, batch_size=6, lr=1e-3, seed=4, shuffle="stream")
    assert seen_in(how, 6) == [draw(stream) for _ in range(3)]
    apart = [torch.Generator().manual_seed(4 * 1_000_003 + epoch) for epoch in range(3)]
    assert seen_in(replace(how, shuffle="epoch"), 6) == [draw(generator) for generator in apart]


@pytest.mark.parametrize(("decay", "last"), [("cosine", 0.5 * (1 + np.cos(0.75 * np.pi))), ("constant", 1.0)])
def test_other_decays(decay: str, last: float) -> None:
    history = train_(nn.Linear(4, 3), blobs(8), Training(epochs=4, batch_size=8, lr=1e-3, warmup=0, decay=decay))
    assert history.epochs[-1].lr == pytest.approx(1e-3 * last)


def test_accumulated_parts_make_the_same_update() -> None:
    start = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data, found = blobs(30), []
    for accumulate in (1, 4):
        model = copy.deepcopy(start)
        train_(model, data, Training(epochs=2, batch_size=15, lr=0.01, accumulate=accumulate))
        found.append(state(model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)


def test_half_precision_computes_in_it_and_keeps_the_weights_in_float32() -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'intrafusion[train]'")
    model, seen = points(), []
    model[0].register_forward_hook(lambda m, a, output: seen.append(output.dtype))
    train_(model, blobs(), Training(epochs=1, batch_size=20, precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_penalty_counts() -> None:
    found = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        train_(model, blobs(), Training(epochs=100, batch_size=40, lr=0.01), penalty=Smooth(nuclear=weight))
        found.append(float(torch.linalg.matrix_norm(model.weight.detach(), "nuc")))
    assert found[1] < 0.5 * found[0]


# ---- seeds, checkpoints, early stop ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_leaves_random_numbers_and_modes_alone() -> None:
    start, found = points(), []
    start[1].eval()
    for seed in (1, 1, 2):
        torch.rand(1)
        model, before = copy.deepcopy(start), torch.get_rng_state()
        train_(model, blobs(), Training(epochs=2, batch_size=16, seed=seed, trainable="full+lora"))
        assert torch.equal(before, torch.get_rng_state())
        assert [m.training for m in model.modules()] == [m.training for m in start.modules()]
        found.append(state(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "options", [{}, {"trainable": "norms+lora"}, {"shuffle": "stream", "drop_last": False, "decay": "halving"}]
)
def test_a_killed_training_resumes_to_the_same_bytes(options: dict, tmp_path: Path) -> None:
    start, how = points(), Training(epochs=5, batch_size=10, **options)
    whole, killed = copy.deepcopy(start), copy.deepcopy(start)
    expected = train_(whole, blobs(), how, validation=blobs(12, seed=1))

    def kill(index: int, epoch) -> None:
        if index == 2:
            raise Killed

    with pytest.raises(Killed):
        train_(killed, blobs(), how, validation=blobs(12, seed=1), folder=tmp_path, on_epoch=kill)
    resumed, seen = copy.deepcopy(start), []
    history = train_(
        resumed, blobs(), how, validation=blobs(12, seed=1), folder=tmp_path, on_epoch=lambda i, e: seen.append(i)
    )
    assert seen == [3, 4]
    assert same(state(resumed), state(whole))
    assert [e.loss for e in history.epochs] == [e.loss for e in expected.epochs]


def test_a_finished_training_is_not_run_again(tmp_path: Path) -> None:
    start, how = points(), Training(epochs=2, batch_size=10)
    first, again = copy.deepcopy(start), copy.deepcopy(start)
    train_(first, blobs(), how, folder=tmp_path)
    train_(again, blobs(), how, folder=tmp_path, on_epoch=lambda i, e: pytest.fail("it was run again"))
    assert same(state(first), state(again))


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    train_(points(), blobs(), Training(epochs=1), folder=tmp_path)
    with pytest.raises(FolderError, match="other data or options"):
        train_(points(), blobs(), Training(epochs=2), folder=tmp_path)
    with pytest.raises(FolderError, match="another network"):
        train_(nn.Linear(4, 3), blobs(), Training(epochs=1), folder=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(FolderError, match="damaged"):
        train_(points(), blobs(), Training(epochs=1), folder=tmp_path)


def altered(folder: Path, **changes) -> None:
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**content, **changes}, folder / "checkpoint.pt")


def test_a_checkpoint_without_later_options_means_their_defaults(tmp_path: Path) -> None:
    how = Training(epochs=2)
    train_(points(), blobs(), how, folder=tmp_path)
    later = ("halve_every", "drop_last", "shuffle")
    altered(tmp_path, how={name: value for name, value in asdict(how).items() if name not in later})
    train_(points(), blobs(), how, folder=tmp_path, on_epoch=lambda i, e: pytest.fail("it was run again"))
    with pytest.raises(FolderError, match="other data or options"):
        train_(points(), blobs(), replace(how, drop_last=False), folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimizer": {}}, "damaged"),
        ({"epochs": 3}, "damaged"),
        ({"how": {"epochs": -1}}, "damaged"),
        ({"best_weights": {"0.weight": torch.zeros(1)}}, "another network"),
    ],
)
def test_a_damaged_checkpoint_changes_nothing(changes: dict, match: str, tmp_path: Path) -> None:
    train_(points(), blobs(), Training(epochs=1), folder=tmp_path)
    altered(tmp_path, **changes)
    model = points()
    before = state(model)
    with pytest.raises(FolderError, match=match):
        train_(model, blobs(), Training(epochs=1), folder=tmp_path)
    assert same(state(model), before)


def test_it_stops_early_and_keeps_the_best_weights() -> None:
    """A learning rate that destroys what was learnt."""
    model, checked = points(), blobs(30, seed=1)
    train_(model, blobs(), Training(epochs=20, batch_size=10, lr=0.02))
    good = accuracy(model, checked.images, checked.labels)
    how = Training(epochs=50, batch_size=10, optimizer="sgd", lr=0.5, weight_decay=1.0, warmup=0.9, patience=3)
    history = train_(model, blobs(), how, validation=checked)
    values = [e.validation for e in history.epochs]
    assert len(values) == history.best + 4 < 50
    assert max(v for v in values if v is not None) == values[history.best]
    assert accuracy(model, checked.images, checked.labels) == values[history.best]
    assert good > 0.8


def test_steps_end_in_the_middle_of_an_epoch() -> None:
    assert train_(points(), blobs(), Training(epochs=9, steps=5, batch_size=10)).steps == 5


# ---- what is trained ------------------------------------------------------------------------------------------------


CHANGED = {
    "biases": {"bn1.bias", "layer1.0.bn1.bias", "fc.bias"},
    "norms": {"bn1.weight", "bn1.bias", "layer1.0.bn2.weight"},
    "head": {"fc.weight", "fc.bias"},
    "lora": {"conv1.weight", "layer1.0.conv1.weight", "fc.weight", "layer2.0.downsample.0.weight"},
    "head+norms": {"fc.weight", "bn1.weight"},
}
UNCHANGED = {
    "biases": {"conv1.weight", "fc.weight", "bn1.weight"},
    "norms": {"conv1.weight", "fc.weight", "fc.bias"},
    "head": {"conv1.weight", "bn1.weight", "bn1.bias"},
    "lora": {"fc.bias", "bn1.weight", "bn1.bias"},
    "head+norms": {"conv1.weight", "layer1.0.conv1.weight"},
}


@pytest.mark.parametrize("kind", CHANGED)
def test_only_what_was_asked_for_is_trained(kind: str) -> None:
    model = image_network()
    before, shapes = state(model), dict(model.named_parameters())
    model.conv1.weight.requires_grad_(False)
    history = train_(model, pictures(), Training(epochs=1, batch_size=8, lr=0.01, trainable=kind, rank=2))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert {n for n in CHANGED[kind] if torch.equal(before[n], after[n])} == set()
    assert {n for n in UNCHANGED[kind] if not torch.equal(before[n], after[n])} == set()
    assert all(shapes[n] is p for n, p in model.named_parameters()), "parameters keep their identity"
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad
    if kind == "head":
        assert history.trained == 6 * 3 + 3
    if kind == "biases":
        assert history.trained == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))


def test_what_is_frozen_stays_and_what_is_not_is_trained() -> None:
    model = image_network()
    model.conv1.weight.requires_grad_(False)
    before = state(model)
    train_(model, pictures(), Training(epochs=1, batch_size=8, lr=0.01, trainable="unfrozen"))
    changed = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert changed == {name for name, _ in model.named_parameters()} - {"conv1.weight"}
    assert not model.conv1.weight.requires_grad


def test_a_low_rank_change_has_its_rank_and_counts() -> None:
    model = nn.Conv2d(5, 9, 3, bias=False)
    before = model.weight.detach().clone()
    wrapped = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3))
    images = torch.randn(12, 5, 5, 5)
    how = Training(epochs=3, batch_size=6, lr=0.05, trainable="lora", rank=2)
    history = train_(wrapped, Images(images, torch.arange(12) % 3), how)
    change = (model.weight.detach() - before).flatten(1)
    assert torch.linalg.matrix_rank(change, tol=1e-5) == 2
    assert history.trained == 2 * (9 + 45) + 2 * (3 + 9)
    assert type(model) is nn.Conv2d


def test_the_low_rank_change_is_alpha_over_rank_times_the_product() -> None:
    layer = nn.Linear(4, 3, bias=False)
    weight = layer.weight.detach().clone()
    with adapt(layer_in(layer), "lora", rank=2, alpha=6.0) as (a, b):
        with torch.no_grad():
            b.copy_(torch.randn(3, 2))
        expected = weight + 3.0 * b.detach() @ a.detach()
    torch.testing.assert_close(layer.weight.detach(), expected)


def layer_in(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


def test_nothing_to_train_and_unknown_kinds_say_so() -> None:
    with pytest.raises(ModelError, match="has no parameters of the kind norms to train"):
        train_(nn.Linear(4, 3), blobs(), Training(trainable="norms"))
    with pytest.raises(ValueError, match="unknown kind of parameters 'biasses'.*'biases'"):
        Training(trainable="biasses")


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "lora", "lora+biases"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "contribution"])
def test_what_is_masked_stays_zero_while_the_rest_is_trained(trainable: str, criterion: str) -> None:
    model, data = image_network(), pictures()
    masks = masks_of(model, 0.6, criterion, data.images)
    apply_masks_(model, masks)
    before = state(model)
    train_(model, data, Training(epochs=1, batch_size=8, lr=0.01, trainable=trainable, rank=3), masks=masks)
    for name, mask in masks.items():
        after = model.state_dict()[name]
        assert not after[~mask].any()
        assert (after[mask] != before[name][mask]).float().mean() > 0.6  # channels that are always off do not move
        assert abs((~mask).float().mean() - 0.6) < 0.12


def test_magnitude_drops_the_smallest_entries_of_each_layer() -> None:
    model = points()
    mask = masks_of(model, 0.25)["0.weight"]
    kept = np.sort(np.abs(model[0].weight.detach().numpy()).ravel())[8:]
    np.testing.assert_array_equal(np.sort(model[0].weight.detach().abs()[mask].numpy()), kept)


def test_wanda_and_contribution_by_hand() -> None:
    weight, read = np.random.default_rng(0).normal(size=(3, 5)), np.random.default_rng(1).normal(size=(7, 5))
    expected = np.abs(weight) * np.sqrt((read**2).sum(0))
    np.testing.assert_allclose(wanda(torch.from_numpy(weight), torch.from_numpy(read)), expected)
    shares = np.zeros((3, 5))
    for x in read:
        for i in range(3):
            shares[i] += np.abs(weight[i] * x) / np.abs(weight[i] * x).sum() / len(read)
    found = contribution(torch.from_numpy(weight), torch.from_numpy(read))
    np.testing.assert_allclose(found, shares)
    np.testing.assert_allclose(found.sum(1), 1)
    assert torch.isfinite(contribution(torch.zeros(2, 3), torch.zeros(4, 3))).all()


def test_wanda_sees_what_the_layer_reads() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), torch.randn(50, 3)
    model[1].weight.data = torch.tensor([[1.0, 1.0, 1.1], [1.0, 2.0, 3.0]])
    data[:, 2] *= 0.01
    assert masks_of(model, 0.34, "wanda", data)["1.weight"][0].tolist() == [True, True, False]
    assert masks_of(model, 0.34)["1.weight"][0].tolist() != [True, True, False]


def test_layers_that_pad_by_themselves_are_not_masked_by_what_they_read() -> None:
    class SamePad(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))

    model = nn.Sequential(SamePad(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert set(masks_of(model, 0.5, "wanda", torch.randn(8, 3, 8, 8))) == {"2.weight"}


def test_masks_are_stored_and_checked(tmp_path: Path) -> None:
    model = points()
    masks = masks_of(model, 0.5)
    save_masks(masks, tmp_path / "masks.safetensors")
    assert same(load_masks(tmp_path / "masks.safetensors"), masks)
    with pytest.raises(ModelError, match=r"'7\.weight'"):
        apply_masks_(model, {"7.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ModelError, match="pass unlabelled images"):
        masks_of(model, 0.5, "wanda")
    with pytest.raises(ValueError, match="unknown criterion"):
        masks_of(model, 0.5, "luck")
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        masks_of(model, 1.0)
    with pytest.raises(ModelError, match="the network has a weight"):
        train_(model, blobs(), masks={"0.weight": torch.ones(2, 2, dtype=torch.bool)})


# ---- objectives -----------------------------------------------------------------------------------------------------


def test_distillation_is_the_divergence_and_zero_for_the_teacher_itself() -> None:
    teacher, model, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    loss = Distillation(teacher, 2.0)(model, x, None).detach()
    p, q = (F.softmax(m(x).detach() / 2, 1).numpy() for m in (teacher, model))
    assert float(loss) == pytest.approx(4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert float(Distillation(teacher)(teacher, x, None).detach()) == pytest.approx(0, abs=1e-6)


def test_distillation_needs_no_labels_and_brings_the_network_near_the_teacher() -> None:
    teacher, model, data = points(), points(), blobs(60)
    train_(teacher, data, Training(epochs=40, batch_size=20, lr=0.02))
    before = state(teacher)
    wrong = Images(data.images, torch.zeros(60, dtype=torch.long))
    train_(model, wrong, Training(epochs=60, batch_size=20, lr=0.02), objective=Distillation(teacher))
    agree = teacher.eval()(data.images).argmax(1) == model.eval()(data.images).argmax(1)
    assert agree.float().mean() > 0.9
    assert same(before, state(teacher))


def test_block_by_block_reconstruction_restores_a_damaged_network() -> None:
    reference, data = image_network().eval(), pictures(96)
    train_(reference, data, Training(epochs=5, batch_size=16))
    model, images = copy.deepcopy(reference), data.images
    with torch.no_grad():
        for module in model.layer2.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.add_(torch.randn_like(module.weight) * module.weight.std())
    error = lambda: float(F.mse_loss(model(images), reference(images)).detach())  # noqa: E731
    before, untouched = error(), state(model.layer1)
    found = reconstruct_(model, reference, images, ["layer2"], Training(epochs=20, batch_size=32, lr=1e-2))
    assert error() < 0.3 * before
    assert found["layer2"].epochs[-1].loss < 0.3 * found["layer2"].epochs[0].loss
    assert same(untouched, state(model.layer1)), "the prefix is left alone, its statistics included"


def test_a_block_with_fewer_channels_needs_the_merge() -> None:
    import intrafusion

    model, images = image_network().eval(), pictures().images
    graph = intrafusion.inspect(model, images)
    plan = intrafusion.decide(model, graph, intrafusion.Recipe.of(keep=0.5, reducer="select"))
    small = intrafusion.apply(model, plan, images, graph=graph)
    with pytest.raises(ModelError, match="pass the merge"):
        Block(model, "layer1.0")(small.model, images, None)
    merges = merges_of(graph, small.plan, ["layer1.0", "layer2"])
    assert {name: tuple(m.shape) for name, m in merges.items()} == {"layer1.0": (2, 4), "layer2": (3, 6)}
    kept = merges["layer1.0"].argmax(1)
    wanted, found = ({}, {})
    for network, into in ((model, wanted), (small.model, found)):
        handle = network.layer1.register_forward_hook(lambda m, a, y, into=into: into.update(y=y.detach()))
        network(images)
        handle.remove()
    loss = Block(model, "layer1.0", merges["layer1.0"])(small.model, images, None).detach()
    torch.testing.assert_close(loss, F.mse_loss(found["y"], wanted["y"][:, kept]))


def test_smoothed_labels() -> None:
    model, data = nn.Linear(4, 3), blobs(9)
    torch.testing.assert_close(
        Labels(0.1)(model, data.images, data.labels),
        F.cross_entropy(model(data.images), data.labels, label_smoothing=0.1),
    )
    with pytest.raises(ModelError, match="needs labels"):
        Labels()(model, data.images, None)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of at least 1"),
        ({"optimizer": "sgdd"}, "unknown optimizer 'sgdd'"),
        ({"decay": "steep"}, "unknown decay"),
        ({"precision": "int8"}, "precision: expected 'no' or 'bf16' or 'fp16'"),
        ({"warmup": 1.0}, "warmup"),
        ({"patience": 0}, "patience: expected a whole number of at least 1"),
        ({"halve_every": 0}, "halve_every: expected a whole number of at least 1, got 0"),
        ({"shuffle": "streams"}, "shuffle: expected 'epoch' or 'stream', got 'streams'"),
    ],
)
def test_bad_options_say_so(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        Training(**options)


def test_patience_needs_validation_and_images_are_needed() -> None:
    with pytest.raises(ValueError, match="needs validation images"):
        train_(points(), blobs(), Training(patience=2))
    with pytest.raises(ValueError, match="got 0 images"):
        train_(points(), Images(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))


def test_a_loss_of_nan_ends_with_the_rate() -> None:
    model = nn.Linear(4, 3)
    model.weight.data.fill_(float("nan"))
    with pytest.raises(IntrafusionError, match=r"lower lr \(now 0.001\)"):
        train_(model, blobs())


def test_digits_are_learnt_from_the_head_alone_and_by_low_rank() -> None:
    data, test = zoo.load_data("digits", "train"), zoo.load_data("digits", "test")
    found = {}
    for kind in ("head", "biases+norms+head+lora"):
        model = zoo.build("digits_resnet")
        train_(model, data, Training(epochs=4, batch_size=64, lr=0.01, trainable=kind, rank=8))
        found[kind] = accuracy(model, test.images, test.labels)
    assert found["head"] > 0.5
    assert found["biases+norms+head+lora"] > 0.95
