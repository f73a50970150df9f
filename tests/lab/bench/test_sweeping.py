"""A sweep measures every setting once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from intrafusion.errors import IntrafusionError
from intrafusion.lab.bench import read_records, sweep

SETTINGS = [{"keep": keep, "group": group} for group in ("conv1", "conv2") for keep in (0.9, 0.5)]


class Counting:
    """Squares the keep and remembers what it was asked."""

    def __init__(self, failing: str | None = None) -> None:
        self.asked: list[tuple[str, float]] = []
        self.failing = failing

    def __call__(self, setting):
        self.asked.append((setting["group"], setting["keep"]))
        if setting["group"] == self.failing:
            raise IntrafusionError("no such group")
        return {"square": setting["keep"] ** 2}


def test_the_records_are_those_of_the_settings_in_their_order(tmp_path):
    records = sweep("squares", SETTINGS, Counting(), tmp_path / "made" / "r.jsonl", provenance={"command": "me"})
    assert [(r.experiment, r.setting, r.result) for r in records] == [
        ("squares", s, {"square": s["keep"] ** 2}) for s in SETTINGS
    ]
    assert records == read_records(tmp_path / "made" / "r.jsonl")
    assert all(r.environment["command"] == "me" and r.environment["versions"]["torch"] for r in records)


def test_what_was_measured_is_not_measured_again(tmp_path):
    path = tmp_path / "r.jsonl"
    first, second = Counting(), Counting()
    sweep("squares", SETTINGS[1:3], first, path)
    steps = []
    records = sweep("squares", SETTINGS, second, path, progress=lambda *step: steps.append(step))
    assert first.asked == [("conv1", 0.5), ("conv2", 0.9)]
    assert second.asked == [("conv1", 0.9), ("conv2", 0.5)]
    assert [r.setting for r in records] == SETTINGS
    assert len(read_records(path)) == 4
    assert steps == [("squares", 0, 2), ("squares", 1, 2), ("squares", 2, 2)]


def test_another_experiment_in_the_same_file_is_another_measurement(tmp_path):
    path = tmp_path / "r.jsonl"
    sweep("squares", SETTINGS[:1], Counting(), path)
    again = Counting()
    assert [r.experiment for r in sweep("cubes", SETTINGS[:1], again, path)] == ["cubes"]
    assert again.asked == [("conv1", 0.9)]


def test_a_setting_that_fails_stops_no_other_and_is_tried_again(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(IntrafusionError, match=r"2 of 4 settings failed.*'group': 'conv1'.*no such group"):
        sweep("squares", SETTINGS, Counting(failing="conv1"), path)
    assert [r.setting for r in read_records(path)] == SETTINGS[2:]
    again = Counting()
    assert len(sweep("squares", SETTINGS, again, path)) == 4
    assert again.asked == [("conv1", 0.9), ("conv1", 0.5)]


def test_a_setting_that_stands_twice_is_refused_before_anything_runs(tmp_path):
    run = Counting()
    with pytest.raises(ValueError, match="'conv1'.* stands twice"):
        sweep("squares", [*SETTINGS, dict(reversed(SETTINGS[0].items()))], run, tmp_path / "r.jsonl")
    assert run.asked == []


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    def run(setting):
        if setting["group"] == "conv2":
            raise KeyboardInterrupt
        return {"ok": True}

    with pytest.raises(KeyboardInterrupt):
        sweep("squares", SETTINGS, run, tmp_path / "r.jsonl")
    assert [r.setting for r in read_records(tmp_path / "r.jsonl")] == SETTINGS[:2]


KILLED = """
import sys, time
from pathlib import Path
from intrafusion.lab.bench import sweep

def run(setting):
    with open(sys.argv[2], "a") as log:
        log.write(f"{setting['i']}\\n")
    time.sleep(float(sys.argv[3]))
    return {"i": setting["i"]}

sweep("killed", [{"i": i} for i in range(6)], run, Path(sys.argv[1]))
"""


def test_a_process_killed_in_the_middle_goes_on_where_it_was(tmp_path):
    script, path, log = tmp_path / "script.py", tmp_path / "r.jsonl", tmp_path / "log"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(path), str(log)]
    process = subprocess.Popen([*command, "0.5"])
    deadline = time.monotonic() + 60
    while len(read_records(path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    finished = len(read_records(path))
    assert 2 <= finished < 6
    subprocess.run([*command, "0"], check=True)
    assert path.read_bytes().startswith(before)
    assert [json.loads(line)["result"]["i"] for line in path.read_text().splitlines()] == list(range(6))
    started = [int(line) for line in log.read_text().split()]
    assert [started.count(i) for i in range(finished)] == [1] * finished  # what was recorded did not run again
