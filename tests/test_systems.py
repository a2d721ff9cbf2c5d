"""The ledger of systems: what the code claims, tests prove."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hasten import tree

ROOT = Path(__file__).parents[1]
FIRST = {"ddim", "unipc", "dpm-solver-pp", "flow-matching", "cfg", "rectified-flow", "sd3", "w8a8", "fid"}


@pytest.fixture(scope="module")
def systems() -> ModuleType:
    spec = importlib.util.spec_from_file_location("systems", ROOT / "scripts" / "systems.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["systems"] = module  # a dataclass looks itself up
    spec.loader.exec_module(module)
    del sys.modules["systems"]
    return module


def test_no_claim_without_a_test_and_no_unknown_id(systems: ModuleType) -> None:
    assert systems.ledger().errors == []


def test_the_first_systems_are_proved(systems: ModuleType) -> None:
    assert set(systems.ledger().proved) >= FIRST


def test_it_prints_and_says_so_by_its_exit_code() -> None:
    done = subprocess.run([sys.executable, "scripts/systems.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ddim" in done.stdout
    assert "claimed without a test 0" in done.stdout


def test_it_reads_what_the_objects_say(systems: ModuleType) -> None:
    """The source is read, not run; what solvers and methods themselves tell is the same."""
    told = {i for s in tree.functions("solvers").values() for i in s.systems}  # type: ignore[attr-defined]
    told |= {i for m in tree.methods().values() for i in m.systems}
    assert told <= set(systems.ledger().claims)


CLAIMS = '''
systems = ("top",)
other: tuple[str, ...] = ("no",)
@solver(order=1, systems=("decorated", "too"))
def f(): systems = ("local",)
class M(Method):
    """systems = no"""
    systems: ClassVar = ("in-class",)
'''
PROOFS = """
import pytest
pytestmark = [pytest.mark.system("file"), pytest.mark.gpu]
@pytest.mark.system("one", "two")
def test_a(): pass
@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.system("param"))])
def test_b(x): '''pytest.mark.system("no")'''
"""


def test_it_finds_every_form_of_claim_and_proof(systems: ModuleType) -> None:
    assert set(systems.claimed(ast.parse(CLAIMS))) == {"top", "decorated", "too", "in-class"}
    assert set(systems.proved(ast.parse(PROOFS))) == {"file", "one", "two", "param"}


def test_errors_name_the_file_and_what_to_do(systems: ModuleType, tmp_path: Path) -> None:
    for folder in ("docs", "src", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "docs" / "systems.csv").write_text('"id","name","year"\n"a","A","2020"\n"b","B","2021"\n')
    (tmp_path / "src" / "x.py").write_text('systems = ("a", "nowhere")\n')
    (tmp_path / "tests" / "test_x.py").write_text('import pytest\npytestmark = pytest.mark.system("b", "typo")\n')
    book = systems.ledger(tmp_path)
    assert (book.proved, book.open) == (["b"], ["a"])
    assert book.errors == [
        "a: claimed by x.py, proved by no test: mark one with system('a')",
        "nowhere: claimed by x.py, proved by no test: mark one with system('nowhere')",
        "nowhere: in x.py, but not in docs/systems.csv",
        "typo: in test_x.py, but not in docs/systems.csv",
    ]
