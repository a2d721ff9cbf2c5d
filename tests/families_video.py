"""Tiny random pipelines of video and sound: Wan 2.2, CogVideoX, HunyuanVideo, LTX, Stable Video Diffusion, Stable
Audio."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    WanPipeline,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from families import Family, _awake, _embeds, _guided, _pair, _quiet, wan, wan_inputs
from families_image import PLAIN, Net, _masked
from hasten.brownian import Brownian

BOUNDARY = 0.875


def wan22() -> Any:
    """Two transformers: one for times from 875 up, one below, each with a guidance scale of its own."""
    low = wan().transformer
    torch.manual_seed(5)
    for p in low.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return _quiet(WanPipeline(**wan().components | {"transformer_2": low}, boundary_ratio=BOUNDARY))


def wan22_network(pipe: Any, i: dict[str, Any]) -> Net:
    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        high = t >= BOUNDARY * 1000
        net, scale = (pipe.transformer, 3.0) if high else (pipe.transformer_2, 2.0)
        c, u = (net(x, torch.full((1,), t), i[k]).sample for k in ("prompt_embeds", "negative_prompt_embeds"))
        return u + scale * (c - u)

    return both


def cogvideox() -> Any:
    torch.manual_seed(0)
    net = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        max_text_seq_length=7,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    )
    return _quiet(CogVideoXPipeline(
        transformer=_awake(net), vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    ))  # fmt: skip


def cogvideox_inputs() -> dict[str, Any]:
    text = {"prompt_embeds": _embeds((1, 7, 16), 1), "negative_prompt_embeds": _embeds((1, 7, 16), 2)}
    return text | PLAIN | {"height": 16, "width": 16, "num_frames": 5}


def cogvideox_network(pipe: Any, i: dict[str, Any]) -> Net:
    text = _pair(i, "prompt_embeds")
    return lambda x, t: _guided(pipe.transformer(torch.cat([x, x]), text, torch.full((2,), t)).sample, 3.0)


def hunyuan_video() -> Any:
    torch.manual_seed(0)
    net = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 2,
        up_block_types=("HunyuanVideoUpBlock3D",) * 2, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=2, spatial_compression_ratio=2,
    )  # fmt: skip
    return _quiet(HunyuanVideoPipeline(
        transformer=_awake(net), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    ))  # fmt: skip


def hunyuan_video_inputs() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": _embeds((1, 8), 3), "negative_pooled_prompt_embeds": _embeds((1, 8), 4)}
    return _masked() | pooled | PLAIN | {"true_cfg_scale": 2.0, "height": 16, "width": 16, "num_frames": 5}


def hunyuan_video_network(pipe: Any, i: dict[str, Any]) -> Net:
    def one(x: torch.Tensor, t: float, prefix: str) -> torch.Tensor:
        text, mask, pooled = (i[prefix + k] for k in ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds"))
        return pipe.transformer(x, torch.full((1,), t), text, mask, pooled, torch.tensor([3000.0])).sample

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        c, u = one(x, t, ""), one(x, t, "negative_")
        return u + 2.0 * (c - u)

    return both


def ltx() -> Any:
    torch.manual_seed(0)
    net = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    scaled = dict.fromkeys(("spatio_temporal_scaling", "decoder_spatio_temporal_scaling"), (True, True, False, False))
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, patch_size=1, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        **scaled,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return _quiet(LTXPipeline(transformer=_awake(net), vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None))


def ltx_inputs() -> dict[str, Any]:
    return _masked() | PLAIN | {"height": 32, "width": 32, "num_frames": 9}


def ltx_network(pipe: Any, i: dict[str, Any]) -> Net:
    text, mask = _pair(i, "prompt_embeds"), _pair(i, "prompt_attention_mask")
    time, space = pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio
    size = {"num_frames": 8 // time + 1, "height": 32 // space, "width": 32 // space}
    more = size | {"rope_interpolation_scale": (time / 25, space, space), "return_dict": False}
    return lambda x, t: _guided(
        pipe.transformer(torch.cat([x, x]), text, torch.full((2,), t), mask, **more)[0], 3.0
    )  # fmt: skip


def svd() -> Any:
    """Times are ln(sigma) / 4, up to sigma 700, far beyond the table that its scheduler also holds."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8,
        num_attention_heads=(2, 2), projection_class_embeddings_input_dim=24, addition_time_embed_dim=8, num_frames=2,
    )  # fmt: skip
    vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_type="continuous", timestep_spacing="leading", steps_offset=1, use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    return _quiet(StableVideoDiffusionPipeline(
        vae=vae.eval(), image_encoder=CLIPVisionModelWithProjection(vision).eval(), unet=_awake(unet),
        scheduler=scheduler, feature_extractor=CLIPImageProcessorPil(crop_size=8, size=8),
    ))  # fmt: skip


