"""Where things sit in a network: blocks, chains of blocks, attentions, feed-forwards, the stages of a U-Net. Found from
structure, once, at `apply`; small tables where structure cannot tell."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

ATTENTION = ("attn", "attn1", "attn2")
FEED_FORWARD = ("ff", "ffn", "ff_context", "feed_forward", "mlp", "img_mlp", "txt_mlp")
RESIDUAL = ("conv1", "conv2")
LAYERS = ("resnets", "attentions", "motion_modules")
"""Lists of a U-Net's stage, in the order that a layer runs them."""

TEXT = ("context_refiner", "token_refiner")
"""Lists under such a name see the text alone."""

TEMPORAL = ("temporal", "motion")
"""Lists and classes under such a name attend over time."""

SINGLE = "single_"
"""Lists of one stream are so called beside those of two and run after them, whatever the order of the module tree,
which another library's patch may have left changed."""

JOINT = ("Lumina2",)
"""Families that join text and image to one stream before their blocks."""

Kind = Literal["self", "cross", "joint", "temporal"]


@dataclass(frozen=True, slots=True)
class Streams:
    """What passes from block to block: image tokens x and, in two-stream networks, context tokens c."""

    x: Tensor
    c: Tensor | None = None


@dataclass(frozen=True)
class Site:
    """An attention of a block.

    Attributes:
        name: dotted, from the root.
        kind: "self" among image tokens, "cross" from image to text, "joint" of both, "temporal" among frames.
    """

    name: str
    module: nn.Module
    kind: Kind


@dataclass(frozen=True)
class Block:
    """One repeated unit of a network, with the way to read its inputs and outputs whatever its family.

    Attributes:
        name: dotted, from the root.
        module: called as module(x, ...) or module(hidden_states=x, encoder_hidden_states=c, ...).
        flipped: of two streams it returns (c, x), as SD3's and Flux's blocks; else (x, c), as CogVideoX's.
        attentions: in the order of its children.
        feed_forwards: (dotted name, module).
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    flipped: bool = True
    attentions: tuple[Site, ...] = ()
    feed_forwards: tuple[tuple[str, nn.Module], ...] = ()

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams among the arguments of a call."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        return Streams(given[self.parameters[0]], given.get("encoder_hidden_states"))

    def outputs(self, out: Any) -> Streams:
        """The streams in what the block returned: x, or both."""
        if isinstance(out, Tensor):
            return Streams(out)
        return Streams(out[1], out[0]) if self.flipped else Streams(out[0], out[1])

    def give(self, streams: Streams, two: bool) -> Any:
        """The streams in the form the block returns."""
        if not two:
            return streams.x
        return (streams.c, streams.x) if self.flipped else (streams.x, streams.c)


@dataclass(frozen=True)
class Stage:
    """A resolution of a U-Net, on its way down or up.

    Attributes:
        layers: (residual block, attention or None, ...) in the order that they run; each ends in a skip on the way
            down, and starts with one on the way up.
        sampler: to the next resolution, or None; ends in a skip of its own on the way down.
    """

    name: str
    module: nn.Module
    layers: tuple[tuple[nn.Module, ...], ...]
    sampler: nn.Module | None


@dataclass(frozen=True)
class UNet:
    """Stages of a U-Net, in the order that they run."""

    down: tuple[Stage, ...]
    middle: nn.Module | None
    up: tuple[Stage, ...]


@dataclass(frozen=True)
class Anatomy:
    """Attributes:
    chains: blocks on the image that run one after another with nothing between that changes shape; a residual over a
        chain is its last output minus its first input.
    text: chains that see the text alone.
    unet: stages and skips, where it has them.
    """

    root: nn.Module
    chains: tuple[tuple[Block, ...], ...]
    text: tuple[tuple[Block, ...], ...] = field(default=())
    unet: UNet | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every block, in the order that they run as far as names tell it; those of the text last."""
        return tuple(b for chain in (*self.chains, *self.text) for b in chain)

    def attentions(self, *kinds: Kind) -> tuple[Site, ...]:
        """Attentions of the image's blocks, of these kinds or of all."""
        return tuple(a for chain in self.chains for b in chain for a in b.attentions if not kinds or a.kind in kinds)

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """(dotted name, layer) of every plain linear inside a block."""
        for block in self.blocks:
            for name, module in block.module.named_modules():
                if type(module) is nn.Linear:
                    yield f"{block.name}.{name}", module


