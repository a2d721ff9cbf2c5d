"""Tiny random pipelines of every family, built from configs: nothing is downloaded, everything is really run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

SIDE = 32


def ask(pipe: Any, **given: Any) -> torch.Tensor:
    """The latents that a pipeline ends with, of pictures, frames or sounds."""
    out = pipe(**{"output_type": "latent"} | given)
    return next(getattr(out, kind) for kind in ("images", "frames", "audios") if hasattr(out, kind))


@dataclass(frozen=True)
class Family:
    """A pipeline and how it is called; `call(pipe, **more)` gives latents."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    network: Callable[[Any, dict[str, Any]], Callable[[torch.Tensor, float], torch.Tensor]]
    shape: tuple[int, ...]
    calls: int = 1  # network calls an evaluation: two where the branches are asked for one after the other
    ask: Callable[..., torch.Tensor] = ask

    def call(self, pipe: Any, **more: Any) -> torch.Tensor:
        return self.ask(pipe, **self.inputs() | {"generator": torch.Generator().manual_seed(0)} | more)


def _vae(levels: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * levels, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, sample_size=SIDE, shift_factor=0.1,
    )  # fmt: skip


def _awake(net: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialised layers would hide what a block does; every weight gets a value."""
    torch.manual_seed(1)
    for p in net.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return net.eval()


def _embeds(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(**more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "sample_size": SIDE // 2, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (2, 4),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 24,
    }  # fmt: skip
    return _awake(UNet2DConditionModel(**shape | more))


def sd() -> Any:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return _quiet(StableDiffusionPipeline(
        vae=_vae(), unet=_unet(), scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ))  # fmt: skip


def sd_inputs() -> dict[str, Any]:
    pair = {"prompt_embeds": _embeds((1, 7, 24), 1), "negative_prompt_embeds": _embeds((1, 7, 24), 2)}
    return pair | {"height": SIDE, "width": SIDE, "num_inference_steps": 6, "guidance_scale": 3.0}


def sdxl() -> Any:
    unet = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=72,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return _quiet(StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, scheduler=scheduler, text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, add_watermarker=False,
    ))  # fmt: skip


def sdxl_inputs() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": _embeds((1, 24), 3), "negative_pooled_prompt_embeds": _embeds((1, 24), 4)}
    return sd_inputs() | pooled


def sd3() -> Any:
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=SIDE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    return _quiet(StableDiffusion3Pipeline(
        transformer=_awake(net), vae=_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=None,
        text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    ))  # fmt: skip


def sd3_with_words() -> Any:
    """SD3 with two tiny text encoders and a tokenizer, for what takes prompts as text."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from hasten.bridge.small_sd3 import tokenizer

    words = tokenizer([f"prompt number {i} of a thing" for i in range(30)])
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(text).eval() for _ in range(2)]
    parts = sd3().components | {"text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    return _quiet(StableDiffusion3Pipeline(**parts | {"tokenizer": words, "tokenizer_2": words}))


def sd3_inputs() -> dict[str, Any]:
    zeros = torch.zeros(1, 9, 16)  # as where T5 is absent
    text = {
        "prompt_embeds": torch.cat([_embeds((1, 7, 16), 1), zeros], 1), "pooled_prompt_embeds": _embeds((1, 16), 3),
        "negative_prompt_embeds": torch.cat([_embeds((1, 7, 16), 2), zeros], 1),
        "negative_pooled_prompt_embeds": _embeds((1, 16), 4),
    }  # fmt: skip
    return text | {"height": SIDE, "width": SIDE, "num_inference_steps": 6, "guidance_scale": 3.0}


def flux() -> Any:
    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return _quiet(FluxPipeline(
        transformer=_awake(net), vae=_vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ))  # fmt: skip


def flux_inputs() -> dict[str, Any]:
    text = {
        "prompt_embeds": _embeds((1, 7, 16), 1), "pooled_prompt_embeds": _embeds((1, 16), 3),
        "negative_prompt_embeds": _embeds((1, 7, 16), 2), "negative_pooled_prompt_embeds": _embeds((1, 16), 4),
    }  # fmt: skip
    return text | {
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "true_cfg_scale": 2.0,
    }


def pixart() -> Any:
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(
        sample_size=SIDE // 2, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, caption_channels=16, cross_attention_dim=16, norm_type="ada_norm_single",
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return _quiet(PixArtSigmaPipeline(
        transformer=_awake(net), vae=_vae(), scheduler=scheduler, text_encoder=None, tokenizer=None
    ))  # fmt: skip


def pixart_inputs() -> dict[str, Any]:
    mask = torch.ones(1, 7, dtype=torch.long)
    text = {
        "prompt_embeds": _embeds((1, 7, 16), 1), "prompt_attention_mask": mask, "negative_prompt": None,
        "negative_prompt_embeds": _embeds((1, 7, 16), 2), "negative_prompt_attention_mask": mask,
    }  # fmt: skip
    plain = {"height": SIDE, "width": SIDE, "num_inference_steps": 6, "guidance_scale": 3.0}
    return text | plain | {"use_resolution_binning": False}


def wan() -> Any:
    torch.manual_seed(0)
    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _quiet(WanPipeline(transformer=_awake(net), vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None))


def wan_inputs() -> dict[str, Any]:
    text = {"prompt_embeds": _embeds((1, 7, 16), 1), "negative_prompt_embeds": _embeds((1, 7, 16), 2)}
    return text | {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 6, "guidance_scale": 3.0}


def _guided(out: torch.Tensor, scale: float) -> torch.Tensor:
    u, c = out.chunk(2)
    return u + scale * (c - u)


def _pair(i: dict[str, Any], name: str) -> torch.Tensor:
    return torch.cat([i[f"negative_{name}"], i[name]])


def unet_network(pipe: Any, i: dict[str, Any]) -> Callable[[torch.Tensor, float], torch.Tensor]:
    more = {}
    if "pooled_prompt_embeds" in i:
        ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).repeat(2, 1)
        more = {"added_cond_kwargs": {"text_embeds": _pair(i, "pooled_prompt_embeds"), "time_ids": ids}}
    text = _pair(i, "prompt_embeds")
    return lambda x, t: _guided(pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text, **more).sample, 3.0)


