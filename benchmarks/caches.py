"""Caches on the trained `emoji-flow` (28 steps, guidance 7, float32) and `emoji-unet` (28 steps, guidance 3): how much
faster at equal likeness, beside those of diffusers, cache-dit and DeepCache on the same pipeline, noise and prompts.

    python benchmarks/caches.py                 a quarter of an hour, one thread; benchmarks/results/caches.json
    python benchmarks/caches.py emoji-unet      the same; benchmarks/results/caches_unet.json
    ... --anew                                  rows of a run before are not kept
    ... --finalists                             they are all kept, and the fastest are timed again

Every method is swept over its strength. PSNR is of the decoded pictures against those without a cache, over 9 prompts;
times are of denoising, in pairs with the untouched pipeline. At 30 and 35 dB the fastest setting of each method that
is at least as like is taken, and the fastest of hasten's are timed against the fastest of the others', in pairs.
diffusers 0.42 has no caches on Stable Diffusion 3's transformer: here its hooks are put there by the mixin that its
other transformers have. It and cache-dit have none for U-Nets. cache-dit and DeepCache are measured where they are
installed.
"""

import json
import logging
import sys
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from beside import deepcache, dit, paired
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)  # fmt: skip
from diffusers.models.cache_utils import CacheMixin

import hasten
from hasten import Recipe, reference
from hasten.bridge.drawing import latents
from hasten.cache import magnitude, tea
from hasten.fit.reuse import CannotPlan, measured
from hasten.measure.machine import machine

STEPS, PAIRS, DB = 28, 3, (30.0, 35.0)
PROMPTS = [
    "a red apple", "dog face", "rocket", "flag: japan", "grinning face", "sunflower", "pizza", "tiger face", "snowman",
]  # fmt: skip
FITTED = ["guitar", "tulip", "pig face", "house"]
SEEDS = [1000 + i for i in range(len(PROMPTS))]
UNET = "emoji-unet" in sys.argv
RESULT = Path(__file__).parent / "results" / ("caches_unet.json" if UNET else "caches.json")
GUIDANCE = 3.0 if UNET else 7.0
BUDGETS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.14)


def planned(pipe):
    """Plans of several budgets, each once."""
    if "--finalists" in sys.argv:
        kept = [r for r in json.loads(RESULT.read_text())["rows"] if r["method"] == "cache.planned"]
        return [(r["method"], r["settings"]) for r in kept]
    costs, plans = measured(pipe, FITTED, guidance_scale=GUIDANCE, num_inference_steps=STEPS), {}
    for budget in BUDGETS:
        with suppress(CannotPlan):
            found = costs.plan(budget)
            plans[found.computed] = ("cache.planned", found.recipe.methods[-1].model_dump())
    return list(plans.values())


def unet_settings(pipe):
    """(name, settings) of each of hasten's caches for U-Nets, from gentle to strong."""
    rows = [("cache.deep", {"every": n, "branch": b}) for b in (0, 3) for n in (2, 3, 4, 5)]
    rows += [("cache.encoder", {}), ("cache.clockwork", {})]
    rows += [("cache.feature", {"every": n}) for n in (2, 3)]
    rows += [("cache.tgate", {"gate": g}) for g in (0.3, 0.5, 0.7)]
    return rows + planned(pipe)


def hasten_settings(pipe):
    """(name, settings) of each of hasten's caches for transformers, from gentle to strong."""
    ratios = recorded_ratios(pipe)
    coefficients = recorded_coefficients(pipe)
    rows = [("cache.interval", {"every": n}) for n in (2, 3)]
    rows += [("cache.taylor", {"every": n, "order": 1}) for n in (2, 3)]
    rows += [("cache.first_block", {"threshold": t}) for t in (0.04, 0.06, 0.1, 0.12, 0.15, 0.2, 0.22, 0.25, 0.3)]
    rows += [("cache.tea", {"threshold": t, "coefficients": coefficients}) for t in (0.05, 0.1, 0.2, 0.3, 0.5)]
    rows += [("cache.magnitude", {"ratios": ratios, "threshold": t}) for t in (0.03, 0.06, 0.12, 0.24)]
    rows += [("cache.broadcast", {"joint": n}) for n in (2, 3)]
    rows += [("cache.feature", {"every": 2}), ("cache.faster", {})]
    rows += [("cache.token", {"every": 2, "keep": k}) for k in (0.3, 0.6)]
    return rows + planned(pipe)


