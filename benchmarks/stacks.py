"""Caches on random stacks of 0.3 B parameters in the shapes of Flux and Wan: time alone, at one amount of reuse.

    python benchmarks/stacks.py     a quarter of an hour, two threads, bfloat16; writes benchmarks/results/stacks.json

Each of hasten's caches is set so that it runs what a counterpart of diffusers or cache-dit runs: every second step, or
the first step and then the first block alone; both are timed in pairs, over a whole denoising loop. Weights are random,
so nothing is said of likeness. cache-dit is measured where it is installed.
"""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from beside import dit, paired
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
    WanTransformer3DModel,
)

import hasten
from hasten import Recipe
from hasten.measure.machine import machine

STEPS, PAIRS, THREADS = 4, 5, 2
BRANCHES = [r".*blocks\.\d+\.(attn\d?|ff|ff_context|ffn|proj_mlp|proj_out)"]
RESULT = Path(__file__).parent / "results" / "stacks.json"


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def flux():
    """1,024 wide, 4 double and 9 single blocks; 256 places, 64 words."""
    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        in_channels=64, num_layers=4, num_single_layers=9, attention_head_dim=128, num_attention_heads=8,
        joint_attention_dim=1024, pooled_projection_dim=256, guidance_embeds=True,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = FluxPipeline(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=net.to(torch.bfloat16).eval(),
    )  # fmt: skip
    pipe.vae_scale_factor = 8
    words = {"prompt_embeds": noise(1, 64, 1024), "pooled_prompt_embeds": noise(1, 256)}
    return pipe, words | {"height": 256, "width": 256, "num_inference_steps": STEPS, "guidance_scale": 3.5}


def wan():
    """1,024 wide, 18 blocks; 5 frames of 8 x 8 places, 64 words, guidance in two calls."""
    torch.manual_seed(0)
    net = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=128, text_dim=512, ffn_dim=4096, num_layers=18, rope_max_seq_len=64
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=net.to(torch.bfloat16).eval()
    )
    words = {"prompt_embeds": noise(1, 64, 512), "negative_prompt_embeds": noise(1, 64, 512, seed=1)}
    return pipe, words | {
        "height": 128, "width": 128, "num_frames": 17, "num_inference_steps": STEPS, "guidance_scale": 5.0
    }  # fmt: skip


def counterparts(family, time):
    """(what both run, hasten's method, whose, the other's configuration)."""
    ones = tuple([1.0] * (STEPS - 1))
    blocks = "transformer_blocks" if family == "flux" else "blocks"

    def broadcast():
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
            cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=(blocks,), cross_attention_block_identifiers=(blocks,),
            current_timestep_callback=time,
        )  # fmt: skip

    every = "every second step"
    yield every, {"cache.interval": {"every": 2}}, "diffusers", TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=0, use_lite_mode=True
    )  # fmt: skip
    yield every, {"cache.taylor": {"every": 2, "order": 1}}, "diffusers", TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, use_lite_mode=True
    )  # fmt: skip
    yield every, {"cache.feature": {"every": 2}}, "diffusers", TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=0, cache_identifiers=BRANCHES
    )  # fmt: skip
    yield every, {"cache.magnitude": {"ratios": ones, "threshold": 9.0, "most": 1, "retain": 0.0}}, "diffusers", (
        MagCacheConfig(threshold=9.0, max_skip_steps=1, retention_ratio=0.0, num_inference_steps=STEPS,
                       mag_ratios=torch.tensor((1.0, *ones)))
    )  # fmt: skip
    yield (
        "attention every second step",
        {"cache.broadcast": {"joint": 2, "spatial": 2, "cross": 2, "low": 0.0, "high": 1.0}},
        "diffusers",
        broadcast(),
    )
    first = "the first block alone after the first step"
    yield first, {"cache.first_block": {"threshold": 2.0}}, "diffusers", FirstBlockCacheConfig(threshold=1e3)
    yield first, {"cache.first_block": {"threshold": 2.0}}, "cache-dit", {
        "Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "residual_diff_threshold": 1e3, "max_warmup_steps": 1
    }  # fmt: skip
    if family == "wan":
        yield "attention every second step, one branch of two", {"cache.faster": {}}, "diffusers", FasterCacheConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 681),
            unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_range=(-1, 641),
            spatial_attention_block_identifiers=(blocks,), attention_weight_callback=lambda m: 0.5,
            is_guidance_distilled=False, current_timestep_callback=time,
        )  # fmt: skip


@contextmanager
def theirs(net, config):
    """diffusers' cache on a transformer."""
    net.enable_cache(config)
    try:
        yield
    finally:
        net.disable_cache()


def main():
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    rows = []
    for family, build in (("flux", flux), ("wan", wan)):
        pipe, given = build()
        pipe.set_progress_bar_config(disable=True)
        size = sum(p.numel() for p in pipe.transformer.parameters())
        now = [0.0]
        pipe.transformer.register_forward_pre_hook(
            lambda m, a, k, now=now: now.__setitem__(0, float(k["timestep"].flatten()[0])), with_kwargs=True
        )

        def draw(pipe=pipe, given=given):
            return pipe(**given, output_type="latent", generator=torch.Generator().manual_seed(0))

        for what, method, whose, config in counterparts(family, lambda now=now: now[0]):
            label = next(iter(method))
            row = {"family": family, "parameters": size, "runs": what, "ours": label, "whose": whose}
            row["theirs"] = "DBCache" if isinstance(config, dict) else type(config).__name__.removesuffix("Config")
            recipe = Recipe.from_dict({"methods": [method]})

            def ours(pipe=pipe, recipe=recipe):
                return hasten.accelerate(pipe, recipe)

            def peer(pipe=pipe, whose=whose, config=config):
                return theirs(pipe.transformer, config) if whose == "diffusers" else dit(pipe, config)

            try:
                row["over theirs"] = paired(draw, peer, ours, PAIRS).to_dict()
            except Exception as error:  # a peer that does not run here is told so
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append(row)
            print({k: v["median"] if isinstance(v, dict) else v for k, v in row.items()}, flush=True)
    RESULT.write_text(json.dumps({"rows": rows, "steps": STEPS, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
