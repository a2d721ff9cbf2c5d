"""The house rules that a machine can check: who imports whom, how long a file is, what carries a docstring."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "hasten"
ORDER: list[set[str]] = [
    {"atomic"}, {"labelled"}, {"format"},
    {"path"}, {"paths"}, {"grid"}, {"brownian"}, {"denoiser"}, {"moment"}, {"patch"},
    {"anatomy"}, {"method"}, {"halves"}, {"picture"}, {"places"}, {"tree"}, {"recipe"},
    {"kernels", "networks"},
    {"solvers", "grids", "guidance", "runtime", "cache", "tokens"}
    | {"attention", "quant", "prune", "adapters", "parallel"},
    {"objectives", "measure", "edit", "start", "bridge"},
    {"train"}, {"reference"}, {"fit"}, {"api"}, {"tune"}, {"cli", "serve"},
]  # fmt: skip
"""A room imports from rows above its own, and from itself. CONTRIBUTING.md has this line in words."""

RANK = {room: i for i, row in enumerate(ORDER) for room in row}
ONLY = {"diffusers": "bridge", "transformers": "bridge", "peft": "bridge", "triton": "kernels", "typer": "cli"}
"""The one room that may import a library."""

LONGEST = 350
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
FUNCTION_OR_CLASS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FILES = sorted(SRC.rglob("*.py"))


def room(file: Path) -> str:
    """The first part of a file's place: "cache" of cache/interval.py, "grid" of grid.py, "" of the package's front."""
    return file.relative_to(SRC).with_suffix("").parts[0].replace("__init__", "")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file; of `from a import b` it is a.b, relative or not."""
    package = ["hasten", *file.relative_to(SRC).parent.parts]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def by_place(file: Path) -> str:
    return str(file.relative_to(SRC))


@pytest.mark.parametrize("file", FILES, ids=by_place)
def test_imports_point_one_way(file: Path) -> None:
    here = room(file)
    assert not here or here in RANK, f"{here} has no place in the order: give it one here and in CONTRIBUTING.md"
    for line, name in imported(file):
        first, *rest = name.split(".")
        if first != "hasten" or not here:  # the package's front loads its parts when they are asked for
            continue
        there = rest[0]
        assert there in RANK, f"{by_place(file)}:{line} imports {name}: import from the file that defines it"
        assert there == here or RANK[there] < RANK[here], f"{by_place(file)}:{line}: {here} must not import {there}"


@pytest.mark.parametrize("file", FILES, ids=by_place)
def test_one_room_imports_a_heavy_library(file: Path) -> None:
    for line, name in imported(file):
        allowed = ONLY.get(name.split(".")[0], room(file))
        assert room(file) == allowed, f"{by_place(file)}:{line}: only {allowed} imports {name}"


def test_the_rule_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports inside functions, relative ones, and modules taken from the package count like any other."""
    monkeypatch.setattr(sys.modules[__name__], "SRC", tmp_path)
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / "x.py"
    file.write_text(
        "import hasten.api\nfrom hasten import tree\ndef f():\n    from ..quant import w8a8\n    from . import y\n"
    )
    names = [name for _, name in imported(file)]
    assert names == ["hasten.api", "hasten.tree", "hasten.quant.w8a8", "hasten.cache.y"]


@pytest.mark.parametrize("file", FILES, ids=by_place)
def test_a_file_is_short_and_says_what_it_does(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{by_place(file)} has {lines} lines: split it in two by what it does"
    assert not VAGUE & set(file.relative_to(SRC).with_suffix("").parts), f"{by_place(file)}: a name that says nothing"


@pytest.mark.parametrize("file", [f for f in FILES if f.stat().st_size], ids=by_place)
def test_docstrings(file: Path) -> None:
    """A file, its public functions and its public classes say what they are; an empty __init__.py has no need to."""
    assert ast.get_docstring(parsed(file)), f"{by_place(file)} has no docstring"
    public = [n for n in parsed(file).body if isinstance(n, FUNCTION_OR_CLASS) and not n.name.startswith("_")]
    missing = [f"{n.name} (line {n.lineno})" for n in public if not ast.get_docstring(n)]
    assert not missing, f"{by_place(file)}: no docstring: {', '.join(missing)}"


@pytest.mark.parametrize("module", ["hasten", "hasten.cli.main"])
def test_importing_the_front_does_not_load_torch(module: str) -> None:
    """--help and tab completion answer at once: torch takes seconds to load."""
    code = f"import sys, {module}; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
