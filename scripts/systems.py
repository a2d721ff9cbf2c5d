"""The ledger: which rows of docs/systems.csv are proved by a test, which a file claims, which are open.

    python scripts/systems.py [--open]

A file claims a system by `@solver(..., systems=("id",))`, by `systems: ClassVar = ("id",)` in a class, or by
`systems = ("id",)` at its top. A test proves one by `@pytest.mark.system("id")`, or `pytestmark` for a whole file.
Exits with 1 where a claim has no test, or an id is not in the catalogue. Nothing is imported: the source is read.
"""

from __future__ import annotations

import ast
import csv
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
Places = dict[str, list[str]]


@dataclass(frozen=True)
class Ledger:
    """Rows of the catalogue by id, and the files that claim and prove each id."""

    rows: dict[str, dict[str, str]]
    claims: Places
    proofs: Places

    @property
    def errors(self) -> list[str]:
        """One line a mistake."""
        unproved = [
            f"{i}: claimed by {', '.join(f)}, proved by no test: mark one with system({i!r})"
            for i, f in self.claims.items()
            if i not in self.proofs
        ]
        unknown = [
            f"{i}: in {', '.join([*self.claims.get(i, []), *self.proofs.get(i, [])])}, but not in docs/systems.csv"
            for i in sorted(self.claims.keys() | self.proofs.keys())
            if i not in self.rows
        ]
        return unproved + unknown

    @property
    def proved(self) -> list[str]:
        """Ids of the catalogue that have a test, in its order."""
        return [i for i in self.rows if i in self.proofs]

    @property
    def open(self) -> list[str]:
        """Ids of the catalogue that have none."""
        return [i for i in self.rows if i not in self.proofs]


def ledger(root: Path = ROOT) -> Ledger:
    """Reads the catalogue, `src` and `tests` of the project at `root`."""
    with open(root / "docs" / "systems.csv", encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    return Ledger(rows, places(root, "src", claimed), places(root, "tests", proved))


def places(root: Path, folder: str, found) -> Places:
    """Id -> files under `folder` in which `found` sees it."""
    where: Places = defaultdict(list)
    for file in sorted((root / folder).rglob("*.py")):
        for i in sorted(set(found(ast.parse(file.read_text(encoding="utf-8"))))):
            where[i].append(file.relative_to(root / folder).as_posix())
    return dict(where)


def claimed(tree: ast.Module) -> Iterator[str]:
    """Ids in `systems = ...` at the top or in a class, and in `systems=...` of a decorator."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            for line in node.body:
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                if any(isinstance(t, ast.Name) and t.id == "systems" for t in targets):
                    yield from words(getattr(line, "value", None))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call):
                    yield from (w for k in call.keywords if k.arg == "systems" for w in words(k.value))


def proved(tree: ast.Module) -> Iterator[str]:
    """Ids in every `pytest.mark.system(...)`, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.system":
            yield from (w for argument in node.args for w in words(argument))


def words(node: ast.AST | None) -> Iterator[str]:
    """The strings in an expression."""
    for part in ast.walk(node) if node is not None else ():
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def table(book: Ledger) -> Table:
    """Proved rows, with the files that implement and prove them."""
    shown = Table(title=f"{len(book.proved)} of {len(book.rows)} systems proved", title_justify="left")
    for name in ("system", "what it is", "implemented in", "proved in tests/"):
        shown.add_column(name, overflow="fold")
    for i in book.proved:
        row = book.rows[i]
        source = "\n".join(f.removeprefix("hasten/") for f in book.claims.get(i, ["(no file says so)"]))
        shown.add_row(i, row["name"].partition(":")[0], source, "\n".join(book.proofs[i]))
    return shown


def main(arguments: list[str]) -> int:
    """Prints the ledger; 1 where it has errors."""
    book, console = ledger(), Console()
    console.print(table(book))
    if "--open" in arguments:
        console.print("open:", ", ".join(book.open))
    console.print(f"proved {len(book.proved)}, claimed without a test {len(book.claims.keys() - book.proofs.keys())}, "
                  f"open {len(book.open)}")  # fmt: skip
    for line in book.errors:
        Console(stderr=True).print(f"error: {line}", highlight=False)
    return 1 if book.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
