"""Classifier guidance: an unconditional network and a classifier that knows noise make a conditional one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.grid import Node
from hasten.guidance.energy import energy

systems = ("adm",)


def classifier(
    denoise: Denoiser, network: Callable[[Tensor, Tensor], Tensor], labels: Tensor, *,
    scale: Annotated[float, Field(ge=0, le=100)] = 1.0,
) -> Denoiser:  # fmt: skip
    """The denoiser of p(x) p(y | x)^scale, by Bayes' rule on scores: that of x plus the gradient of log p(y | x_t). So
    scale = 1 with the true posterior is exactly the conditional denoiser, 0 the unconditional, and more trades variety
    for certainty.

    Dhariwal & Nichol 2021, arXiv:2105.05233 alg. 2, eps - sqrt(1 - alpha_bar) s grad, on every path. Algorithm 1 shifts
    the mean of a DDPM step by s Sigma grad instead; a DDPM step with this eps shifts it by beta / sqrt(1 - beta) s
    grad, the same for small steps.

    Args:
        network: (x [B, ...], t [B]) -> logits [B, K], trained on noised x; a module or a function.
        labels: classes wanted, [B], integers.

    One network call, and the classifier with its backward pass; the classifier is not asked at scale 0.

    Raises:
        ValueError: as many labels as rows were expected, or the logits are not [B, K].
    """

    def log_posterior(x: Tensor, node: Node) -> Tensor:
        logits = network(x, x.new_full(x.shape[:1], node.t))
        if logits.ndim != 2 or not len(x) == len(logits) == len(labels):
            raise ValueError(
                f"a label and logits [B, K] for each of {len(x)} rows were expected; given {len(labels)} labels and "
                f"logits {list(logits.shape)}"
            )
        return torch.log_softmax(logits, -1).gather(-1, labels.to(logits.device)[:, None])[:, 0]

    return energy(denoise, log_posterior, scale=scale)
