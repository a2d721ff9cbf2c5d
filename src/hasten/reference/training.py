"""How `emoji-flow` is trained: first its autoencoder, then its transformer and text encoders together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging as quiet
from torch import Tensor, nn

from hasten.bridge import small_sd3
from hasten.objectives.pretrain.flow_matching import FlowMatching
from hasten.objectives.pretrain.reconstruct import Reconstruct
from hasten.reference import emoji
from hasten.train.loop import train
from hasten.train.optimizer import adamw, muon, trapezoid


def train_autoencoder(folder: Path, until: int = 4000, device: str | None = None, size: int = 32) -> nn.Module:
    x = emoji.pictures().float() / 127.5 - 1
    weights = emoji.weights()
    net = small_sd3.Autoencoder(small_sd3.autoencoder()).to(memory_format=torch.channels_last)
    net.compile()

    def batch(step: int, rng: torch.Generator) -> dict[str, Tensor]:
        rows = torch.multinomial(weights.to(rng.device), size, True, generator=rng).cpu()
        return {"x": x[rows], "noise": torch.randn(size, 4, 16, 16, generator=rng, device=rng.device)}

    def look(step: int, nets: dict[str, nn.Module]) -> None:
        with torch.no_grad():
            y, z = nets["autoencoder"](x[::40].to(next(net.parameters()).device), torch.zeros(()))
        print(f"step {step}: {psnr(y.cpu(), x[::40]):.2f} dB, latents' std {z.std((0, 2, 3)).tolist()}", flush=True)

    train(
        Reconstruct(), {"autoencoder": net}, batch, optimizers=lambda nets: adamw(nets, 2e-3), until=until,
        rate=trapezoid(until, 100, 0.5), folder=folder, look=look, device=device, decay=0.995, every=200,
    )  # fmt: skip
    return net


def psnr(y: Tensor, x: Tensor) -> float:
    """dB, of pictures in [-1, 1]."""
    return 10 * math.log10(4 / float((y.clamp(-1, 1) - x).square().mean()))


def latents(vae: nn.Module, x: Tensor) -> Tensor:
    """Scaled latents of pictures in [-1, 1], as the pipeline feeds its transformer, [B, 4, 16, 16]."""
    with torch.no_grad():
        z = torch.cat([vae.encoder(part) for part in x.split(256)])
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def train_transformer(pipe, folder: Path, until: int, device: str | None = None, size: int = 64, look=None) -> nn.Module:
    z = latents(pipe.vae, emoji.pictures().float() / 127.5 - 1)
    entries, weights = emoji.entries(), emoji.weights()
    net = small_sd3.TextToVelocity(pipe)
    net.compile()

    def batch(step: int, rng: torch.Generator) -> dict[str, Tensor]:
        rows = torch.multinomial(weights.to(rng.device), size, True, generator=rng).tolist()
        words = torch.Generator().manual_seed(step)
        drop = torch.rand(size, generator=words) < 0.1
        texts = ["" if drop[i] else entries[r].caption(words) for i, r in enumerate(rows)]
        ids = pipe.tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        return {"x0": z[rows], "ids": ids.input_ids}

    train(
        FlowMatching(), {"denoiser": net}, batch, optimizers=muon, until=until, rate=trapezoid(until, 200),
        folder=folder, look=look, device=device, every=250, decay=0.998,
    )  # fmt: skip
    return net
