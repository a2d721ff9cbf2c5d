"""Where things sit in a network: blocks, chains of blocks, linears. Found from structure, once, at `apply`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ATTENTION = ("attn", "attn1")
RESIDUAL = ("conv1", "conv2")


@dataclass(frozen=True, slots=True)
class Streams:
    """What passes from block to block: image tokens x and, in two-stream networks, context tokens c."""

    x: Tensor
    c: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """One repeated unit of a network, with the way to read its inputs and outputs whatever its family.

    Attributes:
        name: dotted, from the root.
        module: called as module(x, ...) or module(hidden_states=x, encoder_hidden_states=c, ...).
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams among the arguments of a call."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        return Streams(given[self.parameters[0]], given.get("encoder_hidden_states"))

    def outputs(self, out: Any) -> Streams:
        """The streams in what the block returned: x, or (c, x) as in SD3's and Flux's blocks."""
        return Streams(out) if isinstance(out, Tensor) else Streams(out[1], out[0])

    def give(self, streams: Streams, two: bool) -> Any:
        """The streams in the form the block returns."""
        return (streams.c, streams.x) if two else streams.x


@dataclass(frozen=True)
class Anatomy:
    """Attributes:
    chains: blocks that run one after another with nothing between that changes shape; a residual over a chain
        is its last output minus its first input.
    """

    root: nn.Module
    chains: tuple[tuple[Block, ...], ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every block, in the order of the module tree."""
        return tuple(b for chain in self.chains for b in chain)

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """(dotted name, layer) of every plain linear inside a block."""
        for block in self.blocks:
            for name, module in block.module.named_modules():
                if type(module) is nn.Linear:
                    yield f"{block.name}.{name}", module


def anatomy(model: nn.Module) -> Anatomy:
    """Finds the blocks of a network.

    A transformer block has a child `attn` or `attn1` (DiT, MM-DiT, video DiT, and the transformers inside a U-Net); a
    residual block has `conv1` and `conv2` and no shortcut. Where there is neither, the blocks are the members of the
    longest list of one class.

    Raises:
        ValueError: nothing repeats in it.
    """
    chains: list[tuple[Block, ...]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        members = [_block(f"{name}.{i}", child) for i, child in enumerate(module)]
        if all(_is_transformer(b.module) for b in members):
            chains.append(tuple(members))
        else:
            chains.extend((b,) for b in members if _is_residual(b.module))
    chains = chains or _longest_list(model)
    if not chains:
        raise ValueError(
            f"no repeated blocks found in {type(model).__name__}: this method works on networks made of them"
        )
    return Anatomy(model, tuple(chains))


def _block(name: str, module: nn.Module) -> Block:
    return Block(name, module, tuple(inspect.signature(type(module).forward).parameters)[1:])


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
