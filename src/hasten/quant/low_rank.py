"""A branch of low rank that takes what is large out of a weight, so that the rest fits into few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.format import Codes, Format, dequantize, quantize

Round = Callable[[Tensor], Codes]
"""The rest of a weight [O, I] -> its codes."""


@dataclass(frozen=True)
class Split:
    """w = up down + rest, to the rounding of the rest.

    Attributes:
        down: [R, I].
        up: [O, R].
        rest: codes of [O, I].
    """

    down: Tensor
    up: Tensor
    rest: Codes

    def weight(self) -> Tensor:
        """[O, I] what the layer multiplies with, but for the rounding of activations."""
        return self.up @ self.down + dequantize(self.rest)


def largest(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down [R, I], up [O, R]): the nearest matrix of this rank, by the singular value decomposition in double
    precision (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(w_OI.double(), full_matrices=False)
    return v[:rank].float(), (u[:, :rank] * s[:rank]).float()


def split(
    w_OI: Tensor, x_MI: Tensor, rank: int, weights: Format, inputs: Format | None = None, tries: int = 100
) -> tuple[Split, float]:
    """The branch and the rest whose output errs least on x, and its mean square error: by turns the branch is the
    largest part of what the rounded rest leaves, and the rest is rounded anew; the first turn that is not better is the
    last. Li et al. 2024, SVDQuant, arXiv:2411.05007 sec. 4.2; the turns as in the authors' deepcompressor.

    Args:
        w_OI, x_MI: both balanced already.
        inputs: of the activations that the rest reads, a scale a token or a group of one; None leaves them as they are.
            The branch reads them as they are.
    """
    w, x = w_OI.float(), x_MI.float()
    exact = x @ w.T
    read = x if inputs is None else dequantize(quantize(x, inputs))
    best: tuple[Split, float] | None = None
    rounded = torch.zeros_like(w)
    for _ in range(max(1, tries)):
        down, up = largest(w - rounded, rank) if rank else (w.new_zeros(0, w.shape[1]), w.new_zeros(len(w), 0))
        rest = quantize(w - up @ down, weights)
        rounded = dequantize(rest)
        off = float((read @ rounded.T + (x @ down.T) @ up.T - exact).square().mean())
        if best is not None and off >= best[1]:
            break
        best = Split(down, up, rest), off
        if not rank:
            break
    assert best is not None
    return best
