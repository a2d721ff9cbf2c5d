"""How `emoji-flow` is trained: first its autoencoder, then its transformer and text encoders together; and what
`emoji-unet` has of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.bridge import folders, small, small_sd3
from hasten.bridge.drawing import draw, quiet
from hasten.measure.pictures import gallery, pictures
from hasten.objectives.pretrain.flow_matching import FlowMatching
from hasten.objectives.pretrain.reconstruct import Reconstruct
from hasten.reference import emoji
from hasten.train.loop import train
from hasten.train.optimizer import adamw, muon, trapezoid

SHOWN = (
    "red apple", "grinning face", "dog face", "pizza", "rocket", "flag: japan", "sunflower", "thumbs up, dark skin",
    "a cat with heart eyes", "soccer ball", "guitar", "bus", "tiger face", "strawberry", "crying face", "flag: france",
    "tulip", "pig face", "hamburger", "airplane", "house", "heart", "star", "snowman", "fish", "butterfly", "key",
    "umbrella", "mushroom", "police car", "flag: brazil", "robot face",
)  # fmt: skip
"""Prompts of the sample grids."""


def train_pipeline(
    out: Path, steps: int, autoencoder_steps: int, seed: int = 0, device: str | None = None, start: Path | None = None
) -> Any:
    """Trains everything, or, from `start`, goes on with its transformer and text encoders; writes a diffusers
    pipeline in half precision to `out`/pipeline and a sample grid at every checkpoint.

    Hours on two CPU cores; resumes from `out`.
    """
    pixels = emoji.pictures().float() / 127.5 - 1
    if start is not None:
        pipe = folders.read(start)
    else:
        vae = train_autoencoder(out / "autoencoder", pixels, autoencoder_steps, seed, device)
        pipe = small_sd3.pipeline(small_sd3.kept_tokenizer(out / "tokenizer", captions), vae)

    def look(step: int, nets: dict[str, nn.Module]) -> None:
        place = next(nets["denoiser"].parameters()).device
        sheet(pipe.to(place), out / f"grid-{step:06d}.png")

    train_transformer(pipe, out / "transformer", pixels, steps, seed, device, look)
    small_sd3.write(pipe, out / "pipeline")
    return pipe


def captions(seed: int = 0) -> list[str]:
    """What the tokenizer learns its words from: every name once, and eight captions of each picture."""
    rng = torch.Generator().manual_seed(seed)
    every = emoji.entries()
    return [n for e in every for n in e.names()] + [e.caption(rng) for e in every for _ in range(8)]


def train_autoencoder(
    folder: Path, pixels: Tensor, until: int, seed: int = 0, device: str | None = None, size: int = 32
) -> Any:
    """An `AutoencoderTiny` of pictures [N, 3, 64, 64] in [-1, 1]; prints the PSNR of every 40th at each checkpoint,
    dB."""
    weights = emoji.weights()
    net = small_sd3.Autoencoder(small_sd3.autoencoder())
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.compile()

    def batch(step: int, rng: torch.Generator) -> dict[str, Tensor]:
        rows = torch.multinomial(weights.to(rng.device), size, True, generator=rng).cpu()
        return {"x": pixels[rows], "noise": torch.randn(size, 4, 16, 16, generator=rng, device=rng.device)}

    def look(step: int, nets: dict[str, nn.Module]) -> None:
        x = pixels[::40].to(next(net.parameters()).device)
        with torch.no_grad():
            y, _ = nets["autoencoder"](x, torch.zeros((), device=x.device))
        print(f"step {step}: {psnr(y, x):.2f} dB", flush=True)

    train(
        Reconstruct(), {"autoencoder": net}, batch, optimizers=lambda nets: adamw(nets, 2e-3), until=until, seed=seed,
        rate=trapezoid(until, 100, 0.5), folder=folder, look=look, device=device, decay=0.995, every=200,
    )  # fmt: skip
    return net.vae


def psnr(y: Tensor, x: Tensor) -> float:
    """dB, of pictures in [-1, 1]."""
    return 10 * math.log10(4 / float((y.clamp(-1, 1) - x).square().mean()))


def train_transformer(
    pipe: Any, folder: Path, pixels: Tensor, until: int, seed: int = 0, device: str | None = None,
    look: Callable[[int, dict[str, nn.Module]], None] | None = None, size: int = 64,
) -> None:  # fmt: skip
    """Transformer and text encoders of `pipe`, in place, by flow matching on latents, a tenth of the captions left
    empty.

    Times lean towards noise: what a picture is of is decided there, and a flat drawing's details come easily.
    """
    net = small_sd3.TextToVelocity(pipe)
    net.compile()
    batch = captioned(pipe, pixels, size, seed)
    train(
        FlowMatching(location=0.5), {"denoiser": net}, batch, optimizers=muon, until=until, rate=trapezoid(until, 200),
        seed=seed, folder=folder, look=look, device=device, every=250, decay=0.998,
    )  # fmt: skip


def captioned(pipe: Any, pixels: Tensor, size: int, seed: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """Batches of `size` latents "x0" and caption "ids" for `train`, a tenth of the captions left empty; captions depend
    on (seed, step) alone."""
    z = small.latents(pipe.vae, pixels)
    entries, weights = emoji.entries(), emoji.weights()

    def batch(step: int, rng: torch.Generator) -> dict[str, Tensor]:
        rows = torch.multinomial(weights.to(rng.device), size, True, generator=rng).tolist()
        words = torch.Generator().manual_seed((seed << 20) + step)
        drop = torch.rand(size, generator=words) < 0.1
        texts = ["" if drop[i] else entries[r].caption(words) for i, r in enumerate(rows)]
        return {"x0": z[rows], "ids": small.ids(pipe, texts)}

    return batch


def sheet(pipe: Any, file: Path) -> None:
    """The 32 prompts as one picture."""
    with torch.no_grad():
        pixels = torch.cat(
            list(draw(quiet(pipe), SHOWN, [0] * len(SHOWN), 16, num_inference_steps=20, guidance_scale=3.0))
        )
    gallery(pictures(pixels), SHOWN, path=file)
