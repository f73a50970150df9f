"""`intrafusion split-train` on digits: records, figure, networks, and going on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from intrafusion.lab.bench import read_records

Program = Callable[[str], Result]
QUICK = "split-train --train-images 192 --epochs 1 --tune-epochs 1"


def test_all_schedules_are_recorded_drawn_and_saved(program: Program, user_folder: Path) -> None:
    result = program(f"{QUICK} -o out")
    assert result.exit_code == 0, result.output
    records = read_records(user_folder / "out" / "records.jsonl")
    assert [r.setting["schedule"] for r in records] == ["fap", "paf", "whole"]
    assert all(0 <= r.result["accuracy"] <= 1 and r.result["params"] < r.result["params_before"] for r in records)
    assert (user_folder / "out" / "times.png").read_bytes().startswith(b"\x89PNG")
    for name in ("fap-2", "paf-2", "whole"):
        assert name in result.stdout
    state = {}
    exec(result.stdout.strip().splitlines()[-1], state)
    assert state["model"].conv1.out_channels == 8


def test_as_json_and_again(program: Program, user_folder: Path) -> None:
    line = f"{QUICK} --schedule whole --keep 0.75 -o out --json"
    first, again = (json.loads(program(line).stdout)["runs"][0] for _ in range(2))
    assert again["accuracy"] == first["accuracy"]
    assert [p["work_s"] for p in again["phases"] if "tune" in p["name"]] == [
        p["work_s"] for p in first["phases"] if "tune" in p["name"]
    ]


def test_bad_options_end_with_2(program: Program, user_folder: Path) -> None:
    (user_folder / "file").touch()
    for options, message in (
        ("--schedule fpa", "unknown schedule 'fpa'"),
        ("--folds 3", "an even number"),
        ("-o file", "this is a file"),
    ):
        result = program(f"{QUICK} {options}")
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert program("split-train no_such_network").exit_code == 2
