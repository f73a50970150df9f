"""The line that loads a folder: run in another process, in another directory."""

from __future__ import annotations

from pathlib import Path

import programs
import pytest
import torch
from bare import compress
from torch import nn

NET = """
import torch
from torch import nn
from sizes import WIDTH
class Net(nn.Module):
    def __init__(self{argument}):
        super().__init__()
        self.a, self.b = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
    def forward(self, x):
        return self.b(self.a(x).relu())
class Outer:
    class Net(Net): pass
"""
WORK = """
import torch, intrafusion
if __name__ == "__main__":
    torch.manual_seed(0)
    small = intrafusion.compress({name}(), torch.randn(2, 4), 0.5, restore=None)
    small.save("made/net")
    print(small.loading_line("made/net"))
    print(small.model(torch.ones(1, 4)).tolist())
"""


WITHOUT_CLASS = "what is saved with program=True loads without it"


def run(code: str, folder: Path) -> list[str]:
    flag, _, rest = code.partition(" ")
    done = programs.run([flag, *([rest] if flag == "-c" else rest.split())], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check(command: str, work: Path, elsewhere: Path) -> str:
    line, expected = run(command, work)
    assert run(f"-c {line}; import torch; print(model(torch.ones(1, 4)).tolist())", elsewhere) == [expected]
    return line


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "work" / "sizes.py").write_text("WIDTH = 8")
    return tmp_path / "work"


@pytest.mark.parametrize("name", ["Net", "Outer.Net"])
def test_a_class_of_a_module_beside_the_script(work: Path, name: str) -> None:
    (work / "mynet.py").write_text(NET.format(argument=""))
    (work / "run.py").write_text(f"from mynet import Net, Outer\n{WORK.format(name=name)}")
    line = check("run.py", work, work.parent / "else")
    assert (
        f"from mynet import {name.partition('.')[0]}; model = intrafusion.load({str(work / 'made/net')!r}, {name})"
        in line
    )


@pytest.mark.parametrize("script", ["run.py", "my-run.py"])
def test_a_class_of_the_script_itself(work: Path, script: str) -> None:
    (work / script).write_text(NET.format(argument="") + WORK.format(name="Net"))
    check(script, work, work.parent / "else")


def test_a_class_of_a_package_that_is_run_as_a_module(work: Path) -> None:
    (work / "pack").mkdir()
    (work / "pack" / "__init__.py").touch()
    (work / "pack" / "sizes.py").write_text("WIDTH = 8")
    (work / "pack" / "net.py").write_text(
        NET.format(argument="").replace("from sizes", "from .sizes") + WORK.format(name="Net")
    )
    assert "from pack.net import Net" in check("-m pack.net", work, work.parent / "else")


def test_a_class_that_needs_arguments_is_left_to_be_filled_in(work: Path) -> None:
    for argument in (", width", ", width=9"):
        text = NET.format(argument=argument).replace("WIDTH", "width").replace("from sizes import width", "")
        (work / "mynet.py").write_text(text)
        (work / "run.py").write_text(f"from mynet import Net\n{WORK.format(name='(lambda: Net(8))')}")
        line, _ = run("run.py", work)
        assert line.endswith(f"lambda: Net(...))  # Net: put its arguments in place of ...; {WITHOUT_CLASS}")
        with_arguments = line.replace("Net(...)", "Net(8)")
        assert run(f"-c {with_arguments}", work.parent / "else") == [] == run(f"-c {with_arguments}", work)


def test_a_network_that_names_itself_needs_nothing(work: Path) -> None:
    from intrafusion.lab import zoo

    small = compress(zoo.build("digits_resnet"), torch.randn(2, 1, 8, 8), 0.5)
    small.save(work / "net")
    line = small.loading_line(work / "net")
    assert line == f"import intrafusion; model = intrafusion.load({str(work / 'net')!r})"
    code = f"-c {line}; import torch; print(model(torch.ones(1, 1, 8, 8)).tolist())"
    assert run(code, work.parent / "else") == [str(small.model(torch.ones(1, 1, 8, 8)).tolist())]


def test_a_class_that_nothing_imports(work: Path) -> None:
    class Local(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    small = compress(Local(), torch.randn(2, 4), 0.5)
    small.save(work / "net")
    line = small.loading_line(work / "net")
    assert "lambda: Local(...))  # " in line
    assert line.endswith(f": no import finds it, as it is of {__name__}: paste it; {WITHOUT_CLASS}")
    small.save(work / "net", program=True)
    line = small.loading_line(work / "net")
    code = f"-c {line}; import torch; print(model(torch.ones(1, 4)).tolist())"
    assert run(code, work.parent / "else") == [str(small.model(torch.ones(1, 4)).tolist())]


@pytest.mark.parametrize(
    ("name", "argument"), [("mynet.py:Net", ""), ("mynet:Outer.Net", ""), ("mynet.py:Net", "width=8")]
)
def test_the_line_of_the_command_line(work: Path, name: str, argument: str) -> None:
    (work / "mynet.py").write_text(NET.format(argument=", width=5" if argument else ""))
    options = f"--arg {argument} " if argument else ""
    command = f"compress {name} {options}--input 2,4 --restore none -o out"
    line = run(f"-m intrafusion {command}", work)[-1]
    assert run(f"-c {line}; import torch; print(tuple(model(torch.ones(3, 4)).shape))", work.parent / "else") == [
        "(3, 2)"
    ]
