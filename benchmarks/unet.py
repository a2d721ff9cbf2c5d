"""What reuse gains on Stable Diffusion's U-Net at its own size of 64 x 64 latents, beside DeepCache and tomesd.

    python benchmarks/unet.py [METHOD ...]      half an hour, two threads; benchmarks/results/unet.json, or these of it

The U-Net is that of Stable Diffusion 1.5 at half its width (216 M random parameters, float32), 77 words, guidance, 4
steps of DDIM; times are of whole denoising loops, in pairs. Weights are random, so nothing is said of likeness; but
where a peer does the same at equal settings, the difference of the latents is told, over their norm. Peers are
measured where they are installed (DeepCache 0.1.1, tomesd 0.1.3).
"""

import json
import logging
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from beside import deepcache, paired, tomesd
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import hasten
from hasten import Recipe
from hasten.measure.machine import machine

STEPS, PAIRS, THREADS = 4, 3, 2
BESIDE = 9
"""Pairs with a peer, whose difference is small."""
RESULT = Path(__file__).parent / "results" / "unet.json"


def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=(160, 320, 640, 640), cross_attention_dim=768, attention_head_dim=8)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.vae_scale_factor = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    g = torch.Generator().manual_seed(0)
    words, none = torch.randn(2, 1, 77, 768, generator=g)
    return pipe(
        prompt_embeds=words, negative_prompt_embeds=none, height=512, width=512, num_inference_steps=STEPS,
        guidance_scale=7.5, generator=g, output_type="latent",
    ).images  # fmt: skip


SIDES = (
    ({"cache.deep": {"every": 3}}, (deepcache, {"cache_interval": 3, "cache_branch_id": 0})),
    ({"cache.encoder": {}}, None),
    ({"cache.feature": {"every": 2}}, None),
    ({"cache.tgate": {"gate": 0.5}}, None),
    ({"cache.token": {"every": 3}}, None),
    ({"cache.text": {}}, None),
    ({"tokens.merge": {"ratio": 0.5, "random": "never"}}, (tomesd, {"ratio": 0.5, "use_rand": False})),
    ({"tokens.downsample": {"factor": 2}}, None),
    ({"attention.exact": {}}, None),
)


def main():
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    pipe, rows = pipeline(), []
    before = draw(pipe)

    kept = {r["method"]: r for r in json.loads(RESULT.read_text())["rows"]} if sys.argv[1:] else {}
    for method, peer in SIDES:
        if sys.argv[1:] and next(iter(method)) not in sys.argv[1:]:
            rows.append(kept[next(iter(method))])
            continue
        recipe = Recipe.from_dict({"methods": [method]})

        def ours(recipe=recipe):
            return hasten.accelerate(pipe, recipe)

        row = {"method": next(iter(method)), "settings": next(iter(method.values()))}
        row["over untouched"] = paired(lambda: draw(pipe), nullcontext, ours, PAIRS).to_dict()
        with ours():
            got = draw(pipe)
        if peer is not None:
            theirs = partial(peer[0], pipe, peer[1])
            row["peer"] = peer[0].__name__
            try:
                with theirs():
                    want = draw(pipe)
                row["difference"] = float((got - want).norm() / want.norm())
                row["over theirs"] = paired(lambda: draw(pipe), theirs, ours, BESIDE).to_dict()
            except Exception as error:  # a peer that does not run here is told so
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        row["exact"] = torch.equal(got, before)
        rows.append(row)
        print({k: v["median"] if isinstance(v, dict) and "median" in v else v for k, v in row.items()}, flush=True)
        assert torch.equal(draw(pipe), before)
    size = sum(p.numel() for p in pipe.unet.parameters())
    RESULT.write_text(
        json.dumps({"rows": rows, "parameters": size, "steps": STEPS, "machine": machine()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
