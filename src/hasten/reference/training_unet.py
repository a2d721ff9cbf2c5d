"""How `emoji-unet` is trained: its U-Net and text encoder together, on the autoencoder of `emoji-flow`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hasten import reference
from hasten.bridge import folders, small_sd
from hasten.objectives.pretrain.v_prediction import VPrediction
from hasten.paths.discrete import scaled_linear, to_pure_noise
from hasten.reference import emoji
from hasten.reference.training import captioned, sheet
from hasten.train.loop import train
from hasten.train.optimizer import muon, trapezoid


def train_pipeline(
    out: Path, steps: int, seed: int = 0, device: str | None = None, start: Path | None = None
) -> Any:  # fmt: skip
    """Trains the U-Net and, from that of `emoji-flow`, the text encoder, or goes on with those of the pipeline `start`;
    writes a diffusers pipeline in half precision to `out`/pipeline and a sample grid at every checkpoint.

    Hours on two CPU cores; resumes from `out`.
    """
    if start is not None:
        pipe: Any = folders.read(start)
    else:
        flow: Any = reference.pipeline("emoji-flow")
        pipe = small_sd.pipeline(flow.tokenizer, flow.vae, flow.text_encoder)

    def look(step: int, nets: dict[str, nn.Module]) -> None:
        place = next(nets["denoiser"].parameters()).device
        sheet(pipe.to(place), out / f"grid-{step:06d}.png")

    train_unet(pipe, out / "unet", emoji.pictures().float() / 127.5 - 1, steps, seed, device, look)
    small_sd.write(pipe, out / "pipeline")
    return pipe


def train_unet(
    pipe: Any, folder: Path, pixels: Tensor, until: int, seed: int = 0, device: str | None = None,
    look: Callable[[int, dict[str, nn.Module]], None] | None = None, size: int = 32,
) -> None:  # fmt: skip
    """U-Net and text encoder of `pipe`, in place, by v-prediction on latents of pictures [N, 3, 64, 64] in [-1, 1].

    Not compiled: on two cores that takes minutes and makes a step no shorter.
    """
    net = small_sd.TextToV(pipe)
    train(
        VPrediction(to_pure_noise(scaled_linear())), {"denoiser": net}, captioned(pipe, pixels, size, seed),
        optimizers=muon, until=until, rate=trapezoid(until, 200), seed=seed, folder=folder, look=look, device=device,
        every=250, decay=0.998,
    )  # fmt: skip
