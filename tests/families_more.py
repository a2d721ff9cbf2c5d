"""Tiny random pipelines that methods must work on besides: DiT, AnimateDiff, Mochi and Latte."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLMochi,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
)

from families import Family, _awake, _embeds, _quiet, _unet, _vae
from families_image import PLAIN


def dit() -> Any:
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return _quiet(DiTPipeline(transformer=_awake(net), vae=_vae(), scheduler=DDIMScheduler(clip_sample=False)))


def dit_ask(pipe: Any, latents: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    """It gives pictures alone."""
    return torch.as_tensor(pipe(**given, output_type="np").images)


def animatediff() -> Any:
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    pipe = AnimateDiffPipeline(
        vae=_vae(), unet=_unet(), motion_adapter=adapter, text_encoder=None, tokenizer=None,  # type: ignore[arg-type]
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
    )  # fmt: skip
    _awake(pipe.unet)
    return _quiet(pipe)


def animatediff_inputs() -> dict[str, Any]:
    text = {"prompt_embeds": _embeds((1, 7, 24), 1), "negative_prompt_embeds": _embeds((1, 7, 24), 2)}
    return text | PLAIN | {"height": 32, "width": 32, "num_frames": 2}


def mochi() -> Any:
    torch.manual_seed(0)
    net = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu", max_sequence_length=7,
    )  # fmt: skip
    vae = AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return _quiet(MochiPipeline(
        transformer=_awake(net), vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    ))  # fmt: skip


def mochi_inputs() -> dict[str, Any]:
    mask = torch.ones(1, 7, dtype=torch.bool)
    return {
        "prompt_embeds": _embeds((1, 7, 16), 1), "prompt_attention_mask": mask,
        "negative_prompt_embeds": _embeds((1, 7, 16), 2), "negative_prompt_attention_mask": mask,
    } | PLAIN | {"height": 32, "width": 32, "num_frames": 7}  # fmt: skip


def latte() -> Any:
    torch.manual_seed(0)
    net = LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    return _quiet(LattePipeline(
        transformer=_awake(net), vae=_vae(), scheduler=scheduler, text_encoder=None, tokenizer=None
    ))  # fmt: skip


def latte_inputs() -> dict[str, Any]:
    text = {"prompt_embeds": _embeds((1, 7, 16), 1), "negative_prompt_embeds": _embeds((1, 7, 16), 2)}
    return text | PLAIN | {"height": 16, "width": 16, "video_length": 2, "mask_feature": False, "negative_prompt": None}


def none(pipe: Any, i: dict[str, Any]) -> Any:
    raise NotImplementedError("no solver is compared on it")


MORE = [
    Family(
        "dit", dit, lambda: PLAIN | {"class_labels": [3]}, none, (1, 4, 8, 8), ask=dit_ask,
    ),
    Family("animatediff", animatediff, animatediff_inputs, none, (1, 4, 2, 16, 16)),
    Family("mochi", mochi, mochi_inputs, none, (1, 12, 2, 4, 4)),
    Family("latte", latte, latte_inputs, none, (1, 4, 2, 8, 8)),
]  # fmt: skip
