"""Ten digits as a law whose denoiser, per class and in all, and whose classifier are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node

ROWS = """
### .#. ### ### #.# ### ### ### ### ###
#.# ##. ..# ..# #.# #.. #.. ..# #.# #.#
#.# .#. ### .## ### ### ### .#. ### ###
#.# .#. #.. ..# ..# ..# #.# .#. #.# ..#
### ### ### ### ..# ### ### .#. ### ###
"""
PIXELS, VARIANTS, FLIPS = 15, 20, 2


def pictures() -> tuple[Tensor, Tensor]:
    """[200, 15] of -1 and 1, each a digit with two pixels wrong, and the digit of each."""
    rows = [line.split() for line in ROWS.split("\n") if line]
    glyphs = torch.tensor([[p == "#" for row in rows for p in row[d]] for d in range(10)]).float() * 2 - 1
    labels = torch.arange(10).repeat_interleave(VARIANTS)
    order = torch.rand(len(labels), PIXELS, generator=torch.Generator().manual_seed(0)).argsort(1)
    return glyphs[labels].scatter(1, order[:, :FLIPS], -glyphs[labels].gather(1, order[:, :FLIPS])), labels


class Digits:
    """x0 ~ N(picture, var), every picture as likely."""

    def __init__(self, var: float) -> None:
        self.var, (self.means, self.labels) = var, pictures()

    def log_parts(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Log density at x [B, 15] of each noised picture, up to a constant, [B, 200]."""
        spread = self.var * alpha**2 + sigma**2
        far = (x**2).sum(-1, keepdim=True) - 2 * alpha * (x @ self.means.T) + alpha**2 * PIXELS  # pixels are -1 or 1
        return -far / (2 * spread)

    def denoise(self, labels: Tensor | None = None) -> Denoiser:
        """Exact; of the classes `labels` [B], or of all."""
        wrong = None if labels is None else self.labels != labels[:, None]

        def ask(x: Tensor, n: Node) -> Prediction:
            parts = self.log_parts(x, n.alpha, n.sigma)
            parts = parts if wrong is None else parts.masked_fill(wrong, -torch.inf)
            mean = parts.softmax(-1) @ self.means
            gain = self.var * n.alpha / (self.var * n.alpha**2 + n.sigma**2)
            x0 = mean + gain * (x - n.alpha * mean)
            return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)

        return ask

    def sample(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """[size, 15] and [size]."""
        which = torch.randint(len(self.labels), (size,), generator=rng)
        return self.means[which] + self.var**0.5 * torch.randn(size, PIXELS, generator=rng), self.labels[which]

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """How often the nearest picture is of the class wanted."""
        return float((self.labels[self._nearest(x)] == labels).float().mean())

    def diversity(self, x: Tensor) -> float:
        """How many pictures the samples are near to: e to the entropy of the nearest ones, up to 200."""
        share = torch.bincount(self._nearest(x), minlength=len(self.means)).float() / len(x)
        return float(torch.special.entr(share).sum().exp())

    def _nearest(self, x: Tensor) -> Tensor:
        return (x @ self.means.T).argmax(-1)
