"""Tiny random pipelines of further image families: Sana, HunyuanDiT, Lumina 2, Qwen-Image and the first DDPM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UNet2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

from families import Family, _awake, _embeds, _guided, _pair, _quiet, _vae

Net = Callable[[torch.Tensor, float], torch.Tensor]
PLAIN = {"num_inference_steps": 6, "guidance_scale": 3.0}


def sana() -> Any:
    torch.manual_seed(0)
    net = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2, decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _quiet(SanaPipeline(
        transformer=_awake(net), vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    ))  # fmt: skip


def _masked(length: int = 7, width: int = 16) -> dict[str, Any]:
    mask = torch.ones(1, length, dtype=torch.long)
    return {
        "prompt_embeds": _embeds((1, length, width), 1), "prompt_attention_mask": mask,
        "negative_prompt_embeds": _embeds((1, length, width), 2), "negative_prompt_attention_mask": mask,
    }  # fmt: skip


def sana_inputs() -> dict[str, Any]:
    more = {"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None}
    return _masked() | PLAIN | more


def sana_network(pipe: Any, i: dict[str, Any]) -> Net:
    text, mask = _pair(i, "prompt_embeds"), _pair(i, "prompt_attention_mask")

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        out = pipe.transformer(torch.cat([x, x]), text, torch.full((2,), t), encoder_attention_mask=mask).sample
        return _guided(out, 3.0)

    return both


def hunyuandit() -> Any:
    torch.manual_seed(0)
    net = HunyuanDiT2DModel(
        sample_size=16, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, hidden_size=16, text_len=7,
        text_len_t5=7, activation_fn="gelu-approximate",
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction",
        clip_sample=False, steps_offset=1,
    )  # fmt: skip
    return _quiet(HunyuanDiTPipeline(
        vae=_vae(4), transformer=_awake(net), scheduler=scheduler, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ))  # fmt: skip


def hunyuandit_inputs() -> dict[str, Any]:
    second = {f"{k}_2": v for k, v in _masked().items()}
    return _masked() | second | PLAIN | {"height": 128, "width": 128, "use_resolution_binning": False}


def hunyuandit_network(pipe: Any, i: dict[str, Any]) -> Net:
    side = 128 // 8 // 2
    crop = get_resize_crop_region_for_grid((side, side), 512 // 8 // 2)
    more = {
        "encoder_hidden_states": _pair(i, "prompt_embeds"), "text_embedding_mask": _pair(i, "prompt_attention_mask"),
        "encoder_hidden_states_t5": _pair(i, "prompt_embeds_2"),
        "text_embedding_mask_t5": _pair(i, "prompt_attention_mask_2"),
        "image_meta_size": torch.tensor([[1024.0, 1024, 128, 128, 0, 0]] * 2),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, crop, (side, side), output_type="pt"),
    }  # fmt: skip

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        return _guided(pipe.transformer(torch.cat([x, x]), torch.full((2,), t), **more).sample.chunk(2, 1)[0], 3.0)

    return both


def lumina2() -> Any:
    torch.manual_seed(0)
    net = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )  # fmt: skip
    return _quiet(Lumina2Pipeline(
        transformer=_awake(net), vae=_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), text_encoder=None,
        tokenizer=None,
    ))  # fmt: skip


def lumina2_inputs() -> dict[str, Any]:
    return _masked() | PLAIN | {"height": 32, "width": 32}


def lumina2_network(pipe: Any, i: dict[str, Any]) -> Net:
    """Its clock runs from noise to data, and so does its velocity; guidance keeps the conditional norm of each row."""

    def one(x: torch.Tensor, t: float, prefix: str) -> torch.Tensor:
        time = 1 - torch.full((1,), t) / 1000
        return pipe.transformer(x, time, i[f"{prefix}prompt_embeds"], i[f"{prefix}prompt_attention_mask"]).sample

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        c, u = one(x, t, ""), one(x, t, "negative_")
        return -_normed(u + 3.0 * (c - u), c)

    return both


def _normed(guided: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def qwen() -> Any:
    torch.manual_seed(0)
    net = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return _quiet(QwenImagePipeline(
        transformer=_awake(net), vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    ))  # fmt: skip


def qwen_inputs() -> dict[str, Any]:
    text = {
        "prompt_embeds": _embeds((1, 7, 16), 1), "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
        "negative_prompt_embeds": _embeds((1, 7, 16), 2),
        "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
    }  # fmt: skip
    return text | {"height": 32, "width": 32, "num_inference_steps": 6, "true_cfg_scale": 3.0}


def qwen_network(pipe: Any, i: dict[str, Any]) -> Net:
    def one(x: torch.Tensor, t: float, prefix: str) -> torch.Tensor:
        time = torch.full((1,), t) / 1000
        text = i[f"{prefix}prompt_embeds"]
        return pipe.transformer(x, text, None, time, img_shapes=[[(1, 8, 8)]]).sample

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        c, u = one(x, t, ""), one(x, t, "negative_")
        return _normed(u + 3.0 * (c - u), c)

    return both


def ddpm() -> Any:
    """A U-Net of pixels with a learned variance, whose x0 is clipped to [-1, 1]."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    return _quiet(DDPMPipeline(unet=_awake(net), scheduler=scheduler))


def ddpm_ask(pipe: Any, latents: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    """It takes no latents: they are handed over where it draws them. What it ends with, before pixels in [0, 1]."""
    with pytest.MonkeyPatch.context() as patch:
        if latents is not None:
            patch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *_, **__: latents)
        return pipe(**given, output_type="pt").images * 2 - 1


def ddpm_network(pipe: Any, i: dict[str, Any]) -> Net:
    return lambda x, t: pipe.unet(x, torch.tensor(t)).sample


IMAGES = [
    Family("sana", sana, sana_inputs, sana_network, (1, 4, 16, 16)),
    Family("hunyuandit", hunyuandit, hunyuandit_inputs, hunyuandit_network, (1, 4, 16, 16)),
    Family("lumina2", lumina2, lumina2_inputs, lumina2_network, (1, 4, 4, 4), 2),
    Family("qwen", qwen, qwen_inputs, qwen_network, (1, 64, 16), 2),
    Family("ddpm", ddpm, lambda: {"num_inference_steps": 6}, ddpm_network, (1, 3, 16, 16), ask=ddpm_ask),
]
