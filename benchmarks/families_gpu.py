"""Families of large transformers at their own widths and token counts, with fewer blocks and random weights, on a GPU:
what caches, token methods, attention and int8 gain, and that their neutral settings change no bit.

    python benchmarks/families_gpu.py           a quarter of an hour; benchmarks/results/families_gpu.json
    python benchmarks/families_gpu.py --small   a rehearsal on any machine: tiny, its times mean nothing, keeps nothing

Flux at 1,024 x 1,024 (4,096 places and 512 words), CogVideoX at 480 x 720 with 49 frames (17,550), HunyuanVideo and Wan
at 480 x 832 with 61 and 81 frames (24,960 and 32,760); bfloat16, 4 steps. Times are of denoising loops, in pairs with
the untouched pipeline. Weights are random: nothing is said of likeness.
"""

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from beside import paired
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)

import hasten
from hasten import Recipe, tree
from hasten.measure.machine import machine
from hasten.method import Refused

SMALL = "--small" in sys.argv
STEPS, PAIRS = 4, 1 if SMALL else 3
DEVICE = "cpu" if SMALL else "cuda"
DTYPE = torch.float32 if SMALL else torch.bfloat16
RESULT = Path(__file__).parent / "results" / "families_gpu.json"
METHODS = (
    {"cache.interval": {"every": 2}}, {"cache.first_block": {"threshold": 2.0}}, {"cache.feature": {"every": 2}},
    {"cache.broadcast": {}}, {"cache.text": {}}, {"tokens.merge": {"ratio": 0.5}}, {"tokens.asymmetric": {}},
    {"attention.exact": {}}, {"attention.sage": {}}, {"attention.sla": {}}, {"attention.top_blocks": {}},
    {"attention.sliding_tile": {}}, {"quant.w8a8": {}},
)  # fmt: skip


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def heads(full, size):
    """Attention heads and their channels, a few in a rehearsal."""
    return {"num_attention_heads": 2 if SMALL else full, "attention_head_dim": 24 if SMALL else size}


def parts(scheduler, net, **more):
    torch.manual_seed(0)
    return {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": scheduler} | more | {
        "transformer": net.to(DEVICE, DTYPE).eval()
    }  # fmt: skip


def flux():
    axes = {"axes_dims_rope": (8, 8, 8)} if SMALL else {}
    net = FluxTransformer2DModel(
        **heads(24, 128), in_channels=64, num_layers=2 if SMALL else 4, num_single_layers=2 if SMALL else 8,
        joint_attention_dim=64 if SMALL else 4096, pooled_projection_dim=768, guidance_embeds=True, **axes,
    )  # fmt: skip
    pipe = FluxPipeline(**parts(FlowMatchEulerDiscreteScheduler(shift=3.0), net, text_encoder_2=None, tokenizer_2=None))
    pipe.vae_scale_factor = 8
    words = {"prompt_embeds": noise(1, 512, net.config.joint_attention_dim), "pooled_prompt_embeds": noise(1, 768)}
    side = 256 if SMALL else 1024
    return pipe, words | {"height": side, "width": side, "guidance_scale": 3.5}


def cogvideox():
    frames, high, wide = (9, 96, 96) if SMALL else (49, 480, 720)
    net = CogVideoXTransformer3DModel(
        **heads(30, 64), num_layers=2 if SMALL else 8, text_embed_dim=64 if SMALL else 4096,
        sample_height=high // 8, sample_width=wide // 8, sample_frames=frames,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    )
    dim = net.config.text_embed_dim
    words = {"prompt_embeds": noise(1, 226, dim), "negative_prompt_embeds": noise(1, 226, dim, seed=1)}
    pipe = CogVideoXPipeline(**parts(scheduler, net))
    return pipe, words | {"height": high, "width": wide, "num_frames": frames, "guidance_scale": 6.0}


def hunyuan_video():
    frames, high, wide = (9, 96, 96) if SMALL else (61, 480, 832)
    axes = {"rope_axes_dim": (8, 8, 8)} if SMALL else {}
    dim = 64 if SMALL else 4096
    net = HunyuanVideoTransformer3DModel(
        **heads(24, 128), num_layers=2 if SMALL else 4, num_single_layers=2 if SMALL else 8, text_embed_dim=dim,
        pooled_projection_dim=768, **axes,
    )  # fmt: skip
    made = parts(FlowMatchEulerDiscreteScheduler(shift=7.0), net, text_encoder_2=None, tokenizer_2=None)
    words = {"prompt_embeds": noise(1, 256, dim), "pooled_prompt_embeds": noise(1, 768)}
    mask = {"prompt_attention_mask": torch.ones(1, 256, device=DEVICE, dtype=DTYPE)}
    return HunyuanVideoPipeline(**made), words | mask | {
        "height": high, "width": wide, "num_frames": frames, "guidance_scale": 6.0
    }  # fmt: skip


def wan():
    frames, high, wide = (9, 96, 96) if SMALL else (81, 480, 832)
    dim = 64 if SMALL else 4096
    net = WanTransformer3DModel(
        **heads(12, 128), num_layers=2 if SMALL else 8, text_dim=dim, ffn_dim=128 if SMALL else 8960
    )
    words = {"prompt_embeds": noise(1, 512, dim), "negative_prompt_embeds": noise(1, 512, dim, seed=1)}
    pipe = WanPipeline(**parts(FlowMatchEulerDiscreteScheduler(shift=3.0), net))
    return pipe, words | {"height": high, "width": wide, "num_frames": frames, "guidance_scale": 5.0}


def main():
    if not SMALL and not torch.cuda.is_available():
        sys.exit("these sizes need a CUDA device; --small rehearses on any machine")
    logging.disable(logging.WARNING)
    rows = []
    for build in (flux, cogvideox, hunyuan_video, wan):
        pipe, given = build()
        pipe.set_progress_bar_config(disable=True)

        def draw(pipe=pipe, given=given):
            rng = torch.Generator().manual_seed(0)
            out = pipe(**given, num_inference_steps=STEPS, output_type="latent", generator=rng)
            return getattr(out, "frames", getattr(out, "images", None))

        before = draw()
        for method in METHODS:
            (label, settings), row = next(iter(method.items())), {"family": build.__name__}
            row |= {"method": label, "settings": settings}
            recipe, neutral = Recipe.from_dict({"methods": [method]}), tree.method(label).neutral
            try:
                if neutral is not None:
                    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{label: neutral}]})):
                        row["neutral is exact"] = torch.equal(draw(), before)
                found = paired(draw, nullcontext, lambda p=pipe, r=recipe: hasten.accelerate(p, r), PAIRS)
                row["over untouched"] = found.to_dict()
            except Refused as refused:
                row["refused"] = str(refused)
            row["taken back"] = torch.equal(draw(), before)
            rows.append(row)
            print({k: v["median"] if isinstance(v, dict) and "median" in v else v for k, v in row.items()}, flush=True)
        del pipe, draw
    if not SMALL:
        RESULT.write_text(json.dumps({"rows": rows, "steps": STEPS, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
