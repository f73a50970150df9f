"""intrafusion experiment: on one's own network, on the digits, killed in the middle, and on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn

import intrafusion
from intrafusion.cli.data import read_test_images, read_training_images
from intrafusion.lab import zoo
from intrafusion.lab.bench import read_records
from intrafusion.measure.accuracy import accuracy

OWN = "--model nets.py:Net --input 2,4 --data images.safetensors"
Program = Callable[[str], Result]


@pytest.fixture
def images(user_folder: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        "test_images": torch.randn(40, 4, generator=generator),
        "test_labels": torch.randint(3, (40,), generator=generator),
        "train_images": torch.randn(60, 4, generator=generator),
        "train_labels": torch.randint(3, (60,), generator=generator),
    }
    save_file(made, user_folder / "images.safetensors")
    return made


def net() -> nn.Module:
    scope: dict[str, type[nn.Module]] = {}
    exec(Path("nets.py").read_text(), scope)
    return scope["Net"]()


def test_on_ones_own_network_the_records_are_what_the_library_gives(program: Program, images, monkeypatch) -> None:
    line = f"experiment whole-model {OWN} --keep 0.5 --importance l2 --test-images 30 -o out/r.jsonl"
    monkeypatch.setattr("sys.argv", ["intrafusion", *line.split()])
    result = program(line)
    assert result.exit_code == 0, result.stderr
    before, pruned, fused, ours = read_records(Path("out/r.jsonl"))
    labels, chosen = images["test_labels"][:30], images["test_images"][:30]
    assert before.result["accuracy"] == accuracy(net(), chosen, labels)
    for record, reducer in ((pruned, "select"), (fused, "intrafusion")):
        small = intrafusion.compress(net(), torch.randn(2, 4), 0.5, reducer=reducer, importance="l2", restore=None)
        assert record.result["accuracy"] == accuracy(small.model, chosen, labels)
        assert record.result["params"] == small.after.params
        assert record.setting["images"] == 30
        assert record.setting["network"] == "nets.py:Net"
    train = [(images["train_images"], images["train_labels"])]
    small = intrafusion.compress(net(), torch.randn(2, 4), 0.5, importance="l2", restore="images", images=train)
    assert ours.setting["method"] == "pivot+images"
    assert ours.result["accuracy"] == accuracy(small.model, chosen, labels)
    assert pruned.environment["command"] == f"intrafusion {line}"
    rows = [row.split() for row in result.stdout.splitlines()]
    percent = [f"{100 * r.result['accuracy']:.1f}" for r in (pruned, fused, ours)]
    gain = f"{100 * (fused.result['accuracy'] - pruned.result['accuracy']):+.1f}"
    shown = [part for number in percent for part in (number, "%")]
    assert ["whole", "network", "2", "groups", "50", "%", "l2", *shown, gain] in rows
    assert "ours (default)" in result.stdout
    assert "4 records in out/r.jsonl; as a page: intrafusion report out/r.jsonl" in result.stdout


def test_running_again_measures_only_what_is_new(program: Program, images) -> None:
    program(f"experiment whole-model {OWN} --keep 0.5 -o r.jsonl")
    first = Path("r.jsonl").read_text()
    result = program(f"experiment whole-model {OWN} --keep 0.5 --keep 0.7 -o r.jsonl --json")
    assert Path("r.jsonl").read_text().startswith(first)
    assert len(read_records(Path("r.jsonl"))) == 7
    shown = json.loads(result.stdout)["records"]
    assert [(r["setting"]["keep"], r["setting"]["method"]) for r in shown] == [
        (1.0, "original"),
        *((keep, method) for keep in (0.5, 0.7) for method in ("select", "intrafusion", "pivot+images")),
    ]


@pytest.mark.parametrize("name", ["data-free", "random-importance", "output-drift", "fine-tune"])
def test_every_experiment_runs_and_says_something(program: Program, images, name: str) -> None:
    few = "--tune-epochs 1 --batch-size 20" if name == "fine-tune" else "--group first"
    result = program(f"experiment {name} {OWN} --keep 0.5 {few} -o r.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "pruned" in result.stdout
    assert len(read_records(Path("r.jsonl"))) > 1


def test_landscape_and_marginals(program: Program, images) -> None:
    result = program(f"experiment landscape {OWN} --points 3 -o l.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "the report draws it" in result.stdout
    other = OWN.replace("nets.py:Net", "nets.py:Literal")
    line = f"experiment marginals {OWN} {other.partition('--input')[0]} --group first -o m.jsonl"
    result = program(line)
    assert result.exit_code == 0, result.stderr
    assert "Kruskal-Wallis over networks" in result.stdout
    assert {r.setting["network"] for r in read_records(Path("m.jsonl"))} == {"nets.py:Net", "nets.py:Literal"}


def test_by_default_digits_networks_are_trained(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def trained(*, seed: int) -> nn.Module:
        seeds.append(seed)
        return zoo.build("digits_resnet", seed=seed)

    monkeypatch.setattr(zoo, "train_digits", trained)
    result = program("experiment whole-model --keep 0.5 --test-images 20 -o r.jsonl --networks 2")
    assert result.exit_code == 0, result.stderr
    assert seeds == [0, 1]
    assert [r.setting["network"] for r in read_records(Path("r.jsonl"))] == ["digits_resnet"] * 4 + [
        "digits_resnet (seed 1)"
    ] * 4


def test_data_of_zoo_networks_are_normalised_for_them() -> None:
    test, train = (read("digits", "zoo:digits_resnet", 5) for read in (read_test_images, read_training_images))
    assert torch.equal(test.images, zoo.load_data("digits_resnet", "test", limit=5).images)
    assert train is not None
    assert torch.equal(train.images, zoo.load_data("digits_resnet", "train", limit=5).images)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("experiment whole-modl", "unknown experiment 'whole-modl'. Did you mean 'whole-model'"),
        ("experiment whole-model --model nets.py:Net --input 2,4", "no data are known for it; name some with --data"),
        (
            f"experiment whole-model {OWN} --points 3",
            "--points means nothing to whole-model, which uses --group, --importance",
        ),
        (f"experiment whole-model {OWN} --method selct", "unknown reducer 'selct'"),
        (f"experiment data-free {OWN} --group third", "unknown group 'third'"),
        (f"experiment whole-model {OWN} --keep 1.5", "expected fractions in (0, 1], got 1.5"),
        (f"experiment whole-model {OWN} -o .", "this is a folder"),
        (f"experiment marginals {OWN}", "two or more networks"),
        ("experiment whole-model --model nets.py:Net --input 2,4 --data none.safetensors", "there is none"),
        ("experiment whole-model --model nets.py:Net --input 2,4 --data bad.safetensors", "test_images"),
    ],
)
def test_bad_input_ends_with_2_and_no_records(program: Program, images, line: str, message: str) -> None:
    save_file({"images": torch.zeros(1)}, "bad.safetensors")
    result = program(line)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
    assert not list(Path().glob("*.jsonl"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_whole_command_killed_in_the_middle_goes_on_where_it_was(user_folder: Path, images) -> None:
    keeps = " ".join(f"--keep 0.{k}" for k in range(30, 90, 12))
    line = f"-m intrafusion experiment whole-model {OWN} {keeps} -o r.jsonl"
    process = subprocess.Popen([sys.executable, *line.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, deadline = Path("r.jsonl"), time.monotonic() + 120
    while len(read_records(path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    before = path.read_bytes()
    finished = {r.key for r in read_records(path)}
    assert 3 <= len(finished) < 16
    assert programs.run(line.split()).returncode == 0
    assert path.read_bytes().startswith(before)
    keys = [r.key for r in read_records(path)]
    assert len(keys) == len(set(keys)) == 16
    assert finished <= set(keys)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_on_ray_a_network_out_of_a_file_gives_the_same_records(program: Program, images, user_folder: Path) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'intrafusion[ray]'")
    line = f"experiment whole-model {OWN} --keep 0.5 --keep 0.7"
    assert program(f"{line} -o here.jsonl").exit_code == 0
    command = [sys.executable, "-m", "intrafusion", *line.split(), "-o", "there.jsonl", "--ray", "local"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    timed = {"compress_s"}
    content = [
        {r.key: {k: v for k, v in r.result.items() if k not in timed} for r in read_records(Path(name))}
        for name in ("here.jsonl", "there.jsonl")
    ]
    assert content[0] == content[1]
    assert len(content[1]) == 7