def anatomy(model: nn.Module) -> Anatomy:
    """Finds the parts of a network.

    A transformer block has a child `attn` or `attn1` (DiT, MM-DiT, video DiT, and the transformers inside a U-Net); a
    residual block has `conv1` and `conv2` and no shortcut. Where there is neither, the blocks are the members of the
    longest list of one class. Lists that run in turns, one block of each (`x` beside `temporal_x`), make no chains.

    Raises:
        ValueError: nothing repeats in it.
    """
    chains: list[tuple[Block, ...]] = []
    text: list[tuple[Block, ...]] = []
    joint = type(model).__name__.startswith(JOINT)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        children = [(f"{name}.{i}", child) for i, child in enumerate(module) if child is not None]
        if children and all(_is_transformer(child) for _, child in children):
            chain = tuple(_block(n, child, joint) for n, child in children)
            if any(part in TEXT for part in name.split(".")):
                text.append(chain)
            elif _in_turns(model, name):
                chains.extend((b,) for b in chain)
            else:
                chains.append(chain)
        else:
            chains.extend((_block(n, child),) for n, child in children if _is_residual(child))
    chains = chains or _longest_list(model)
    if not chains:
        raise ValueError(
            f"no repeated blocks found in {type(model).__name__}: this method works on networks made of them"
        )
    chains.sort(key=lambda chain: SINGLE in chain[0].name)
    return Anatomy(model, tuple(chains), tuple(text), _unet(model))


def _block(name: str, module: nn.Module, joint: bool = False) -> Block:
    parameters, flipped, two = _form(type(module).forward)
    temporal = any(word in f"{name} {type(module).__name__}".lower() for word in TEMPORAL)
    sites = []
    for child in ATTENTION:
        if (attention := module._modules.get(child)) is not None:
            sites.append(
                Site(f"{name}.{child}", attention, _kind(child, attention, parameters, two or joint, temporal))
            )
    feeds = tuple((f"{name}.{n}", m) for n in FEED_FORWARD if (m := module._modules.get(n)) is not None)
    return Block(name, module, parameters, flipped, tuple(sites), feeds)


def _kind(child: str, attention: nn.Module, parameters: tuple[str, ...], joint: bool, temporal: bool) -> Kind:
    if joint:
        return "joint"
    crosses = getattr(attention, "is_cross_attention", None)
    if crosses is None:
        crosses = child == "attn2" and "encoder_hidden_states" in parameters
    return "cross" if crosses else "temporal" if temporal else "self"


@cache
def _form(forward: Callable[..., Any]) -> tuple[tuple[str, ...], bool, bool]:
    """Parameters of a forward, whether it returns the context first, and whether it returns two streams: read from the
    names in its return statement."""
    parameters = tuple(inspect.signature(forward).parameters)[1:]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # its source is not there
        return parameters, True, False
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            names = [e.id if isinstance(e, ast.Name) else "" for e in node.value.elts]
            if "encoder_hidden_states" in names:
                return parameters, names[0] == "encoder_hidden_states", True
    return parameters, True, False


def _in_turns(model: nn.Module, name: str) -> bool:
    """Whether the list at `name` runs in turns with another, as blocks over space with blocks over time."""
    parent, _, leaf = name.rpartition(".")
    siblings = model.get_submodule(parent)._modules
    other = leaf.removeprefix("temporal_") if leaf.startswith("temporal_") else f"temporal_{leaf}"
    return isinstance(siblings.get(other), nn.ModuleList)


def _is_transformer(module: nn.Module) -> bool:
    return any(a in module._modules for a in ATTENTION)


def _is_residual(module: nn.Module) -> bool:
    return all(c in module._modules for c in RESIDUAL) and getattr(module, "conv_shortcut", None) is None


def _longest_list(model: nn.Module) -> list[tuple[Block, ...]]:
    lists = [
        tuple(_block(f"{name}.{k}" if name else k, child) for k, child in module.named_children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    alike = [chain for chain in lists if len({type(b.module) for b in chain}) == 1 and len(chain) > 1]
    return [max(alike, key=len)] if alike else []


def _unet(model: nn.Module) -> UNet | None:
    down, up = (getattr(model, f"{way}_blocks", None) for way in ("down", "up"))
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList):
        return None
    stages = [
        tuple(_stage(f"{way}_blocks.{i}", stage, f"{way}samplers") for i, stage in enumerate(part))
        for way, part in (("down", down), ("up", up))
    ]
    return UNet(stages[0], getattr(model, "mid_block", None), stages[1])


def _stage(name: str, stage: nn.Module, sampler: str) -> Stage:
    """Lists of a stage run side by side: the first of each, then the second of each."""
    lists = [list(m) for k in LAYERS if isinstance(m := stage._modules.get(k), nn.ModuleList)]
    samplers = stage._modules.get(sampler)
    last = samplers[0] if isinstance(samplers, nn.ModuleList) and len(samplers) else None
    layers = tuple(tuple(m for m in layer if m is not None) for layer in zip(*lists, strict=True))
    return Stage(name, stage, layers, last)
