"""A standard Stable Diffusion 3 in small: its networks, its tokenizer, and the module that is trained.

Everything is a plain class of diffusers or transformers, so that `StableDiffusion3Pipeline.from_pretrained` loads the
result with no hasten installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from hasten.bridge import small
from hasten.tokens.joint import BiasedJointAttention, explicit

systems: tuple[str, ...] = ("sd3",)

WIDTH, TEXT, LENGTH, VOCABULARY = 256, 128, 16, 2048
T5_LENGTH = 256  # the pipeline's default max_sequence_length: that many zero tokens where there is no T5


class Autoencoder(nn.Module):
    """`AutoencoderTiny` as one call for training: (pictures, noise) -> (pictures again, latents)."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.vae.encoder(x)
        return self.vae.decoder(z + noise), z


class TextToVelocity(nn.Module):
    """Text encoders and transformer as one call for training: (x, t, ids) -> velocity, as the pipeline wires them.

    The pipeline has 256 zero tokens where T5 would be. They are alike, so they stay alike in every block, and one of
    them with ln 256 added to its logits gives the same attention: that one is what is trained with, at a third of the
    tokens.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
        self.transformer = pipe.transformer
        self.transformer.set_attn_processor(BiasedJointAttention(explicit))

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x [B, 4, h, w], t [B] in [0, 1], ids [B, 16]."""
        outs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        text = torch.cat([o.hidden_states[-2] for o in outs], -1)
        pooled = torch.cat([o.text_embeds for o in outs], -1)
        text = F.pad(text, (0, 0, 0, 1))
        tokens = (x.shape[-2] // 2) * (x.shape[-1] // 2) + text.shape[1]
        bias = text.new_zeros(1, 1, 1, tokens)
        bias[..., -1] = math.log(T5_LENGTH)
        joint = {"attention_mask": bias}
        return self.transformer(x, text, pooled, t * 1000, joint_attention_kwargs=joint, return_dict=False)[0]


def tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a vocabulary learned from `captions`; any alphabet can be written in it."""
    base = CLIPTokenizer()
    learned = base.train_new_from_iterator(captions, VOCABULARY)
    learned.model_max_length = LENGTH
    return learned


def kept_tokenizer(folder: Path, captions: Callable[[], Iterable[str]]) -> CLIPTokenizer:
    """The tokenizer kept in `folder`, learned there on the first run: learning breaks ties at random, so a second one
    numbers its words anew, and a resumed run would read other words than it was trained on."""
    if not folder.exists():
        fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
        tokenizer(captions()).save_pretrained(fresh)
        fresh.rename(folder)
    return CLIPTokenizer.from_pretrained(folder)


def autoencoder() -> AutoencoderTiny:
    """f4, 4 latent channels, 0.5 M parameters."""
    wide = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (32, 32, 32))
    return AutoencoderTiny(latent_channels=4, num_encoder_blocks=(1, 3, 4), num_decoder_blocks=(4, 3, 1), **wide)


def pipeline(words: CLIPTokenizer, vae: AutoencoderTiny) -> StableDiffusion3Pipeline:
    """Untrained: an MM-DiT of six blocks of width 256, two text encoders of two layers of width 128."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT, intermediate_size=4 * TEXT, projection_dim=TEXT, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, hidden_act="gelu",
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=64,
        num_attention_heads=WIDTH // 64, joint_attention_dim=2 * TEXT, caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
        text_encoder=CLIPTextModelWithProjection(text), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=words,
        text_encoder_3=no_t5(), tokenizer_3=no_t5_tokenizer(),
    )  # fmt: skip


def no_t5() -> T5EncoderModel:
    """A T5 of no layers and a zero norm: its output is exactly the zeros that the pipeline puts where T5 is left out.
    Without it `from_pretrained` would have to be told `text_encoder_3=None`."""
    config = T5Config(vocab_size=3, d_model=2 * TEXT, d_kv=8, d_ff=8, num_heads=1, num_layers=0)
    encoder = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def no_t5_tokenizer() -> T5Tokenizer:
    """Says "unknown" to everything."""
    words = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0)], extra_ids=0)
    words.model_max_length = T5_LENGTH
    return words


def write(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Saves `pipe` with diffusers' own attention and weights in half precision.

    Raises:
        ModelError: the folder cannot be written.
    """
    pipe.transformer.set_attn_processor(JointAttnProcessor2_0())
    small.write(pipe, folder)
