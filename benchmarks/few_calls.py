"""How few calls reach the quality of the 28-step default on `emoji-flow`: fitted weights against plain Euler.

    python benchmarks/few_calls.py       about twenty minutes; writes benchmarks/results/few_calls.json

Weights of `olss` are fitted on 48 prompts, on the grid `shifted` 0.5, and judged on 96 others with other seeds. Quality
is 1 where the pictures are as near to the untouched ones as a second untouched run is (docs/measuring.md); a third
untouched run shows what that is worth with as many pictures. Guidance, at the pipeline's default, counts once.
"""

import json
from pathlib import Path

import torch
from rich.progress import Progress

from hasten import Recipe, accelerate, reference, tree
from hasten.bridge.drawing import quiet
from hasten.bridge.replay import frozen, replay
from hasten.fit.subspace import subspace
from hasten.fit.trajectory import record
from hasten.grid import build
from hasten.measure.features import efficientnet_lite0
from hasten.measure.machine import machine
from hasten.measure.quality import quality
from hasten.tune.bench import bench
from hasten.tune.subject import Task, drawn, untouched

RESULT = Path(__file__).parent / "results" / "few_calls.json"
SHIFTED = {"shifted": {"shift": 0.5}}


def main() -> None:
    prompts = reference.prompts(count=144)
    judged = [p for i, p in enumerate(prompts) if i % 3]
    recipes = fits(prompts[::3], (6, 8, 10, 12, 15))
    recipes |= {f"euler, {n} calls": {"solver": "euler", "grid": SHIFTED, "steps": n} for n in (8, 10)}
    pipe, features = quiet(reference.pipeline()), efficientnet_lite0()
    task, rows = Task.of(judged, 11), []
    with Progress() as bar:
        line = bar.add_task("pictures", total=3 * 96 + 102 * len(recipes))
        plain = untouched(pipe, task, features, 8, lambda n: bar.advance(line, n))
        third = drawn(pipe, judged, Task.of(judged, 12).seeds, features, 8, lambda n: bar.advance(line, n))
        same = quality(*(run.features for run in (*plain, third)), torch.Generator().manual_seed(0))
        rows.append({"recipe": "untouched, a third time", "quality": same.to_dict()})
        for name, recipe in recipes.items():
            wanted = Recipe.from_dict(recipe | {"methods": ["tokens.fold"]})
            report = bench(pipe, wanted, task, plain, features, "emoji-flow", pairs=2,
                           tick=lambda n: bar.advance(line, n)).report  # fmt: skip
            rows.append({"recipe": name, "quality": report.quality.to_dict()})
            bar.console.print(f"{name}: quality {report.quality}")
            RESULT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def fits(prompts: list[str], counts: tuple[int, ...]) -> dict[str, dict]:
    """Recipes of fitted weights, by name."""
    pipe, found = quiet(reference.pipeline()), {}
    accelerate(pipe, Recipe.from_dict({"methods": ["tokens.fold"]}))
    rngs = [torch.Generator().manual_seed(5000 + i) for i in range(len(prompts))]
    with frozen(pipe), Progress() as bar:
        seen = replay(pipe, prompt=prompts, generator=rngs)
        line = bar.add_task("exact trajectories", total=99)
        uniform = build(seen.path, tree.function("grids", "uniform"), 50)
        solver = tree.function("solvers", "heun")
        exact = record(solver, seen.denoise, seen.x, uniform, lambda n: bar.advance(line, n))
        for n in counts:
            grid = build(seen.path, tree.function("grids", "shifted"), n, shift=0.5)
            weights, _ = subspace(seen.denoise, exact, grid)
            rows = [list(row) for row in weights]
            found[f"olss, {n} calls"] = {"solver": {"olss": {"weights": rows}}, "grid": [g.t for g in grid.nodes]}
    return found


if __name__ == "__main__":
    main()
