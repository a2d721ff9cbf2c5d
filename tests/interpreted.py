"""Triton kernels on a CPU: a module of kernels, loaded anew with a copy of Triton that runs them as plain Python."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

VARIABLE = "TRITON_INTERPRET"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """Within, the module `name` (such as hasten.kernels.sage_triton) and Triton are fresh copies whose kernels take CPU
    tensors; after it both are what they were, and so is the environment.

        @pytest.fixture(scope="module")
        def kernels():
            with interpreted("hasten.kernels.sage_triton") as module:
                yield module
    """
    with _fresh(name, "1") as module:
        _round_as_torch(importlib.import_module("triton.runtime.interpreter"))
        yield module


@contextmanager
def compiled(name: str) -> Iterator[ModuleType]:
    """Within, they are fresh copies whose kernels `triton.compile` takes, also inside `interpreted`."""
    with _fresh(name, None) as module:
        yield module


def built_for(kernel: Any, target: int, constants: dict[str, Any], warps: int, stages: int, **types: str) -> Any:
    """A kernel of `compiled` as it is built for a GPU of this compute capability; no GPU is needed for that. Arguments
    are int32 unless `types` says otherwise ("*fp16")."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {n: named.get(n, "i32") for n in kernel.arg_names}, constants)
    return compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "num_stages": stages})


@contextmanager
def _fresh(name: str, interpret: str | None) -> Iterator[ModuleType]:
    # Triton reads the variable where a kernel is decorated, and its own tl.max and the like are decorated when it is
    # first imported, which another test may have done: so the copy is Triton's too. Its compiled part loads only once,
    # and then belongs to Triton itself.
    importlib.import_module("triton")
    parent, _, leaf = name.rpartition(".")
    owner = importlib.import_module(parent)
    kept = {n: sys.modules.pop(n) for n in list(sys.modules) if _anew(n, name)}
    attribute, variable = owner.__dict__.pop(leaf, None), os.environ.get(VARIABLE)
    _set(interpret)
    try:
        yield importlib.import_module(name)
    finally:
        for n in [n for n in sys.modules if _anew(n, name)]:
            del sys.modules[n]
        sys.modules.update(kept)
        owner.__dict__.pop(leaf, None)
        if attribute is not None:
            setattr(owner, leaf, attribute)
        _set(variable)


def _set(value: str | None) -> None:
    os.environ.pop(VARIABLE, None)
    if value is not None:
        os.environ[VARIABLE] = value


def _anew(module: str, name: str) -> bool:
    return module == name or (module.split(".")[0] == "triton" and not module.startswith("triton._C"))


def _round_as_torch(interpreter: Any) -> None:
    """The interpreter cuts what it casts to bfloat16, and loses the carry into the exponent of a float8: torch's casts,
    to the nearest as on a GPU, take their place."""
    theirs, tl = interpreter._convert_float, interpreter.tl
    places = {tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8), tl.bfloat16: (torch.bfloat16, torch.uint16)}

    def convert(array: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in places:
            return theirs(array, source, target, rounding)
        narrow, bits = places[target]
        wide = torch.from_numpy(array.view("float32").copy())
        wide = wide.clamp(-448, 448) if target == tl.float8e4nv else wide  # a GPU's cast saturates
        return wide.to(narrow).view(bits).numpy()

    interpreter._convert_float = convert