def recorded_ratios(pipe):
    patch, meter = magnitude.record(pipe.transformer)
    with patch, hasten.accelerate(pipe, Recipe.from_dict({})):
        draw(pipe, FITTED, [0, 1, 2, 3])
    return magnitude.mean(list(meter.done.values()))


def recorded_coefficients(pipe):
    patch, pairs = tea.record(pipe.transformer)
    with patch, hasten.accelerate(pipe, Recipe.from_dict({})):
        draw(pipe, FITTED, [0, 1, 2, 3])
    return tea.fit(pairs)


MAG = ((0.03, 3, 0.2), (0.06, 3, 0.2), (0.06, 3, 0.1), (0.12, 4, 0.1), (0.24, 5, 0.1))


def taylor(every, order):
    return TaylorSeerCacheConfig(cache_interval=every, max_order=order, disable_cache_before_step=3)


def mag(ratios, threshold, most, retention):
    return MagCacheConfig(
        threshold=threshold, max_skip_steps=most, retention_ratio=retention, num_inference_steps=STEPS,
        mag_ratios=torch.tensor((1.0, *ratios)),
    )  # fmt: skip


class Peer:
    """diffusers' caches on the transformer of a pipeline."""

    def __init__(self, pipe):
        self.net, self.time = pipe.transformer, 1000
        kind = type(self.net)
        self.net.__class__ = type(
            kind.__name__, (kind, CacheMixin), {"__module__": kind.__module__, "_cache_config": None}
        )

    def settings(self, ratios):
        rows = [(f"TaylorSeer {n} {o}", taylor(n, o)) for n in (2, 3) for o in (0, 1)]
        rows += [(f"MagCache {t} {k} {r}", mag(ratios, t, k, r)) for t, k, r in MAG]
        rows += [(f"PyramidAttentionBroadcast {n}", self.broadcast(n)) for n in (2, 3)]
        rows.append(("FasterCache", self.faster()))
        # last: where it fails, it leaves hooks that others stumble over
        return rows + [(f"FirstBlockCache {t}", FirstBlockCacheConfig(threshold=t)) for t in (0.05, 0.1, 0.2)]

    def broadcast(self, every):
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every, spatial_attention_timestep_skip_range=(100, 850),
            spatial_attention_block_identifiers=("transformer_blocks",), current_timestep_callback=lambda: self.time,
        )  # fmt: skip

    def faster(self):
        return FasterCacheConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 681),
            unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_range=(-1, 641),
            spatial_attention_block_identifiers=("transformer_blocks",), attention_weight_callback=lambda m: 0.5,
            is_guidance_distilled=False, current_timestep_callback=lambda: self.time,
        )  # fmt: skip

    @contextmanager
    def on(self, config):
        def note(module, args, kwargs):
            self.time = float(kwargs["timestep"].flatten()[0])

        hook = self.net.register_forward_pre_hook(note, with_kwargs=True)
        inner = self.net.forward

        def forward(*args, **kwargs):  # each call anew: a pipeline that ends takes the context away
            with self.net.cache_context("both"):
                return inner(*args, **kwargs)

        self.net.forward = forward
        self.net.enable_cache(config)
        try:
            yield
        finally:
            self.net.disable_cache()
            del self.net.forward
            hook.remove()


def dit_settings():
    return [
        {"Fn_compute_blocks": f, "Bn_compute_blocks": 0, "residual_diff_threshold": t, "max_warmup_steps": w}
        for f in (1, 2) for t in (0.08, 0.12, 0.24, 0.5) for w in (2,)
    ]  # fmt: skip


def draw(pipe, prompts, seeds):
    return latents(pipe, prompts, seeds, 4, num_inference_steps=STEPS, guidance_scale=GUIDANCE)


