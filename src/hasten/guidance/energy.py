"""Energy guidance: any differentiable score of the state, or of the clean picture seen in it, steers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node

Score = Callable[[Tensor, Node], Tensor]
"""(x or x0 [B, ...], node) -> [B], more is better: log p(y | x_t), minus a loss, a similarity."""


def energy(
    denoise: Denoiser, score: Score, *,
    scale: Annotated[float, Field(ge=0, le=1000)] = 1.0,
    of: Literal["x", "x0"] = "x",
) -> Denoiser:  # fmt: skip
    """eps - scale sigma g and x0 + scale sigma^2 / alpha g, where g is the gradient of the score by the state: the
    denoiser of the law p(x) exp(scale score). scale = 0 changes nothing.

    of="x" gives the score the noisy state, for scores that know noise (a classifier trained on it: Dhariwal & Nichol
    2021, arXiv:2105.05233 alg. 2; a noised CLIP: Nichol et al. 2021, arXiv:2112.10741). of="x0" gives it x0 as
    the denoiser sees it, for any score of clean pictures, and takes the gradient through the network (Bansal et al.
    2023, arXiv:2302.07121, forward guidance).

    One network call; with "x0" one with its backward pass. At pure noise (alpha = 0) nothing is known of the picture,
    and nothing is added.

    Raises:
        ValueError: the score is not one number a row, or has no gradient.
    """
    if scale == 0:
        return denoise

    def guided(x: Tensor, node: Node) -> Prediction:
        if node.alpha == 0:
            return denoise(x, node)
        with torch.inference_mode(False), torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            p = denoise(point, node) if of == "x0" else None
            said = score(point if p is None else p.x0, node)
            if said.shape != x.shape[:1]:
                raise ValueError(f"a score is one number a row, {list(x.shape[:1])}; this one gave {list(said.shape)}")
            if not said.requires_grad:
                raise ValueError("the score has no gradient by the state: compute it from what it is given, in torch")
            (g,) = torch.autograd.grad(said.sum(), point)
        p = denoise(x, node) if p is None else p
        x0, eps = p.x0.detach() + scale * node.sigma**2 / node.alpha * g, p.eps.detach() - scale * node.sigma * g
        return Prediction(x, x0, eps, spread=p.spread)

    return guided
