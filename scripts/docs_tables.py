"""Writes the pages that are tables: docs/methods.md from the file tree, docs/benchmarks.md from the kept results.

python scripts/docs_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hasten.cli.listing import everything

ROOT = Path(__file__).parents[1]
TITLES = {
    "solver": ("Solvers", "`solver: NAME`"),
    "grid": ("Grids", "`grid: NAME`, or `grid: {NAME: {setting: value}}`"),
    "guidance": ("Guidance", "What pipelines do by themselves, for use with `solve`"),
    "method": ("Methods", "`methods: [NAME: {setting: value}]`"),
    "objective": ("Objectives", "Losses to train with"),
    "metric": ("Metrics", "What reports tell"),
}
MADE = "<!-- made by scripts/docs_tables.py: edit that, or what it reads -->\n"


def methods() -> str:
    """Every solver, grid, guidance, method, objective and metric, as `hasten methods` lists them."""
    things, page = everything(), [MADE, "# Methods\n", "Made from the file tree; `hasten methods` prints the same.\n"]
    for kind, (title, how) in TITLES.items():
        rows = [t for t in things if t["kind"] == kind]
        if rows:
            page += [f"## {title}\n", f"{how}.\n", "| name | settings | declares | what it does, and its source |"]
            page += ["|---|---|---|---|", *map(row, rows), ""]
    return "\n".join(page)


def row(thing: dict[str, Any]) -> str:
    """One line of a table."""
    settings = "<br>".join(f"`{s['name']}` = {s['default']}{span(s['range'])}" for s in thing["settings"])
    claims = {"order": "order {}", "calls": "calls a step {}", "stage": "stage {}", "writes": "writes {}"}
    said = [form.format(told(thing[k])) for k, form in claims.items() if k in thing]
    cells = (f"`{thing['name']}`", settings, "<br>".join(said), thing["source"].replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"


def told(value: Any) -> str:
    """A list as words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def span(bounds: list[Any] | None) -> str:
    """A range: numbers between brackets, choices with "or"."""
    if not bounds:
        return ""
    numbers = len(bounds) == 2 and all(b is None or isinstance(b, int | float) for b in bounds)
    return f" in [{bounds[0]}, {bounds[1]}]" if numbers else f": {' or '.join(map(str, bounds))}"


def benchmarks() -> str:
    """A section a kept result: what the script says it measures, its numbers, and the machine."""
    page = [
        MADE,
        "# Benchmarks\n",
        "`make bench` runs them all. Every number here is read from `benchmarks/results/`.\n",
    ]
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        if file.stem.startswith(
            ("solvers-", "compatibility", "caches")
        ):  # thousands of rows, which pages of their own sum up
            continue
        script = ROOT / "benchmarks" / f"{file.stem}.py"
        about = script.read_text(encoding="utf-8").split('"""')[1] if script.exists() else f"{file.stem}\n"
        found = json.loads(file.read_text(encoding="utf-8"))
        first, *rest = about.strip().split("\n\n")
        page += [f"## {file.stem}\n", first, "", *(part + "\n" for part in rest if not part.startswith("    "))]
        page += [*sections(found), machine(found.get("machine", {})), ""]
    return "\n".join(page)


def sections(found: dict[str, Any]) -> list[str]:
    """Lists of results as tables, and other numbers as lines."""
    page: list[str] = []
    for key, value in found.items():
        if key == "machine":
            continue
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            flat = [flattened(v) for v in value]
            columns = list(dict.fromkeys(c for f in flat for c in f))
            page += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            page += [f"| {' | '.join(f.get(c, '') for c in columns)} |" for f in flat] + [""]
        elif isinstance(value, dict):
            page += [f"- {key.replace('_', ' ')}, {k}: {v}" for k, v in flattened(value).items()]
        else:
            page.append(f"- {key.replace('_', ' ')}: {number(value)}")
    return [*page, ""]


def flattened(value: dict[str, Any], before: str = "") -> dict[str, str]:
    """Nested numbers by the path to them; a spread as median (quartiles)."""
    flat: dict[str, str] = {}
    for key, v in value.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(v, dict) and {"median", "low", "high"} <= v.keys():
            flat[name] = f"{number(v['median'])} ({number(v['low'])} to {number(v['high'])})"
        elif isinstance(v, dict) and {"median", "p10", "p90"} <= v.keys():
            flat[name] = f"{number(v['median'])} ({number(v['p10'])} to {number(v['p90'])})"
        elif isinstance(v, dict):
            flat |= flattened(v, f"{name}: ")
        elif not (isinstance(v, list) and v and isinstance(v[0], dict)):  # single pairs: the file has them
            flat[name] = number(v)
    return flat


def number(value: Any) -> str:
    """Three digits of a float; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine(m: dict[str, Any]) -> str:
    """What it was measured on, in one line."""
    sets = m.get("instructions", m.get("instruction_sets", []))
    names = [k for k, there in sets.items() if there] if isinstance(sets, dict) else sets
    has = ", ".join(names) or "neither AMX nor VNNI"
    return f"*{m.get('cpu', 'unknown')}, {m.get('threads')} threads ({has}), torch {m.get('torch')}.*"


def main() -> None:
    """Writes both pages."""
    for name, text in (("methods.md", methods()), ("benchmarks.md", benchmarks())):
        (ROOT / "docs" / name).write_text(text.rstrip() + "\n", encoding="utf-8")
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
