"""FRDiff on a U-Net that learned handwritten digits: work bought by reuse, or by fewer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from digits import written_digits
from digits_unet import drawn, trained
from hasten.cache.feature import Feature
from hasten.measure.frechet import frechet_small


def digits(steps: int, run: int, **settings: Any) -> tuple[float, int]:
    """Frechet distance of guided samples to written digits, of pixels, and the flops of the network for them."""
    net, _ = trained()
    with Feature(**settings).apply(net), FlopCounterMode(display=False) as flops:
        made = drawn(torch.arange(400) % 10, steps, run)
    return frechet_small(made.flatten(1), written_digits()), flops.get_total_flops()


@pytest.mark.system("frdiff")
def test_reuse_is_nearer_to_the_digits_than_fewer_steps_of_as_much_work() -> None:
    """Every second of 8, 16 and 20 steps reuses; the plain sampler has as few steps as cost no less. Score mixing costs
    less than features alone and ends on the same side."""
    for run, (steps, fewer) in enumerate([(8, 5), (16, 10), (20, 13)]):
        ours, spent = digits(steps, 3 * run, every=2)
        plain, more = digits(fewer, 3 * run + 1, every=1)
        assert 0.9 * more < spent < more
        assert ours < plain, steps
    mixed, least = digits(20, 10, every=2, mix=0.5)
    assert least < spent
    assert mixed < plain