def svd_inputs() -> dict[str, Any]:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    return {
        "image": image, "height": 8, "width": 8, "num_frames": 2, "num_inference_steps": 6, "noise_aug_strength": 0.0,
        "min_guidance_scale": 1.0, "max_guidance_scale": 3.0,
    }  # fmt: skip


def svd_network(pipe: Any, i: dict[str, Any]) -> Net:
    """The first frame is not guided, the last by 3."""
    with torch.no_grad():
        image = pipe.video_processor.preprocess(i["image"], height=8, width=8)
        words = pipe._encode_image(i["image"], "cpu", 1, True)
        known = pipe._encode_vae_image(image, "cpu", 1, True)[:, None].repeat(1, 2, 1, 1, 1)
    ids = pipe._get_add_time_ids(6, 127, 0.0, torch.float32, 1, 1, True)
    scale = torch.tensor([1.0, 3.0])[None, :, None, None, None]

    def both(x: torch.Tensor, t: float) -> torch.Tensor:
        seen = torch.cat([torch.cat([x, x]), known], 2)
        u, c = pipe.unet(seen, torch.tensor(t), encoder_hidden_states=words, added_time_ids=ids).sample.chunk(2)
        return u + scale * (c - u)

    return both


class Interval:
    """Stands in for torchsde's BrownianInterval, which Stable Audio's own scheduler draws its noise from."""

    def __init__(self, size: tuple[int, ...], entropy: int, **_: Any) -> None:
        self.like, self.noise = torch.zeros(size), Brownian([entropy])

    def __call__(self, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        return self.noise(float(start), float(stop), self.like) * (stop - start).abs().sqrt()


def cosine() -> Any:
    """Stable Audio's scheduler, with torchsde or without."""
    absent = "torchsde" not in sys.modules
    if absent:
        sys.modules["torchsde"] = SimpleNamespace(BrownianInterval=Interval)  # type: ignore[assignment]
    try:
        from diffusers.schedulers.scheduling_cosine_dpmsolver_multistep import CosineDPMSolverMultistepScheduler
    finally:
        if absent:
            del sys.modules["torchsde"]
    return CosineDPMSolverMultistepScheduler()


def stable_audio() -> Any:
    """Times are the angle between sound and noise."""
    torch.manual_seed(0)
    net = StableAudioDiTModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=8, time_proj_dim=8,
        global_states_input_dim=16, cross_attention_input_dim=8,
    )  # fmt: skip
    words = StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is made with a weight norm that torch has deprecated
        vae = AutoencoderOobleck(
            encoder_hidden_size=4, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=4,
            channel_multiples=[1, 2], sampling_rate=4,
        )  # fmt: skip
    return _quiet(StableAudioPipeline(
        vae=vae, text_encoder=None, projection_model=words, tokenizer=None, transformer=_awake(net),
        scheduler=cosine(),
    ))  # fmt: skip


def stable_audio_inputs() -> dict[str, Any]:
    return {"prompt_embeds": _embeds((1, 7, 8), 1), "negative_prompt_embeds": _embeds((1, 7, 8), 2)} | PLAIN


def stable_audio_network(pipe: Any, i: dict[str, Any]) -> Net:
    with torch.no_grad():
        words = pipe.encode_prompt(None, "cpu", True, None, i["prompt_embeds"], i["negative_prompt_embeds"])
        start, end = pipe.encode_duration(0.0, 4.0, "cpu", True, 1)
    more = {
        "encoder_hidden_states": torch.cat([words, start, end], 1), "global_hidden_states": torch.cat([start, end], 2),
        "rotary_embedding": get_1d_rotary_pos_embed(4, 9, use_real=True, repeat_interleave_real=False),
    }  # fmt: skip
    return lambda x, t: _guided(
        pipe.transformer(torch.cat([x, x]), torch.tensor([t]), **more, return_dict=False)[0], 3.0
    )  # fmt: skip


def wan22_inputs() -> dict[str, Any]:
    return wan_inputs() | {"guidance_scale_2": 2.0}


VIDEOS = [
    Family("wan22", wan22, wan22_inputs, wan22_network, (1, 16, 2, 2, 2), 2),
    Family("cogvideox", cogvideox, cogvideox_inputs, cogvideox_network, (1, 2, 4, 8, 8)),
    Family("hunyuan_video", hunyuan_video, hunyuan_video_inputs, hunyuan_video_network, (1, 4, 2, 8, 8), 2),
    Family("ltx", ltx, ltx_inputs, ltx_network, (1, 192, 8)),
    Family("svd", svd, svd_inputs, svd_network, (1, 2, 4, 8, 8)),
    Family("stable_audio", stable_audio, stable_audio_inputs, stable_audio_network, (1, 4, 8)),
]
