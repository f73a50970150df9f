"""The program as a whole: version, help, exit codes, and as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import programs
from click.testing import Result

import intrafusion
from intrafusion.cli.main import app

Program = Callable[[str], Result]


def test_version(program: Program) -> None:
    assert program("--version").stdout == f"{intrafusion.__version__}\n"


def test_help_names_the_commands_and_the_exit_codes(program: Program) -> None:
    text = " ".join(program("--help").stdout.split())
    assert all(command in text for command in ("inspect", "compress", "demo"))
    for line in ("--help", "compress --help"):
        assert "3 done, but a group had to be rolled back" in " ".join(program(line).stdout.split())


def test_wrong_usage_ends_with_code_2(program: Program) -> None:
    for line in ("compres", "compress", "compress nets.py:Net --kep 0.5", "compress nets.py:Net --round-to x"):
        result = program(line)
        assert (result.exit_code, result.stdout) == (2, "")


def test_the_console_script_is_this_program() -> None:
    (script,) = entry_points(group="console_scripts", name="intrafusion")
    assert script.load() is app


def test_as_a_process(user_folder: Path) -> None:
    command = ["-m", "intrafusion", "compress", "nets.py:Net", "--input", "2,4"]
    colours = os.environ | {"FORCE_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *command, "-o", "small", "--json"], capture_output=True, text=True, env=colours, timeout=120
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["after"]["params"] < data["before"]["params"] == 115
    assert Path("small/model.safetensors").is_file()
    refused = programs.run([*command, "--keep", "2"], FORCE_COLOR="1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "expected a fraction in (0, 1], got 2.0" in refused.stderr
    assert "Traceback" not in refused.stderr