def sd3_network(pipe: Any, i: dict[str, Any]) -> Callable[[torch.Tensor, float], torch.Tensor]:
    text, pooled = _pair(i, "prompt_embeds"), _pair(i, "pooled_prompt_embeds")
    return lambda x, t: _guided(pipe.transformer(torch.cat([x, x]), text, pooled, torch.full((2,), t)).sample, 3.0)


def flux_network(pipe: Any, i: dict[str, Any]) -> Callable[[torch.Tensor, float], torch.Tensor]:
    ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    guidance = torch.full([1], 3.0)

    def one(x: torch.Tensor, t: float, prefix: str) -> torch.Tensor:
        return pipe.transformer(
            hidden_states=x, timestep=torch.full((1,), t) / 1000, guidance=guidance, img_ids=ids,
            pooled_projections=i[f"{prefix}pooled_prompt_embeds"], encoder_hidden_states=i[f"{prefix}prompt_embeds"],
            txt_ids=torch.zeros(7, 3),
        ).sample  # fmt: skip

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        c, u = one(x, t, ""), one(x, t, "negative_")
        return u + 2.0 * (c - u)

    return both


def pixart_network(pipe: Any, i: dict[str, Any]) -> Callable[[torch.Tensor, float], torch.Tensor]:
    text, mask = _pair(i, "prompt_embeds"), _pair(i, "prompt_attention_mask")
    none = {"resolution": None, "aspect_ratio": None}

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        out = pipe.transformer(
            torch.cat([x, x]), text, timestep=torch.full((2,), t), encoder_attention_mask=mask, added_cond_kwargs=none
        ).sample
        return _guided(out, 3.0).chunk(2, 1)[0]

    return both


def wan_network(pipe: Any, i: dict[str, Any]) -> Callable[[torch.Tensor, float], torch.Tensor]:
    def one(x: torch.Tensor, t: float, text: torch.Tensor) -> torch.Tensor:
        return pipe.transformer(x, torch.full((1,), t), text).sample

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        c, u = one(x, t, i["prompt_embeds"]), one(x, t, i["negative_prompt_embeds"])
        return u + 3.0 * (c - u)

    return both


FAMILIES = [
    Family("sd", sd, sd_inputs, unet_network, (1, 4, 16, 16)),
    Family("sdxl", sdxl, sdxl_inputs, unet_network, (1, 4, 16, 16)),
    Family("sd3", sd3, sd3_inputs, sd3_network, (1, 4, 16, 16)),
    Family("flux", flux, flux_inputs, flux_network, (1, 64, 16), 2),
    Family("pixart", pixart, pixart_inputs, pixart_network, (1, 4, 16, 16)),
    Family("wan", wan, wan_inputs, wan_network, (1, 16, 2, 2, 2), 2),
]
