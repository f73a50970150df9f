"""A sweep measures every setting once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from intrafusion.errors import IntrafusionError
from intrafusion.lab.bench import read_records, sweep
from intrafusion.lab.bench.claims import claims

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


def test_two_sweeps_on_one_file_share_the_work(tmp_path):
    path, log, settings = tmp_path / "r.jsonl", tmp_path / "log", [{"i": i} for i in range(8)]

    def run(setting):
        with log.open("a") as file:
            file.write(f"{setting['i']} {os.getpid()}\n")
        time.sleep(0.05)
        return setting

    both = []
    for _ in range(2):
        both.append(os.fork())
        if both[-1] == 0:
            os._exit(0 if [r.result for r in sweep("shared", settings, run, path)] == settings else 1)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in both] == [0, 0], "both return them all"
    ran = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(i) for i, _ in ran) == list(range(8)), "nothing is measured twice"
    assert {process for _, process in ran} == set(map(str, both)), "each has its part"
    assert sorted(os.listdir(tmp_path)) == ["log", "r.jsonl"]


def test_what_a_killed_sweep_left_is_removed_where_all_is_measured_already(tmp_path):
    path = tmp_path / "r.jsonl"
    sweep("squares", SETTINGS, Counting(), path)
    process = os.fork()
    if process == 0:
        with claims(path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert len(os.listdir(tmp_path)) == 2
    sweep("squares", SETTINGS, Counting(), path)
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_what_a_killed_sweep_had_claimed_is_taken_up_by_another_that_waits(tmp_path):
    path, started = tmp_path / "r.jsonl", tmp_path / "started"

    def stuck(setting):
        started.touch()
        time.sleep(600)
        return {}

    process = os.fork()
    if process == 0:
        sweep("squares", SETTINGS[:1], stuck, path)
        os._exit(1)
    while not started.exists():
        time.sleep(0.01)
    other = threading.Timer(0.3, os.kill, (process, signal.SIGKILL))
    run = Counting()
    other.start()
    assert [r.setting for r in sweep("squares", SETTINGS, run, path)] == SETTINGS
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert [keep for _, keep in run.asked] == [0.5, 0.9, 0.5, 0.9], "what was claimed came last"
    assert os.listdir(tmp_path).count("r.jsonl") == len(os.listdir(tmp_path)) - 1


def test_what_another_sweep_fails_at_is_tried_here(tmp_path):
    path, claimed, waiting = tmp_path / "r.jsonl", threading.Event(), threading.Event()

    def failing(setting):
        claimed.set()
        assert waiting.wait(60)
        raise IntrafusionError("mine alone")

    def good(setting):
        waiting.set()
        return {"ok": setting["keep"]}

    with ThreadPoolExecutor() as pool:
        bad = pool.submit(sweep, "x", SETTINGS[:1], failing, path)
        assert claimed.wait(60)
        assert [r.result for r in sweep("x", SETTINGS[:2], good, path)] == [{"ok": 0.9}, {"ok": 0.5}]
        with pytest.raises(IntrafusionError, match="1 of 1 settings failed.*mine alone"):
            bad.result(timeout=60)


@pytest.mark.parametrize("result", [{"tensor": object()}, 3, {"deep": {1: {2, 3}}}], ids=["object", "number", "set"])
def test_a_result_that_cannot_be_written_down_is_a_failure_of_its_setting(tmp_path, result):
    with pytest.raises(IntrafusionError, match="1 of 2 settings failed.*expected"):
        sweep("x", SETTINGS[:2], lambda s: result if s["keep"] == 0.9 else {"ok": 1}, tmp_path / "r.jsonl")
    assert [r.setting for r in read_records(tmp_path / "r.jsonl")] == SETTINGS[1:2]


def test_a_setting_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="x: a setting has values that JSON does not have"):
        sweep("x", [{"a": object()}], Counting(), tmp_path / "r.jsonl")


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
