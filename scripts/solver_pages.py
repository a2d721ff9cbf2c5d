"""Writes docs/solvers.md's tables and docs/pictures/solvers.png from benchmarks/results/solvers-*.json.

python scripts/solver_pages.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tables: made by scripts/solver_pages.py -->", "<!-- end of tables -->"
TITLES = {"emoji-flow": "emoji-flow at its default guidance", "mixture": "a mixture of 20 Gaussians in 64 dimensions"}
Rows = list[dict[str, Any]]


def best(rows: Rows, who: str, calls: int) -> dict[str, Any] | None:
    """The row of least error among those that ran."""
    found = [r for r in rows if r["who"] == who and r["calls"] == calls and r.get("error") is not None]
    return min(found, key=lambda r: r["error"]) if found else None


def fitted(rows: Rows, calls: int, solver: str) -> dict[str, Any] | None:
    """The row of a fit."""
    return next((r for r in rows if (r["who"], r["calls"], r["solver"]) == ("fitted", calls, solver)), None)


def name(row: dict[str, Any]) -> str:
    """Solver and grid of a row."""
    return row["solver"] + (f", {row['grid']}" if "grid" in row else "")


def summary(rows: Rows) -> list[str]:
    """Of each number of calls: diffusers' best, hasten's best on a fixed grid, and fits judged on other samples."""
    page = ["| calls | diffusers' best | hasten's best, fixed grid | ratio | weights fitted, best fixed grid | "
            "weights and grid fitted |", "|---|---|---|---|---|---|"]  # fmt: skip
    for calls in sorted({r["calls"] for r in rows}):
        theirs, ours, fit = best(rows, "diffusers", calls), best(rows, "hasten", calls), fitted(rows, calls, "olss")
        cells = [f"{r['error']:.4f} ({name(r)})" if r else "-" for r in (theirs, ours)]
        ratio = f"{theirs['error'] / ours['error']:.2f}x" if theirs and ours else "-"
        fixed = {k: v for k, v in fit["errors"].items() if k not in ("fitted", "curvature", "elbo")} if fit else {}
        grid = min(fixed, key=lambda k: fixed[k]) if fixed else ""
        more = [f"{fixed[grid]:.4f} ({grid})", f"{fit['errors']['fitted']:.4f}"] if fit else ["-", "-"]
        page.append(f"| {calls} | {cells[0]} | {cells[1]} | {ratio} | {more[0]} | {more[1]} |")
    return page


def every(rows: Rows) -> list[str]:
    """Each solver on the grid that is best for it, and each of diffusers' schedulers: error at each number of calls."""
    counts = sorted({r["calls"] for r in rows})
    page = [f"| | {' | '.join(map(str, counts))} |", "|---|" + "---|" * len(counts)]
    for who in ("hasten", "diffusers"):
        for solver in dict.fromkeys(r["solver"] for r in rows if r["who"] == who):
            cells = []
            for calls in counts:
                row = best([r for r in rows if r["solver"] == solver], who, calls)
                grid = f" {row['grid']}" if row and who == "hasten" else ""
                cells.append(f"{row['error']:.3f}{grid}" if row else "")
            if any(cells):
                page.append(f"| {'' if who == 'hasten' else 'diffusers: '}{solver} | {' | '.join(cells)} |")
    return page


def refused(rows: Rows) -> list[str]:
    """What diffusers' schedulers say that do not run."""
    said = {r["solver"]: r["fails"] for r in rows if "fails" in r and not any(
        "error" in o for o in rows if o["solver"] == r["solver"] and o["who"] == "diffusers")}  # fmt: skip
    return [f"- {solver}: {why}" for solver, why in said.items()]


def distances(rows: Rows) -> list[str]:
    """Frechet distances, of stochastic solvers too: each on the grid that is best for it."""
    counts = sorted({r["calls"] for r in rows})
    page = [f"| | {' | '.join(map(str, counts))} |", "|---|" + "---|" * len(counts)]
    for solver in dict.fromkeys(r["solver"] for r in rows if r["who"] == "hasten"):
        cells = []
        for calls in counts:
            of = [r["frechet"] for r in rows if (r["who"], r["solver"], r["calls"]) == ("hasten", solver, calls)]
            cells.append(f"{min(of):.3g}" if of else "")
        page.append(f"| {solver} | {' | '.join(cells)} |")
    return page


def picture(all_rows: Rows) -> None:
    """Error against calls, one panel a subject."""
    subjects = [s for s in TITLES if any(r["subject"] == s for r in all_rows)]
    figure, panels = plt.subplots(1, len(subjects), figsize=(6.2 * len(subjects), 4.6), squeeze=False)
    for panel, subject in zip(panels[0], subjects, strict=True):
        rows = [r for r in all_rows if r["subject"] == subject]
        counts = sorted({r["calls"] for r in rows})
        for solver in dict.fromkeys(r["solver"] for r in rows if r["who"] == "hasten"):
            line(panel, counts, [best([r for r in rows if r["solver"] == solver], "hasten", c) for c in counts],
                 color="0.8", lw=1, label="each hasten solver, its best fixed grid")  # fmt: skip
        line(panel, counts, [best(rows, "diffusers", c) for c in counts], color="tab:red", marker="o",
             label="diffusers, its best scheduler")  # fmt: skip
        line(panel, counts, [best(rows, "hasten", c) for c in counts], color="tab:blue", marker="o",
             label="hasten, its best solver and fixed grid")  # fmt: skip
        fits = [fitted(rows, c, "olss") for c in counts]
        line(panel, counts, [{"error": f["errors"]["fitted"]} if f else None for f in fits], color="tab:green",
             marker="o", label="hasten, fitted to the model")  # fmt: skip
        panel.set(title=TITLES[subject], xlabel="network calls (guidance counted once)", yscale="log", xscale="log")
        panel.set_xticks(counts, [str(c) for c in counts], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("distance from the exact trajectory's end, relative")
    handles, labels = panels[0][0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    panels[0][0].legend(once.values(), once.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "pictures" / "solvers.png", dpi=110)


def line(panel: Any, counts: list[int], rows: list[dict[str, Any] | None], **style: Any) -> None:
    """Through the counts that have a row."""
    there = [(c, min(r["error"], 3.0)) for c, r in zip(counts, rows, strict=True) if r]
    panel.plot([c for c, _ in there], [e for _, e in there], **style)


def main() -> None:
    """Puts the tables between their marks."""
    files = sorted((ROOT / "benchmarks" / "results").glob("solvers-*.json"))
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    parts = []
    for subject, title in TITLES.items():
        of = [r for r in rows if r["subject"] == subject]
        if of:
            parts += [f"## On {title}\n", *summary(of), "\n### Each solver, on the fixed grid that suits it best\n",
                      *every(of), "\n### Frechet distance of the same runs\n", *distances(of), ""]  # fmt: skip
            if why := refused(of):
                parts += ["diffusers' schedulers that do not run here, and what they say:\n", *why, ""]
    file = ROOT / "docs" / "solvers.md"
    text = file.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    file.write_text(f"{head}{BEGIN}\n\n" + "\n".join(parts).rstrip() + f"\n\n{END}{tail}", encoding="utf-8")
    picture(rows)


if __name__ == "__main__":
    main()
