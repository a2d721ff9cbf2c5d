"""Token reduction on one self-attention of 4,096 tokens (width 320, 8 heads, guidance's two rows), everything included:
matching, merging, projections, attention, copying back; against the same layer untouched.

    python benchmarks/tokens.py         minutes, one thread; writes benchmarks/results/tokens.json

A ratio above 1 is a gain. Errors are of the layer's output before its residual, ||y - y0|| / ||y0||, on features that
change smoothly over the picture with a tenth of noise; and of the latents that the trained emoji-flow draws in 8
steps, where a picture has 64 tokens and everything is in it.
"""

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from hasten import moment, reference
from hasten.measure.flops import count as flops
from hasten.measure.machine import machine
from hasten.measure.timing import compare
from hasten.moment import Moment
from hasten.tokens.asymmetric import Asymmetric
from hasten.tokens.downsample import Downsample
from hasten.tokens.merge import Merge

WIDTH, HEADS, BATCH, PAIRS, STEPS = 320, 8, 2, 6, 20
PICTURE, VIDEO = (1, 64, 64), (4, 32, 32)
CASES = [
    (PICTURE, Merge(ratio=0.25)), (PICTURE, Merge(ratio=0.5)), (PICTURE, Merge(ratio=0.75)),
    (PICTURE, Downsample(factor=2)), (PICTURE, Downsample(factor=4)),
    (VIDEO, Asymmetric(queries=0.3, keys=0.3)), (VIDEO, Asymmetric(queries=0.5, keys=0.3)),
    (VIDEO, Asymmetric(queries=0.7, keys=0.3)), (VIDEO, Asymmetric(queries=0.7, keys=0.5)),
    (VIDEO, Asymmetric(queries=0.7, keys=0.5, reuse=1)),
]  # fmt: skip
PROMPTS = ["a red apple", "dog face"]
DRAWN = [Merge(ratio=0.25), Merge(ratio=0.5), Downsample(factor=2), Asymmetric(queries=0.5, keys=0.3)]
RESULT = Path(__file__).parent / "results" / "tokens.json"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(WIDTH), Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)

    def forward(self, hidden_states):
        return self.attn1(self.norm1(hidden_states))


class Net(nn.Module):
    """One layer of a picture or video [B, width, frames, rows, columns]."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Layer()])
        self.config = SimpleNamespace(patch_size=1, in_channels=WIDTH)

    def forward(self, hidden_states):
        return self.blocks[0](hidden_states.flatten(2).transpose(1, 2))


def features(grid):
    frames, rows, columns = grid
    coarse = torch.randn(BATCH, WIDTH, max(1, frames // 2), 8, 8)
    smooth = F.interpolate(coarse, size=(frames, rows, columns), mode="trilinear")
    return smooth + 0.1 * torch.randn_like(smooth)


def measure(grid, method):
    torch.manual_seed(0)
    net, fast, x, steps = Net(), Net(), features(grid), count()
    fast.load_state_dict(net.state_dict())

    def moved():  # each call is the next evaluation of a trajectory
        i = next(steps)
        with moment.at(Moment(step=i % STEPS, steps=STEPS, run=i // STEPS)):
            return fast(x)

    with method.apply(fast), torch.no_grad():
        plain = net(x)
        error = float((moved() - plain).norm() / plain.norm())
        cost = flops(moved) / flops(lambda: net(x))
        found = compare(lambda: net(x), moved, pairs=PAIRS)
    row = {"method": method.label(), "settings": method.model_dump(), "grid": grid, "error": error, "flops": cost}
    print(
        method.label(), method.model_dump(exclude_defaults=True), f"error {error:.3f}", found.speedup.text(), flush=True
    )
    return row | {"time": found.to_dict()}


def drawn():
    pipe = reference.pipeline("emoji-flow")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        rng = torch.Generator().manual_seed(0)
        return pipe(PROMPTS, num_inference_steps=8, generator=rng, output_type="latent").images

    plain, rows = draw(), []
    for method in DRAWN:
        with method.apply(pipe.transformer):
            error = float((draw() - plain).norm() / plain.norm())
        rows.append({"method": method.label(), "settings": method.model_dump(), "error": error})
        print("emoji-flow", method.label(), method.model_dump(exclude_defaults=True), f"error {error:.3f}", flush=True)
    return rows


def main():
    torch.set_num_threads(1)
    found = {
        "layer": {"tokens": 4096, "width": WIDTH, "heads": HEADS, "batch": BATCH, "pairs": PAIRS},
        "rows": [measure(*case) for case in CASES], "emoji_flow": drawn(), "machine": machine(),
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
