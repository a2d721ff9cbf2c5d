"""A small U-Net of handwritten digits that reads their names by cross-attention, trained in seconds."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from digits import fitted, written_digits
from hasten import moment
from hasten.moment import Moment

WORDS, WIDTH = 2, 16
NOTHING = 10
"""The name of no digit in particular."""


@cache
def trained(steps: int = 150) -> tuple[Any, nn.Embedding]:
    """A network that says the flow eps - x0 of 8 x 8 digits, and the two words that each name is."""
    x0, names = written_digits().view(-1, 1, 8, 8), labels()
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=None, cross_attention_dim=WIDTH,
    )  # fmt: skip
    words, rng = nn.Embedding(11, WORDS * WIDTH), torch.Generator().manual_seed(0)

    def loss(_: int) -> Tensor:
        n, t = torch.randint(len(x0), (32,), generator=rng), torch.rand(32, generator=rng)
        y = torch.where(torch.rand(32, generator=rng) < 0.15, NOTHING, names[n])
        eps = torch.randn(32, 1, 8, 8, generator=rng)
        x = (1 - t)[:, None, None, None] * x0[n] + t[:, None, None, None] * eps
        said = net(x, t * 1000, words(y).unflatten(1, (WORDS, WIDTH))).sample
        return (said - (eps - x0[n])).square().mean()

    fitted([*net.parameters(), *words.parameters()], steps, 4e-3, loss)
    return net.eval(), words


def labels() -> Tensor:
    """[1797] of what each digit is."""
    found = find_spec("sklearn")
    assert found is not None  # written_digits has read from there
    assert found.submodule_search_locations
    file = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    return torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64)[:, 64])


@torch.no_grad()
def drawn(names: Tensor, steps: int, run: int, scale: float = 3.0) -> Tensor:
    """[N, 1, 8, 8]: Euler steps with guidance, both branches in one batch, from the same noise each time."""
    net, words = trained()
    x = torch.randn(len(names), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    text = words(torch.cat([torch.full_like(names, NOTHING), names])).unflatten(1, (WORDS, WIDTH))
    for step in range(steps):
        t = 1 - step / steps
        ahead = tuple(1000 * (1 - i / steps) for i in range(step, steps))
        with moment.at(Moment(step, steps, t, run, "both", scale, ahead=ahead)):
            u, c = net(torch.cat([x, x]), torch.tensor(1000 * t), encoder_hidden_states=text).sample.chunk(2)
        x = x - (u + scale * (c - u)) / steps
    return x
