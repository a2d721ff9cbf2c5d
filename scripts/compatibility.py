"""Tries every method on every pipeline family, and every two methods together, and keeps what happened.

    python scripts/compatibility.py          writes benchmarks/results/compatibility.json, and goes on where it was
    python scripts/compatibility.py page     docs/compatibility.md from it

The families are tiny random pipelines (tests/families*.py): what is patched, exact and restored does not depend on the
weights. `runtime.compile` is tried on two families, at a minute each; pairs on the families named in PAIRS_ON.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from compatible import METHODS, alone, together  # noqa: E402
from families_more import MORE  # noqa: E402
from hasten.atomic import write_text_atomically  # noqa: E402
from pipelines import PIPELINES  # noqa: E402

KEPT = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
FAMILIES = {f.name: f for f in (*PIPELINES, *MORE)}
COMPILED = ("sd", "flux")
PAIRS_ON = ("sd", "sd3", "flux", "wan")


def main() -> None:
    """Tries what is not kept yet."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"alone": {}, "together": {}}
    warnings.simplefilter("ignore")
    one = [(m, f) for m in METHODS for f in FAMILIES if m != "runtime.compile" or f in COMPILED]
    for m, f in track([c for c in one if f"{c[0]} {c[1]}" not in kept["alone"]], "methods x families"):
        kept["alone"][f"{m} {f}"] = tried(lambda m=m, f=f: alone(m, FAMILIES[f]))
        write(kept)
    labels = [m for m in METHODS if m != "runtime.compile"]
    two = [(a, b, f) for i, b in enumerate(labels) for a in labels[:i] for f in PAIRS_ON]
    for a, b, f in track([c for c in two if " ".join(c) not in kept["together"]], "pairs"):
        kept["together"][f"{a} {b} {f}"] = tried(lambda a=a, b=b, f=f: together(a, b, FAMILIES[f]))
        write(kept)
    page()


def tried(what: Any) -> dict[str, Any]:
    """What it found, or the error that it should not have raised."""
    try:
        return dict(what())
    except Exception as error:  # told in the table, where a reader looks
        return {"fails": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}


def write(kept: dict[str, Any]) -> None:
    """A line a cell."""
    parts = [
        f'"{name}": {{\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in cells.items()) + "\n}"
        for name, cells in kept.items()
    ]
    write_text_atomically(KEPT, "{" + ",\n".join(parts) + "}\n")


def page() -> None:
    """The two tables."""
    kept = json.loads(KEPT.read_text())
    lines = [
        "<!-- made by scripts/compatibility.py -->",
        "# Compatibility\n",
        "Every method on a tiny random pipeline of every family, found by trying (`make compatibility`). A number is "
        "how many places were patched, at settings at which the method acts; **=** says that its neutral setting gave "
        "the very sample of the untouched pipeline. Everything was taken back bit for bit, or the cell says otherwise. "
        "*no*: refused, with the reason below.\n",
        f"| | {' | '.join(FAMILIES)} |",
        "|---|" + "---|" * len(FAMILIES),
    ]
    reasons: dict[str, list[str]] = {}
    for m in METHODS:
        cells = []
        for f in FAMILIES:
            found = kept["alone"].get(f"{m} {f}", {})
            if "refused" in found:
                reasons.setdefault(f"`{m}`: {found['refused']}", []).append(f)
            cells.append(cell(found))
        lines.append(f"| `{m}` | {' | '.join(cells)} |")
    lines += ["\n## Why it was refused\n", *(f"- {why} ({', '.join(on)})" for why, on in reasons.items())]
    labels = [m for m in METHODS if m != "runtime.compile"]
    lines += [
        "\n## Two together\n",
        f"Tried on {', '.join(PAIRS_ON)}. A number: on how many of them the two ran together. **x**: they write the "
        "same part, and a recipe with both is refused. *no*: one of the two is refused on all of them.\n",
        f"| | {' | '.join(f'`{m}`' for m in labels[:-1])} |",
        "|---|" + "---|" * (len(labels) - 1),
    ]
    for i, b in enumerate(labels[1:], 1):
        cells = [pair([kept["together"].get(f"{a} {b} {f}", {}) for f in PAIRS_ON]) for a in labels[:i]]
        lines.append(f"| `{b}` | {' | '.join(cells)} |" + " |" * (len(labels) - 1 - i))
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.relative_to(ROOT))


def cell(found: dict[str, Any]) -> str:
    """One method on one family, in a few characters."""
    if "fails" in found:
        return f"**fails**: {found['fails']}"
    if not found or "refused" in found:
        return "*no*" if found else ""
    wrong = [
        w for w, ok in (("not restored", found["restored"]), ("not neutral", found.get("neutral", True))) if not ok
    ]
    return f"{found['places']}{' =' if found.get('neutral') else ''}" + "".join(f" **{w}**" for w in wrong)


def pair(found: list[dict[str, Any]]) -> str:
    """Two methods on the families that were tried."""
    if any("conflict" in f for f in found):
        return "**x**"
    bad = [f for f in found if "fails" in f or not f.get("restored", True)]
    ran = sum("moved" in f for f in found)
    return ("**fails** " if bad else "") + (str(ran) if ran else "*no*")


if __name__ == "__main__":
    page() if sys.argv[1:] == ["page"] else main()