def pictures(pipe, made):
    with torch.no_grad():
        out = pipe.vae.decode(made / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    return (out / 2 + 0.5).clamp(0, 1)


def likeness(pipe, made, want):
    """dB, of the mean square over all pictures."""
    return float(-10 * (pictures(pipe, made) - pictures(pipe, want)).square().mean().log10())


def sides(pipe):
    """(whose, name, settings for the record, context in which it is on)."""
    for label, settings in unet_settings(pipe) if UNET else hasten_settings(pipe):
        recipe = Recipe.from_dict({"methods": [{label: settings}]})
        yield "hasten", label, settings, lambda recipe=recipe: hasten.accelerate(pipe, recipe)
    if UNET:
        if find_spec("DeepCache") is not None:
            for settings in ({"cache_interval": n, "cache_branch_id": b} for b in (0, 3) for n in (2, 3, 4, 5)):
                yield "DeepCache", "DeepCache", settings, lambda settings=settings: deepcache(pipe, settings)
        return
    peer = Peer(pipe)
    for name, config in peer.settings(recorded_ratios(pipe)):
        yield "diffusers", name.split()[0], name, lambda config=config: peer.on(config)
    if find_spec("cache_dit") is not None:
        for settings in dit_settings():
            yield "cache-dit", "DBCache", settings, lambda settings=settings: dit(pipe, settings)


def timed(pipe, context, against=nullcontext, pairs=PAIRS):
    return paired(lambda: draw(pipe, PROMPTS[:2], SEEDS[:2]), against, context, pairs)


def main():
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pipe = reference.pipeline("emoji-unet" if UNET else "emoji-flow")
    pipe.set_progress_bar_config(disable=True)
    want, rows, ways, kept = draw(pipe, PROMPTS, SEEDS), [], {}, earlier()
    for whose, name, settings, context in sides(pipe):
        row = {"whose": whose, "method": name, "settings": settings}
        if (done := kept.get(json.dumps(row))) is not None:
            rows.append(done)
            ways[len(rows) - 1] = context
            continue
        try:
            with context():
                row["psnr"] = likeness(pipe, draw(pipe, PROMPTS, SEEDS), want)
            if 28 < row["psnr"] < 60 and "--likeness" not in sys.argv:
                row["speedup"] = timed(pipe, context).to_dict()
        except Exception as error:  # a peer that does not run here is told so
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print({k: v for k, v in row.items() if k != "speedup"}, row.get("speedup", {}).get("median"), flush=True)
        rows.append(row)
        ways[len(rows) - 1] = context
    assert torch.equal(draw(pipe, PROMPTS[:4], SEEDS[:4]), want[:4])
    found = {"pipeline": {"steps": STEPS, "guidance": GUIDANCE, "prompts": len(PROMPTS)}, "rows": rows}
    if "--likeness" not in sys.argv:
        found["at"] = [finalists(pipe, rows, ways, db) for db in DB]
    found["machine"] = machine()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def earlier():
    """Rows of a run before, but for those that failed: a second run does these alone, and times the fastest again."""
    found = json.loads(RESULT.read_text())["rows"] if RESULT.exists() and "--anew" not in sys.argv else []
    about = ("whose", "method", "settings")
    return {json.dumps({k: r[k] for k in about}): r for r in found if "failed" not in r}


def finalists(pipe, rows, ways, db):
    """The fastest of each method at this likeness, and hasten's fastest against the others', in pairs."""
    good = [i for i, r in enumerate(rows) if r.get("speedup") and r["psnr"] >= db]
    best = {}
    for i in sorted(good, key=lambda i: rows[i]["speedup"]["median"]):
        best[rows[i]["whose"], rows[i]["method"]] = i
    ours = [i for (whose, m), i in best.items() if whose == "hasten" and m != "cache.planned"]
    theirs = [i for (whose, _), i in best.items() if whose != "hasten"]
    told = {
        "psnr": db,
        "fastest": [{k: rows[i][k] for k in ("whose", "method", "settings", "psnr", "speedup")} for i in best.values()],
    }
    fastest = max(ours, key=lambda i: rows[i]["speedup"]["median"], default=None)
    rival = max(theirs, key=lambda i: rows[i]["speedup"]["median"], default=None)
    planned = best.get(("hasten", "cache.planned"))
    for name, a, b in (
        ("single against peers", rival, fastest),
        ("planned against peers", rival, planned),
        ("planned against single", fastest, planned),
    ):
        if a is not None and b is not None:
            ratio = timed(pipe, ways[b], ways[a], 2 * PAIRS)
            told[name] = {"slower": rows[a]["method"], "faster": rows[b]["method"], "ratio": ratio.to_dict()}
            print(db, name, told[name]["slower"], told[name]["faster"], ratio.text(), flush=True)
    return told


if __name__ == "__main__":
    main()
