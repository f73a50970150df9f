"""Dependencies point one way, and importing the library pulls in nothing that only some of its users need."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "intrafusion"
CONTRIBUTING = PACKAGE.parents[1] / "CONTRIBUTING.md"

# Lowest first. A part may import from its own layer and from those above it in this table, without a cycle.
LAYERS = (
    {
        *("errors", "arguments", "documents", "registry", "asked", "progress", "names", "table", "brief", "graph"),
        "transport",
    },
    {"network", "reduce", "selectors"},
    {"importance", "trace"},
    {"recipe", "surgery"},
    {"plan", "measure"},
    {"io", "observe"},
    {"compressed", "train"},
    {"restore"},
    {"budget"},
    {"planning", "smallest", "inspection", "application"},
    {"choice", "heads", "in_turn", "ranks"},
    {"pipeline"},
    {"checks", "frontiers", "fusion", "factorize", "iterate", "large", "merge"},
    {"", "lab"},  # "" is the package itself: its public names
    {"cli"},
)

# Third-party packages and the only places that may import them.
CONFINED = {
    "accelerate": ("train/accelerator.py", "large/offload.py"),
    "ot": "transport/solve.py",
    "typer": "cli/",
    "rich": ("cli/", "progress.py"),
    "ray": "lab/bench/cluster.py",
}


@functools.cache
def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, also inside its functions."""
    return list(read_imports(path))


def read_imports(path: Path) -> Iterator[str]:
    package = ("intrafusion", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


@functools.cache
def part(dotted: str) -> str:
    """The part of the package that a name lies in: a top-level module or folder, or "" for a public name."""
    name = [*dotted.split("."), ""][1]
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else ""


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def own_part(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return {"__init__": "", "__main__": "cli"}.get(name, name)


def edges() -> Iterator[tuple[Path, str, str]]:
    """(file, part it lies in, part it imports) of every import between two parts."""
    for path in files():
        for dotted in imports(path):
            if dotted.partition(".")[0] == "intrafusion" and part(dotted) != own_part(path):
                yield path, own_part(path), part(dotted)


def rank(name: str) -> int:
    return next((index for index, layer in enumerate(LAYERS) if name in layer), -1)


def test_every_part_has_a_layer() -> None:
    parts = {own_part(path) for path in files()}
    assert len(parts) > 5, "the package was not found"
    assert {name for name in parts if rank(name) < 0} == set(), "give these a layer in the table of this test"


def test_the_layout_in_the_documents_is_this_one() -> None:
    rows = [line.split("|")[1] for line in CONTRIBUTING.read_text().splitlines() if line.startswith("| `")]
    documented = [name.strip("`/ ") for row in rows for name in row.split(",")]
    assert sorted(documented, key=rank) == documented
    assert set(documented) == set().union(*LAYERS) - {""}


def test_imports_point_to_the_same_or_a_lower_layer() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {to or 'the package'}"
        for path, own, to in edges()
        if rank(to) > rank(own)
    ]
    assert upward == []


def test_parts_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for _, own, to in edges():
        graph.setdefault(own, set()).add(to)
    check_acyclic(graph)


def test_files_form_no_cycle() -> None:
    """Also imports inside functions, and those that only a type checker follows, count."""
    names = {file_name(path): path for path in files()}
    graph = {
        name: {to for dotted in imports(path) if (to := imported_file(dotted, names)) not in (None, name)}
        for name, path in names.items()
    }
    check_acyclic(graph)


def file_name(path: Path) -> str:
    return ".".join(["intrafusion", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def imported_file(dotted: str, names: Container[str]) -> str | None:
    """The file that an imported name lies in: the name itself is a module, or the one before its last dot is."""
    return next((name for name in (dotted, dotted.rpartition(".")[0]) if name in names), None)


def check_acyclic(graph: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_library_never_imports_the_laboratory() -> None:
    users = {own for _, own, to in edges() if to == "lab"}
    assert users <= {"cli"}


@pytest.mark.parametrize("package", CONFINED)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    users = [
        str(path.relative_to(PACKAGE)) for path in files() if package in {d.partition(".")[0] for d in imports(path)}
    ]
    assert [user for user in users if not user.startswith(CONFINED[package])] == []


def test_importing_the_library_imports_no_command_line_plotting_or_cluster_library() -> None:
    code = "import sys, intrafusion, intrafusion.reduce, intrafusion.transport; "
    code += "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "intrafusion" in loaded
    assert {"typer", "rich", "matplotlib", "plotly", "ray", "sklearn", "PIL", "ot"}.intersection(loaded) == set()
