"""The U-Net of diffusion models, on signals, pictures or volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

systems = ("unet",)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class UNet(nn.Module):
    """Convolutions at falling resolutions and back, each stage on the way up reading what the way down left at its own
    (Ronneberger et al. 2015, arXiv:1505.04597), with residual blocks that the time shifts and attention where it is
    affordable (Ho et al. 2020, arXiv:2006.11239 app. B).

    In two dimensions its weights are those of diffusers' `UNet2DModel`, name by name; the names of its parts are what
    `hasten.anatomy` looks for, so every method for U-Nets works on it. In one dimension it is a network of
    trajectories, in three of volumes.

    Args:
        channels: of what it reads, and of what it says.
        widths: channels at each resolution; each is half the one before.
        layers: residual blocks at each resolution on the way down; one more on the way up.
        attend: whether each resolution attends. In the middle there is always attention.
        head: channels of an attention's head; divides every width that attends.
        dims: 1, 2 or 3.
        groups: of the norms; divides every width.

    Raises:
        ValueError: `attend` and `widths` differ in length, or `dims` is none of these.
    """

    def __init__(
        self, channels: tuple[int, int] = (3, 3), widths: Sequence[int] = (64, 128), layers: int = 2,
        attend: Sequence[bool] = (False, True), head: int = 32, dims: int = 2, groups: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(attend) != len(widths) or dims not in CONVOLUTIONS:
            raise ValueError(
                f"a U-Net needs one of attend for each of the {len(widths)} widths, and 1, 2 or 3 dims; given "
                f"{len(attend)} and {dims}"
            )
        conv, time = CONVOLUTIONS[dims], 4 * widths[0]
        self.width, self.reads = widths[0], layers + 1
        self.conv_in = conv(channels[0], widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(widths[0], time), "linear_2": nn.Linear(time, time)})
        shape = _Shape(conv, time, groups, head)
        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            begins = [skips[-1], *[width] * (layers - 1)]
            self.down_blocks.append(Down(shape, begins, width, attend[i], last))
            skips += [width] * (layers + (not last))
        self.mid_block = Middle(shape, widths[-1])
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            begins = [(before if j == 0 else width) + skips.pop() for j in range(layers + 1)]
            self.up_blocks.append(Up(shape, begins, width, attend[i], i == 0))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = conv(widths[0], channels[1], 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """sample [B, C, ...] whose sides halve len(widths) - 1 times, timestep [B] or one for all -> [B, C', ...]."""
        t = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).reshape(-1).expand(len(sample))
        t = self.time_embedding["linear_1"](waves(t, self.width).to(sample.dtype))
        t = self.time_embedding["linear_2"](silu(t))
        x = self.conv_in(sample)
        skips = [x]
        for stage in self.down_blocks:
            x, left = stage(x, t)
            skips += left
        x = self.mid_block(x, t)
        for stage in self.up_blocks:
            read, skips = skips[-self.reads :], skips[: -self.reads]
            x = stage(x, t, read)
        return self.conv_out(silu(self.conv_norm_out(x)))


def waves(t: Tensor, width: int) -> Tensor:
    """[B, width]: cosines, then sines, of t at frequencies from 1 to nearly 1/10000 (Ho et al. 2020)."""
    half = width // 2
    angles = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
    return torch.cat([angles.cos(), angles.sin()], 1)


class _Shape:
    """What the parts of one network have in common."""

    def __init__(self, conv: type[nn.Module], time: int, groups: int, head: int) -> None:
        self.conv, self.time, self.groups, self.head = conv, time, groups, head


class Stage(nn.Module):
    """The layers of a resolution: a residual block each, then attention where the resolution attends."""

    def __init__(self, shape: _Shape, begins: Sequence[int], width: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(shape, begin, width) for begin in begins)
        self.attentions = nn.ModuleList(Attention(shape, width) for _ in begins) if attends else None

    def layer(self, i: int, x: Tensor, t: Tensor) -> Tensor:
        x = self.resnets[i](x, t)
        return x if self.attentions is None else self.attentions[i](x)


class Down(Stage):
    """A resolution on the way down; says what it leaves for the way up, too."""

    def __init__(self, shape: _Shape, begins: Sequence[int], width: int, attends: bool, last: bool) -> None:
        super().__init__(shape, begins, width, attends)
        self.downsamplers = None if last else nn.ModuleList([Halve(shape, width)])

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        left = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, t)
            left.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            left.append(x)
        return x, left


class Middle(nn.Module):
    """The coarsest resolution: residual, attention, residual."""

    def __init__(self, shape: _Shape, width: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(shape, width)])
        self.resnets = nn.ModuleList(Residual(shape, width, width) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, t)), t)


class Up(Stage):
    """A resolution on the way up, each layer of which reads a skip, the last one first."""

    def __init__(self, shape: _Shape, begins: Sequence[int], width: int, attends: bool, last: bool) -> None:
        super().__init__(shape, begins, width, attends)
        self.upsamplers = None if last else nn.ModuleList([Double(shape, width)])

    def forward(self, x: Tensor, t: Tensor, skips: Sequence[Tensor]) -> Tensor:
        for i, skip in enumerate(reversed(skips)):
            x = self.layer(i, torch.cat([x, skip], 1), t)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Residual(nn.Module):
    """Two convolutions, between which the time is added to every place."""

    def __init__(self, shape: _Shape, begin: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(shape.groups, begin, eps=1e-5)
        self.conv1 = shape.conv(begin, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(shape.time, width)
        self.norm2 = nn.GroupNorm(shape.groups, width, eps=1e-5)
        self.conv2 = shape.conv(width, width, 3, padding=1)
        self.conv_shortcut = None if begin == width else shape.conv(begin, width, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = h + self.time_emb_proj(silu(t)).unflatten(1, (-1, *[1] * (h.ndim - 2)))
        h = self.conv2(silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Among all places of a resolution."""

    def __init__(self, shape: _Shape, width: int) -> None:
        super().__init__()
        self.heads = width // shape.head
        self.group_norm = nn.GroupNorm(shape.groups, width, eps=1e-5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (to(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](h).transpose(1, 2).view_as(x)


class Halve(nn.Module):
    """Every second place, by a convolution."""

    def __init__(self, shape: _Shape, width: int) -> None:
        super().__init__()
        self.conv = shape.conv(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Double(nn.Module):
    """Each place twice, and a convolution."""

    def __init__(self, shape: _Shape, width: int) -> None:
        super().__init__()
        self.conv = shape.conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
