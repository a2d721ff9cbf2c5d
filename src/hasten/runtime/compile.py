"""torch.compile, block by block."""

from __future__ import annotations

import shutil
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.anatomy import anatomy
from hasten.method import Method, Part, Refused, Stage
from hasten.patch import Patch


class Compile(Method):
    """Compiles each block on its own: alike blocks share one compilation, and caches stay outside at the blocks'
    borders.

    The first call pays for it (seconds to minutes, told apart in every report); then elementwise work is fused.
    """

    stage: ClassVar = Stage.COMPILE
    writes: ClassVar = frozenset({Part.GRAPH})
    sure: ClassVar = True

    def apply(self, model: nn.Module) -> Patch:
        _compiler_or_refuse(next(model.parameters()).device.type)
        with Patch() as patch:
            for block in anatomy(model).blocks:
                patch.set(block.module, "forward", torch.compile(block.module.forward, dynamic=False))
            return patch.keep()


def _compiler_or_refuse(device: str, which: Any = shutil.which) -> None:
    if device == "cpu" and not any(which(c) for c in ("g++", "clang++", "cl")):
        raise Refused("runtime.compile needs a C++ compiler on the CPU: install g++ or leave the method out")
