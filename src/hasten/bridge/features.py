"""Features of the networks that papers report on, where the user has them: CLIP, DINOv2 and Inception."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.bridge.folders import ModelError, is_hub_id

CLIP, DINO = ("clip", "clip_vision_model"), ("dinov2", "dinov2_with_registers")


class Reader(Protocol):
    """8-bit pictures [B, 3, H, W] to features [B, D]."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Read:
    """Features of pictures [B, 3, H, W] in [0, 1], rounded to 8 bits as these networks are used in the literature.

    A picture with a pixel that is not finite has NaN for features, and no other has.
    """

    reader: Reader
    name: str
    batch: int = 16

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[B, D] float32 on the pictures' device. Raises ValueError for what is not [B, 3, H, W] floats."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"expected float pictures [B, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}")
        broken = ~images.flatten(1).isfinite().all(1)
        pixels = (images.nan_to_num(0, 0, 0).clamp(0, 1) * 255).round().to(torch.uint8)
        found = torch.cat([self.reader(part) for part in pixels.split(self.batch)]).float().to(images.device)
        return found.masked_fill(broken[:, None], torch.nan)


def encoder(model: str, device: str | torch.device = "cpu") -> Read:
    """CLIP's image embeddings, as in CMMD (Jayasumana et al. 2024, arXiv:2401.09603 section 4), or DINOv2's class
    token, as in FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675 section 3); `model` is a folder in the layout of
    transformers, or a hub id. Pictures are resized, cropped and normalised as its own preprocessor says.

    Raises:
        ModelError: it cannot be read, has pickled weights, or is neither.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    here = Path(model).exists()
    if not here and not is_hub_id(model):
        raise ModelError(
            f"{model}: no such folder; give a CLIP or DINOv2 folder, a hub id (owner/name) or an Inception .pt"
        )
    local = {"local_files_only": True} if here else {}
    try:
        kind = AutoConfig.from_pretrained(model, **local).model_type
        if kind not in (*CLIP, *DINO):
            raise ModelError(
                f"{model}: features of {kind!r} are not known; give CLIP, DINOv2 or an Inception file (.pt)"
            )
        whole = CLIPVisionModelWithProjection if kind in CLIP else AutoModel
        network = whole.from_pretrained(model, use_safetensors=True, **local).eval().to(device)
        processor = AutoImageProcessor.from_pretrained(model, **local)
    except ModelError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{model}: cannot be read for features: {' '.join(str(error).split())[:300]}") from error
    part = "image_embeds" if kind in CLIP else "pooler_output"

    def reader(pixels: Tensor) -> Tensor:
        arrays = list(pixels.permute(0, 2, 3, 1).cpu().numpy())
        inputs = processor(images=arrays, return_tensors="pt").to(device)
        found: Tensor = getattr(network(**inputs), part)
        return found

    return Read(reader, f"{kind} {Path(model).name}")


def inception(file: str | Path, device: str | torch.device = "cpu") -> Read:
    """The pooled features [B, 2048] of the Inception-v3 that Frechet distances are reported on (Heusel et al. 2017,
    arXiv:1706.08500), from the TorchScript file `inception-2015-12-05.pt`, which resizes by itself and is called as
    network(8-bit pictures, return_features=True).

    Raises:
        ModelError: no such file, or no TorchScript.
    """
    try:
        network: nn.Module | Any = torch.jit.load(str(file), map_location=device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{file}: cannot be read as TorchScript ({why}); give inception-2015-12-05.pt") from error
    return Read(lambda pixels: network(pixels.to(device), return_features=True), f"inception {Path(file).stem}")
