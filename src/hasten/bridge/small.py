"""What the small pipelines share: latents, token ids, and how they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import Tensor, nn

from hasten.bridge import folders


def latents(vae: AutoencoderTiny, pixels: Tensor) -> Tensor:
    """Scaled latents of pictures in [-1, 1], as the pipeline feeds its network, [N, 4, 16, 16] of 64 x 64 pixels."""
    with torch.no_grad():
        z = torch.cat([vae.encoder(part) for part in pixels.split(256)])
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def ids(pipe: Any, texts: list[str]) -> Tensor:
    """Token ids of `texts`, [B, L], L the length that the pipeline's tokenizer pads to."""
    return pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def write(pipe: DiffusionPipeline, folder: Path) -> None:
    """Saves `pipe` with its weights in half precision, which load as float32 everywhere; the pipeline stays so.

    Raises:
        ModelError: the folder cannot be written.
    """
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to("cpu", torch.float16)
    folders.write(pipe, folder)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where it was trained is nobody's business
        if file.parent.name == "vae":
            config.pop("block_out_channels", None)  # set again by the class itself, which warns of it
        if "text_encoder" in file.parent.name:  # transformers would load what the config says, or what is stored
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.glob("*/tokenizer_config.json"):
        config = json.loads(file.read_text())
        for how in ("is_local", "local_files_only"):  # how it was loaded, not what it is
            config.pop(how, None)
        file.write_text(json.dumps(config, indent=2) + "\n")
