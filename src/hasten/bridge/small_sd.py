"""A standard Stable Diffusion in small: its networks, and the module that is trained.

Everything is a plain class of diffusers or transformers, so that `StableDiffusionPipeline.from_pretrained` loads the
result with no hasten installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hasten.bridge import small
from hasten.tokens.joint import explicit

STEPS = 1000
"""Of the table of betas."""

CHANNELS, HEADS = (64, 128, 192), (2, 4, 6)
"""At 16x16, 8x8 and 4x4 latents; the heads are 32 wide."""


class ExplicitAttention:
    """What diffusers' own processor computes in a U-Net's transformer blocks, by `explicit`, whose backward pass is
    faster on CPU."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Any:
        """x_BNC, and the context [B, M, D] that it attends to, itself where there is none; no mask."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        y = explicit(heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context)))
        return attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))


class TextToV(nn.Module):
    """Text encoder and U-Net as one call for training: (x, t, ids) -> v, as the pipeline wires them."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        super().__init__()
        self.text_encoder, self.unet = pipe.text_encoder, pipe.unet
        self.unet.set_attn_processor(ExplicitAttention())

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x [B, 4, h, w], t [B] in (0, 1], of which step i of the table is (i + 1) / 1000, ids [B, 16]."""
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(x, t * STEPS - 1, text, return_dict=False)[0]


def pipeline(words: CLIPTokenizer, vae: AutoencoderTiny, encoder: CLIPTextModelWithProjection) -> Any:
    """A U-Net of 12.6 M parameters, untrained, with a copy of the weights of `encoder` as its text encoder.

    Its scheduler is Stable Diffusion's table, moved to zero terminal signal-to-noise ratio, under v-prediction (Lin et
    al. 2023, arXiv:2305.08891): the data's backgrounds are white, and noise that keeps a share of the signal would
    tell. The last layer of every residual branch starts at zero.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=HEADS, cross_attention_dim=encoder.config.hidden_size, use_linear_projection=True,
    )  # fmt: skip
    last = [m for n, m in unet.named_modules() if n.endswith((".conv2", ".proj_out", "conv_out"))]
    for parameter in (p for m in last for p in m.parameters()):
        nn.init.zeros_(parameter)
    text = CLIPTextModel(encoder.config)
    getattr(text, "text_model", text).load_state_dict(encoder.text_model.state_dict())  # transformers 4 nests it
    scheduler = DDIMScheduler(
        num_train_timesteps=STEPS, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
        clip_sample=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, vae=vae, text_encoder=text.eval(), tokenizer=words, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def write(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Saves `pipe` with diffusers' own attention and weights in half precision.

    Raises:
        ModelError: the folder cannot be written.
    """
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    small.write(pipe, folder)
