"""What `anatomy` says of a network is what happens in it when a pipeline of its family runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from families import Family
from families_more import MORE
from hasten.anatomy import Anatomy, anatomy
from hasten.bridge.pipelines import networks
from pipelines import PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
each = pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in (*PIPELINES, *MORE)])


class Seen:
    """Calls of modules in one evaluation of each network, in the order they began and ended."""

    def __init__(self, family: Family) -> None:
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
        self.order: list[str] = []
        pipe = family.build()
        self.parts: list[tuple[str, Anatomy]] = []
        handles = []
        for part, net in networks(pipe).items():
            self.parts.append((part, anatomy(net)))
            for name, module in net.named_modules():
                handles.append(module.register_forward_hook(self._note(f"{part}.{name}"), with_kwargs=True))
        family.call(pipe)
        for handle in handles:
            handle.remove()

    def _note(self, name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if name not in self.calls:
                self.calls[name] = args, kwargs, out
                self.order.append(name)

        return note


@each
def test_streams_pass_from_block_to_block_unchanged(family: Family) -> None:
    """So image and text states are where the anatomy says, in arguments and in what is returned, whatever their order,
    and a chain's residual is its last output minus its first input."""
    seen = Seen(family)
    for part, found in seen.parts:
        assert found.chains
        for chain in (*found.chains, *found.text):
            streams = []
            for block in chain:
                args, kwargs, out = seen.calls[f"{part}.{block.name}"]
                assert found.root.get_submodule(block.name) is block.module
                before, after = block.inputs(args, kwargs), block.outputs(out)
                assert after.x.shape == before.x.shape
                if after.c is not None:
                    assert before.c is not None
                    assert after.c.shape == before.c.shape
                    assert after.c.shape != after.x.shape
                assert block.give(after, not isinstance(out, torch.Tensor))[0] is out[0] or isinstance(
                    out, torch.Tensor
                )
                streams.append((before, after))
            for (_, after), (before, _) in pairwise(streams):
                assert torch.equal(after.x, before.x)
                assert after.c is None or torch.equal(after.c, before.c)


@each
def test_attentions_are_called_as_their_kind_says(family: Family) -> None:
    seen = Seen(family)
    for part, found in seen.parts:
        for site in found.attentions():
            args, kwargs, out = seen.calls[f"{part}.{site.name}"]
            x = args[0] if args else kwargs["hidden_states"]
            c = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            match site.kind:
                case "cross":
                    assert isinstance(out, torch.Tensor)
                    assert c.shape != x.shape or not torch.equal(c, x)
                case "joint":
                    assert isinstance(out, tuple) or c is None or c is x
                case _:
                    assert isinstance(out, torch.Tensor)
                    assert c is None or c is x
    if family.name in ("svd", "animatediff", "latte"):
        assert seen.parts[0][1].attentions("temporal")


KINDS = {
    "sd": {"self", "cross"}, "sd3": {"joint"}, "flux": {"joint"}, "pixart": {"self", "cross"}, "dit": {"self"},
    "cogvideox": {"joint"}, "hunyuan_video": {"joint"}, "wan": {"self", "cross"}, "lumina2": {"joint"},
    "animatediff": {"self", "cross", "temporal"}, "latte": {"self", "cross", "temporal"}, "mochi": {"joint"},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_families(name: str) -> None:
    family = next(f for f in (*PIPELINES, *MORE) if f.name == name)
    for net in networks(family.build()).values():
        assert {a.kind for a in anatomy(net).attentions()} == KINDS[name]


@each
def test_text_is_set_apart_and_no_image_block_sees_it_alone(family: Family) -> None:
    """Blocks of the text give the same at every step where they do not see the time; a cache of the image leaves them
    alone."""
    for part, found in Seen(family).parts:
        names = {b.name.split(".")[0] for chain in found.text for b in chain}
        want = {"lumina2": {"context_refiner"}, "hunyuan_video": {"context_embedder"}}.get(family.name, set())
        assert names == want, part


@each
def test_stages_of_a_unet_are_in_the_order_that_they_run(family: Family) -> None:
    seen = Seen(family)
    for part, found in seen.parts:
        has = hasattr(found.root, "down_blocks")
        assert (found.unet is not None) == has
        if found.unet is None:
            continue
        where = {id(m): f"{part}.{n}" for n, m in found.root.named_modules()}
        listed: list[nn.Module] = []
        for stage in (*found.unet.down, None, *found.unet.up):
            if stage is None:
                listed.append(found.unet.middle)  # type: ignore[arg-type]
                continue
            for layer in stage.layers:
                listed.extend(layer)
            listed.extend([stage.sampler] if stage.sampler is not None else [])
        names = [where[id(m)] for m in listed]
        wanted = set(names)
        assert [n for n in seen.order if n in wanted] == names


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_chains_are_in_the_order_that_they_run_whatever_the_tree_says(name: str) -> None:
    """Another library that takes the lists away and puts them back leaves the module tree in another order."""
    family = next(f for f in PIPELINES if f.name == name)
    (net,) = networks(family.build()).values()
    before = [b.name for b in anatomy(net).blocks]
    net._modules["transformer_blocks"] = net._modules.pop("transformer_blocks")
    assert [n for n, _ in net.named_children()][-1] == "transformer_blocks"
    assert [b.name for b in anatomy(net).blocks] == before
    assert "single" not in before[0]
    assert any("single" in n for n in before)


def test_members_that_are_none_are_passed_over() -> None:
    class Hollow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.rest = nn.ModuleList([nn.Linear(4, 4)])
            self.rest._modules["1"] = None  # type: ignore[assignment]

    assert len(anatomy(Hollow()).blocks) == 2


def test_a_network_in_which_nothing_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="no repeated blocks found in Linear"):
        anatomy(nn.Linear(2, 2))
