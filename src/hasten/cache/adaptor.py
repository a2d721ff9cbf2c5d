"""Clockwork's adaptor: a light network that stands for a U-Net's low-resolution part at one step."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten import labelled


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an adaptor fits.

    Attributes:
        level: stage of the U-Net where its low-resolution part begins.
        into, out: channels of r_in and r_out.
        time, text: of the embeddings; text 0 where the network is given none.
        width: channels inside.
    """

    level: int
    into: int
    out: int
    time: int
    text: int = 0
    width: int = 64

    @classmethod
    def of(cls, level: int, r_in: Tensor, r_out: Tensor, temb: Tensor, text: Tensor | None, width: int = 64) -> Sizes:
        """Those of an adaptor for these features."""
        return cls(level, r_in.shape[1], r_out.shape[1], temb.shape[1], 0 if text is None else text.shape[1], width)


class Adaptor(nn.Module):
    """phi(r_in, r_out of the step before, temb, text) -> r_out: a strided convolution to half the side, the text's
    projection added, two ResNet blocks with the time added, a transposed convolution back, and a residual connection
    from r_out. Habibian et al. 2023, arXiv:2312.08128 sec. 4.2 and fig. 3.

    r_in, which is half as large as what the low-resolution part returns, is brought to its size by repeating pixels,
    and joined to it. The last convolution starts at zero: an untrained adaptor is the identity on r_out.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, w = sizes, sizes.width
        self.down = nn.Conv2d(sizes.into + sizes.out, w, 3, stride=2, padding=1)
        self.text = nn.Linear(sizes.text, w) if sizes.text else None
        self.blocks = nn.ModuleList([_ResBlock(w, sizes.time) for _ in range(2)])
        self.up = nn.ConvTranspose2d(w, sizes.out, 4, stride=2, padding=1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def forward(self, r_in: Tensor, r_out: Tensor, temb: Tensor, text: Tensor | None = None) -> Tensor:
        """[B, out, H, W] from r_in [B, into, h, w], r_out [B, out, H, W], temb [B, time] and text [B, text]."""
        h, w = r_out.shape[-2:]
        x = self.down(torch.cat([F.interpolate(r_in, size=(h, w), mode="nearest"), r_out], 1))
        if self.text is not None and text is not None:
            x = x + self.text(text)[:, :, None, None]
        for block in self.blocks:
            x = block(x, temb)
        return r_out + self.up(x)[..., :h, :w]

    def write(self, file: str | os.PathLike[str]) -> None:
        """One safetensors file, whole or not at all."""
        labelled.write(file, "cache.clockwork", self.state_dict(), sizes=json.dumps(asdict(self.sizes)))

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Adaptor:
        """Raises ValueError, in one line, where there is no such file or it holds something else."""
        state, about = labelled.read(file, "cache.clockwork", "adaptor", "Adaptor.write")
        adaptor = cls(Sizes(**json.loads(about["sizes"])))
        adaptor.load_state_dict(state)
        return adaptor.eval()


class _ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + linear(silu(temb)))))."""

    def __init__(self, width: int, time: int) -> None:
        super().__init__()
        groups = gcd(8, width // 4, width)  # of one channel each they would take out what the time adds
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(time, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(temb))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))
