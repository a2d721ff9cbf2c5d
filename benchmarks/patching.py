"""`accelerate` and `remove` on a network of a thousand modules.

    python benchmarks/patching.py       seconds; writes benchmarks/results/patching.json

The claim: under 0.2 s for both together.
"""

import json
import time
from pathlib import Path

import torch
from torch import nn

import hasten
from hasten.measure.machine import machine
from hasten.measure.timing import Spread

RUNS, WIDTH, BLOCKS = 20, 16, 249  # a block is four modules; with the lists, the end and the root, 1,000
RECIPE = {"methods": [{"cache.interval": {"every": 2}}, "runtime.bf16"]}
RESULT = Path(__file__).parent / "results" / "patching.json"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ff, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states):
        return hidden_states + self.ff(self.attn(self.norm(hidden_states)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.ends = nn.ModuleList(Block() for _ in range(BLOCKS)), nn.Sequential(nn.Identity())

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.ends(x)


def main():
    torch.manual_seed(0)
    net, x, recipe = Net(), torch.randn(2, WIDTH), hasten.Recipe.from_dict(RECIPE)
    before = net(x)
    seconds = {"accelerate": [], "remove": [], "both": []}
    for i in range(RUNS + 1):
        start = time.perf_counter()
        handle = hasten.accelerate(net, recipe)
        put = time.perf_counter()
        handle.remove()
        done = time.perf_counter()
        if i > 0:  # the first warms up
            for name, s in (("accelerate", put - start), ("remove", done - put), ("both", done - start)):
                seconds[name].append(s)
    assert torch.equal(net(x), before)
    found = {
        "modules": sum(1 for _ in net.modules()), "parameters": sum(1 for _ in net.parameters()), "recipe": RECIPE,
        "runs": RUNS, "seconds": {name: Spread.of(s).to_dict() for name, s in seconds.items()}, "limit_seconds": 0.2,
        "machine": machine(),
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['modules']} modules:", {name: Spread.of(s).text(" s") for name, s in seconds.items()})


if __name__ == "__main__":
    main()
