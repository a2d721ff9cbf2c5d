"""The main claim: a recipe on `emoji-flow` against the plain pipeline as diffusers ships it, speed beside quality.

    python benchmarks/pipeline.py [recipe.yaml]

Untouched: float32, 28 steps, guidance on. Four rows from one run: the recipe; the recipe without `tokens.fold`, which
spares work that only a pipeline without T5 has; and bf16 + compile alone with and without `quant.w8a8`. Writes
benchmarks/results/pipeline.json.
"""

import json
import sys
from pathlib import Path

from rich.progress import Progress

from hasten import Recipe, reference
from hasten.bridge.drawing import quiet
from hasten.measure.features import efficientnet_lite0
from hasten.tune.bench import bench
from hasten.tune.prompts import default_prompts
from hasten.tune.subject import Task, untouched

HERE = Path(__file__).parent
RUNTIME = ["runtime.bf16", "tokens.fold", "runtime.compile"]


def main() -> None:
    chosen = Recipe.load(sys.argv[1] if len(sys.argv) > 1 else HERE / "emoji-flow.yaml")
    without = tuple(m for m in chosen.methods if m.label() != "tokens.fold")
    rows = {
        "tuned": chosen,
        "tuned without tokens.fold": chosen.model_copy(update={"methods": without}),
        "bf16 + fold + compile, 28 steps": Recipe.from_dict({"methods": RUNTIME}),
        "the same + quant.w8a8": Recipe.from_dict({"methods": [*RUNTIME, "quant.w8a8"]}),
    }
    pipe, features = quiet(reference.pipeline("emoji-flow")), efficientnet_lite0()
    task = Task.of(default_prompts("emoji-flow")[:24], 7)
    kept = {}
    with Progress() as bar:
        line = bar.add_task("pictures", total=2 * 24 + len(rows) * (24 + 16))
        plain = untouched(pipe, task, features, 8, lambda n: bar.advance(line, n))
        for name, recipe in rows.items():
            report = bench(
                pipe, recipe, task, plain, features, "emoji-flow", pairs=6, tick=lambda n: bar.advance(line, n)
            ).report
            kept[name] = report.to_dict()
            (HERE / "results" / "pipeline.json").write_text(json.dumps(kept, indent=1) + "\n")
            bar.console.print(f"{name}: denoising {report.denoising}, quality {report.quality}")


if __name__ == "__main__":
    main()
