"""Training split over data: the parts, the order of the steps, resuming, and a worker that is killed."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import IntrafusionError
from intrafusion.lab import zoo
from intrafusion.lab.experiments.split import MemberTask, SplitTraining, records_of, split_train, subsets
from intrafusion.lab.zoo import Images
from intrafusion.measure.accuracy import accuracy
from intrafusion.train import Training

SHORT = Training(epochs=2, batch_size=10, optimizer="sgd", lr=0.05, warmup=0.0, decay="constant")


def points(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Images(torch.randn(count, 4, generator=generator) + 3 * nn.functional.one_hot(labels, 4), labels)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
        return nn.Sequential(*layers).eval()


def schedule(name: str, **options) -> SplitTraining:
    return SplitTraining(name, train=SHORT, tune=SHORT, images=20, **options)


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folds", "members", "each"), [(2, 2, 1), (4, 6, 3), (6, 20, 10)])
def test_every_image_is_in_half_of_the_members(folds: int, members: int, each: int) -> None:
    found = subsets(60, folds, seed=3)
    assert len(found) == members
    assert {len(s) for s in found} == {30}
    assert Counter(torch.cat(found).tolist()) == dict.fromkeys(range(60), each)
    assert len({tuple(s.tolist()) for s in found}) == members
    assert all(torch.equal(a, b) for a, b in zip(found, subsets(60, folds, seed=3), strict=True))
    assert not torch.equal(found[0], subsets(60, folds, seed=4)[0])


def test_bad_schedules_say_so() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'pfa'"):
        SplitTraining("pfa")
    for folds in (3, 0):
        with pytest.raises(ValueError, match="an even number of at least 2"):
            SplitTraining(folds=folds)
    with pytest.raises(ValueError, match="at least one image for each of 4 parts"):
        subsets(3, 4)


# ---- schedules ------------------------------------------------------------------------------------------------------

STEPS = {
    "fap": [("train members", 2), ("fuse", 2), ("fine-tune", 1), ("compress", 1), ("fine-tune compressed", 1)],
    "paf": [("train members", 2), ("compress members", 2), ("fine-tune members", 2), ("fuse", 2), ("fine-tune", 1)],
    "whole": [("train", 1), ("compress", 1), ("fine-tune compressed", 1)],
}


@pytest.mark.parametrize("name", STEPS)
def test_the_steps_come_in_their_order_and_the_result_is_small(name: str, tmp_path: Path) -> None:
    how = schedule(name, keep=0.5)
    found = split_train(network, torch.randn(2, 4), points(60), points(30, 1), how)
    assert [(p.name, p.members) for p in found.phases] == STEPS[name]
    small = found.compressed.model
    assert (small[0].out_features, small[3].out_features) == (4, 3)
    assert (found.whole is None) == (name == "paf")
    for phase in found.phases:
        assert 0 < phase.longest_s <= phase.work_s
        assert phase.validation is not None
        assert 0 <= phase.validation <= 1
    assert found.phases[-1].validation == accuracy(small, *vars(points(30, 1)).values())
    found.compressed.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", network(9))
    assert all(torch.equal(t, loaded.state_dict()[k]) for k, t in small.state_dict().items())
    setting, result = records_of(found, how)
    assert setting["schedule"] == name
    assert result["work_s"] == pytest.approx(sum(p["work_s"] for p in result["phases"]))


def test_four_folds_train_six_members() -> None:
    found = split_train(network, torch.randn(2, 4), points(60), points(30, 1), schedule("fap", folds=4))
    assert found.phases[0].members == 6


def test_the_whole_network_is_tuned_as_long_as_the_others_in_all(tmp_path: Path) -> None:
    split_train(network, torch.randn(2, 4), points(60), points(30, 1), schedule("whole"), folder=tmp_path)
    content = torch.load(tmp_path / "fine-tune-compressed" / "member-0" / "checkpoint.pt", weights_only=True)
    assert len(content["epochs"]) == 2 * SHORT.epochs


def test_members_see_their_own_half_only() -> None:
    """The labels of the second half are shifted: its member learns those, and the other one never sees them."""
    data, checked, halves = points(200), points(30, 1), subsets(200, 2)
    data.labels[halves[1]] = (data.labels[halves[1]] + 1) % 3
    how = Training(epochs=10, batch_size=10, lr=0.01)
    for index, half in enumerate(halves):
        validation = Images(checked.images, (checked.labels + index) % 3)
        task = MemberTask([network(0), network(1)], data, validation, how, halves, None, 0)
        model = network(0)
        model.load_state_dict(task(index)[0])
        assert accuracy(model, data.images[half], data.labels[half]) > 0.9


def test_the_same_seed_gives_the_same_bytes_and_the_folder_is_resumed(tmp_path: Path) -> None:
    arguments = (network, torch.randn(2, 4), points(60), points(30, 1), schedule("paf"))
    first = split_train(*arguments, folder=tmp_path)
    for written in tmp_path.rglob("checkpoint.pt"):
        os.utime(written, (1, 1))
    again = split_train(*arguments, folder=tmp_path)
    other = split_train(*arguments)
    for found in (again, other):
        states = first.compressed.model.state_dict(), found.compressed.model.state_dict()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert {p.stat().st_mtime for p in tmp_path.rglob("checkpoint.pt")} == {1}, "no training was run again"
    assert [p.work_s for p in again.phases if "tune" in p.name] == [p.work_s for p in first.phases if "tune" in p.name]


# ---- on Ray ---------------------------------------------------------------------------------------------------------


def test_ray_gives_what_one_process_gives(one_core) -> None:
    arguments = (network, torch.randn(2, 4), points(60), points(30, 1), schedule("fap"))
    here, there = split_train(*arguments), split_train(*arguments, cluster=one_core)
    states = here.compressed.model.state_dict(), there.compressed.model.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_killed_worker_loses_at_most_one_epoch(one_core, tmp_path: Path) -> None:
    """Member 1 kills its worker in the middle of its third epoch; each epoch has three updates."""
    log, killed = tmp_path / "log", tmp_path / "killed"

    class Deadly(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.inner, self.number = network(seed), seed

        def forward(self, x: Tensor) -> Tensor:
            if self.training and len(x) == 10 and torch.is_grad_enabled():
                with log.open("a") as file:
                    file.write(f"{self.number}\n")
                if self.number == 1 and log.read_text().split().count("1") == 8 and not killed.exists():
                    killed.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return self.inner(x)

    longer = Training(epochs=4, batch_size=10, lr=0.01)
    how = SplitTraining("fap", train=longer, tune=Training(epochs=1, batch_size=20), images=20)
    arguments = (Deadly, torch.randn(2, 4), points(60), points(30, 1), how)
    found = split_train(*arguments, folder=tmp_path / "work", cluster=one_core)
    assert killed.exists()
    assert Counter(log.read_text().split()) == {"0": 12, "1": 8 + 12 - 6}
    here = split_train(*arguments)
    states = here.compressed.model.state_dict(), found.compressed.model.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), "and the result is the same"


def test_a_member_that_fails_is_named(one_core) -> None:
    broken = points(60)
    broken.images[:] = float("nan")
    with pytest.raises(IntrafusionError, match=r"train members: member \d failed: train: the loss is nan"):
        split_train(network, torch.randn(2, 4), broken, points(30, 1), schedule("fap"), cluster=one_core)


def test_digits_in_seconds() -> None:
    data, validation, test = (zoo.load_data("digits", split) for split in ("train", "validation", "test"))
    train = Training(epochs=6, batch_size=64, optimizer="sgd", lr=0.05, warmup=0.0, decay="halving")
    tune = Training(epochs=3, batch_size=64, optimizer="sgd", lr=0.01, warmup=0.0, decay="halving")
    how = SplitTraining("fap", 2, 0.7, train, tune)
    found = split_train(lambda s: zoo.build("digits_resnet", seed=s), zoo.example_input("digits_resnet"), data,
                        validation, how)  # fmt: skip
    assert found.whole is not None
    assert accuracy(found.whole, test.images, test.labels) > 0.95
    assert accuracy(found.compressed.model, test.images, test.labels) > 0.85
