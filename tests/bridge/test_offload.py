"""Weights that wait on disk between their calls, by accelerate: methods do the same, or say that they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import hasten
from compatible import METHODS, recipe
from hasten.bridge.pipelines import networks
from hasten.method import Refused
from pipelines import PIPELINES

pytestmark = [pytest.mark.system("wan-2-2"), pytest.mark.usefixtures("compiler")]

WAN = next(f for f in PIPELINES if f.name == "wan22")


@pytest.fixture
def parted(tmp_path: Path) -> Iterator[Any]:
    """Wan 2.2 of two experts, neither of which holds a weight while it waits."""
    pipe = WAN.build()
    for name, net in networks(pipe).items():
        disk_offload(net, str(tmp_path / name), execution_device=torch.device("cpu"), offload_buffers=False)
    add_hook_to_module(pipe.vae, AlignDevicesHook(torch.device("cpu")))  # a pipeline asks its hooks where it runs
    yield pipe
    for net in (pipe.vae, *networks(pipe).values()):
        remove_hook_from_module(net, recurse=True)


def held(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters() if p.device.type != "meta")


def test_one_expert_at_a_time_holds_weights_and_less_than_it_has(parted: Any) -> None:
    """Of two experts in turns, with a cache on: what is in memory at any moment of either is less than the weights of
    one, and belongs to the one whose turn it is."""
    nets = networks(parted)
    size = sum(p.numel() * p.element_size() for p in WAN.build().transformer.parameters())
    most = dict.fromkeys(nets, 0)

    def look(*_: Any) -> None:
        for name, net in nets.items():
            most[name] = max(most[name], held(net))
        assert sum(held(net) > 0 for net in nets.values()) <= 1

    watched = [m for net in nets.values() for m in net.modules() if isinstance(m, nn.Linear)]
    with hasten.accelerate(parted, recipe("cache.interval")):
        hooks = [m.register_forward_hook(look) for m in watched]
        WAN.call(parted)
        for hook in hooks:
            hook.remove()
    assert all(0 < n < size / 2 for n in most.values()), (most, size)
    assert sum(map(held, nets.values())) == 0


@pytest.mark.parametrize("label", [m for m in METHODS if m != "runtime.compile"])
def test_every_method_draws_the_same_or_is_refused(label: str, parted: Any) -> None:
    plain, here = WAN.build(), WAN.call(parted)
    assert torch.equal(WAN.call(plain), here)
    try:
        handle = hasten.accelerate(plain, recipe(label))
    except Refused:
        pytest.skip("refused with its weights in memory too")
    with handle:
        want = WAN.call(plain)
    try:
        handle = hasten.accelerate(parted, recipe(label))
    except Refused as refused:
        assert "offload" in str(refused)
        return
    with handle:
        assert torch.equal(WAN.call(parted), want)
    assert torch.equal(WAN.call(parted), here)
