"""Where results go is checked before the work, and what is interrupted says what is left."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn

from intrafusion import pipeline
from intrafusion.cli import demo, experiment, split_train
from intrafusion.cli.outputs import check_space
from intrafusion.errors import FolderError
from intrafusion.lab import experiments, zoo

Program = Callable[[str], Result]
OWN = "nets.py:Net --input 2,4"
WRITERS = {
    "compress": f"compress {OWN} -o",
    "compress, images": f"compress {OWN} --keep-images",
    "frontier": f"frontier {OWN} -o",
    "frontier, picture": f"frontier {OWN} --picture",
    "fuse": f"fuse nets.py:Net {OWN} -o",
    "split-train": "split-train -o",
    "experiment": "experiment whole-model -o",
    "report": "report r.jsonl -o",
    "demo": "demo -o",
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("the work was begun")

    monkeypatch.setattr(pipeline, "inspect", fail)
    monkeypatch.setattr(zoo, "train_digits", fail)
    monkeypatch.setattr(split_train, "split_train", fail)
    monkeypatch.setattr(experiments, "run_experiment", fail)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("path", "message"),
    [("/proc/x/y", "cannot be written"), ("nets.py/inside", "cannot be written"), ("é" * 200, "choose a shorter name")],
)
def test_what_cannot_be_written_is_told_before_the_work(
    name: str, path: str, message: str, program: Program, no_work: None
) -> None:
    result = program(f"{WRITERS[name]} {path}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"compress {OWN} -o mine", "mine: exists and was not written by intrafusion"),
        (f"compress {OWN} --keep-images mine", "expected the name of a file, but this is a folder"),
        ("experiment whole-model -o mine/thesis.txt", "mine/thesis.txt: exists and holds no records"),
        ("report r.jsonl -o mine/thesis.txt", "mine/thesis.txt: exists and is no report of intrafusion"),
        ("split-train -o mine/thesis.txt", "expected a folder, but this is a file"),
        ("demo -o mine/thesis.txt", "expected a folder, but this is a file"),
    ],
)
def test_what_is_the_users_is_not_written_over(line: str, message: str, program: Program, no_work: None) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    result = program(line)
    assert result.exit_code == 2
    assert message in result.stderr
    assert Path("mine/thesis.txt").read_text() == "mine"


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1000, 500)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(FolderError, match="expected room for 2 MB, got 1 MB free on this disk; free some space"):
        check_space(tmp_path / "new" / "folder", model)
    check_space(tmp_path, nn.Linear(10, 10))


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (f"inspect {OWN}", "nothing is ever written; the same command starts again"),
        (f"compress {OWN} -o small", "nothing was written; the same command starts again"),
        ("split-train -o out", "checkpoints and records are in out; the same command goes on from there"),
        (
            "experiment whole-model -o r.jsonl",
            "what was measured, if anything, is in r.jsonl; the same command goes on",
        ),
        ("demo -o out", "no table was written to out, perhaps the network restored-50; the same command starts again"),
    ],
)
def test_an_interrupted_command_says_what_is_left(
    line: str, kept: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "inspect", interrupt)
    monkeypatch.setattr(split_train, "split_train", interrupt)
    monkeypatch.setattr(experiment.experiments, "run_experiment", interrupt)
    monkeypatch.setattr(zoo, "train_digits", lambda **_: zoo.build("digits_resnet"))
    monkeypatch.setattr(demo, "run", interrupt)
    result = program(line)
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"interrupted: {kept}" in result.stderr
    assert not Path("small").exists()


def test_without_a_terminal_every_stage_is_a_line(user_folder: Path) -> None:
    """In a process of its own: what others left of the console in this one does not count."""
    run = programs.run(["-m", "intrafusion", *f"compress {OWN} --restore noise".split()], user_folder)
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    stages = [line for line in lines if line.startswith("compress: ")]
    assert stages[0] == "compress: tracing the network"
    assert len(set(stages)) > 2
    assert all(a != b for a, b in itertools.pairwise(stages))


def test_a_long_stage_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from intrafusion.cli import console

    times = iter([0.0, 5.0, 40.0, 41.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setattr(console, "messages", console.make_console(stderr=True, force_terminal=False))
    with console.progress_bar("work") as progress:
        for stage, done in (("one", 0), ("one", 1), ("one", 2), ("two", 0)):
            progress(stage, done, 3)
    assert capsys.readouterr().err.splitlines() == ["work: one", "work: one 2/3", "work: two"]


@pytest.mark.parametrize("name", ["images.safetensors", "images.npy"])
def test_imaginary_parts_of_images_are_not_lost(name: str, program: Program, user_folder: Path) -> None:
    images = torch.randn(40, 4, dtype=torch.complex64)
    if name.endswith("npy"):
        import numpy as np

        np.save(name, images.numpy())
    else:
        save_file({"images": images}, name)
    result = program(f"compress {OWN} --images {name}")
    assert result.exit_code == 2
    assert f"--images {name}: expected real images, as the example input is, got torch.complex64" in result.stderr
