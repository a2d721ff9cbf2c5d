"""Reversible surgery: edits that record their own undo."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import IO, Any

import torch
from torch import nn

_MISSING = object()


class Patch(ExitStack):
    """The edits of one method; `remove` takes them back, newest first, and leaves every attribute as it was.

    Attributes:
        sites: the class of each thing edited.
        tally: what the edits did since, by name: "ran", "reused" ...
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[str] = []
        self.tally: Counter[str] = Counter()
        self._checks: dict[tuple[int, str], Callable[[], None]] = {}

    def remove(self) -> None:
        """Takes every edit back. Raises RuntimeError, before any change, if a later patch holds one of them."""
        Patch.check([self])
        self._checks.clear()
        self.close()

    @staticmethod
    def check(patches: Sequence[Patch]) -> None:
        """Raises RuntimeError if anything that these patches, in the order applied, set is held by a later one."""
        standing: dict[tuple[int, str], Callable[[], None]] = {}
        for patch in patches:
            standing |= patch._checks
        for look in standing.values():
            look()

    def keep(self) -> Patch:
        """Called last inside `with Patch() as patch`: hands the edits to the caller instead of undoing them."""
        kept = self.pop_all()
        kept.sites, kept.tally, kept._checks = self.sites, self.tally, self._checks
        return kept

    def set(self, owner: object, name: str, value: Any) -> None:
        """Sets an instance attribute; on removal puts back the old one, or its absence."""
        old = vars(owner).get(name, _MISSING)

        def check() -> None:
            if vars(owner).get(name) is not value:
                raise RuntimeError(
                    f"a later patch still holds {name!r} of {type(owner).__name__}; remove that one first"
                )

        def undo() -> None:
            vars(owner).pop(name, None) if old is _MISSING else vars(owner).__setitem__(name, old)

        # a module's own __setattr__ would file tensors and modules elsewhere: an attribute is what is asked for here
        vars(owner)[name] = value
        self._note(owner, name, check, undo)

    def wrap(self, module: nn.Module, around: Callable[..., Any], traced: bool = True) -> None:
        """Calls `around(forward, *args, **kwargs)` in place of `forward(*args, **kwargs)`.

        Args:
            traced: within compiled code it is compiled too. False for what counts, keeps state or enters a mode inside
                a block: it runs as plain Python there, with what it calls, since compiled code does not see modes and
                is compiled anew whenever a counter that it reads has changed.
        """
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs)

        self.set(module, "forward", forward if traced else torch.compiler.disable(forward))

    def after(self, owner: object, name: str, then: Callable[[], None]) -> None:
        """Calls `then()` once the owner's method `name` has returned; its signature still reads as before."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            then()
            return out

        self.set(owner, name, call)

    def swap(self, root: nn.Module, name: str, new: nn.Module) -> None:
        """Puts `new` in the place of the submodule `name` of `root` (dotted)."""
        parent, _, leaf = name.rpartition(".")
        owner = root.get_submodule(parent)
        old = owner._modules[leaf]

        def check() -> None:
            if owner._modules.get(leaf) is not new:
                raise RuntimeError(f"a later patch still holds {name!r}; remove that one first")

        owner._modules[leaf] = new
        self._note(owner, leaf, check, lambda: owner._modules.__setitem__(leaf, old))

    def park(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """Gives parameters and buffers the numbers they have, rounded to `dtype`. The old ones wait outside the
        memory that a device computes in: a CPU's in one temporary file, an accelerator's in host memory; removal
        reads them back."""
        wide = [t for t in dict.fromkeys(tensors) if t.dtype != dtype]
        if any(t.device.type == "cpu" for t in wide):
            shelf = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        for tensor in wide:
            old = tensor.data
            if tensor.device.type == "cpu":
                place = shelf.tell()
                shelf.write(old.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                back = partial(_read_back, shelf, place, old.dtype, old.shape, old.stride())
            else:
                back = partial(torch.Tensor.clone, old.cpu())
            tensor.data = old.to(dtype)
            del old

            def check(tensor: torch.Tensor = tensor) -> None:
                if tensor.dtype != dtype:  # its memory may be another since: `pipe.to(...)` is no patch
                    raise RuntimeError("a later patch (or a cast) still holds a weight; remove that one first")

            def undo(tensor: torch.Tensor = tensor, back: Callable[[], torch.Tensor] = back) -> None:
                tensor.data = back().to(tensor.device)

            self._note(tensor, "data", check, undo)

    def extend(self, owner: object, members: dict[str, Any]) -> None:
        """Gives one object a class of its own, with `members` over those of its class; others of the class keep
        theirs."""
        old = type(owner)
        named = {"__module__": old.__module__, "__qualname__": old.__qualname__, "__doc__": old.__doc__}
        new = type(old.__name__, (old,), {**named, **members})

        def check() -> None:
            if type(owner) is not new:
                raise RuntimeError(f"a later patch still holds the class of a {old.__name__}; remove that one first")

        owner.__class__ = new
        self._note(owner, "__class__", check, lambda: setattr(owner, "__class__", old))

    def _note(self, owner: object, part: str, check: Callable[[], None], undo: Callable[[], None]) -> None:
        self.sites.append(type(owner).__name__)
        self._checks[id(owner), part] = check  # of two edits at one place, only the newer can be seen to stand
        self.callback(undo)


def _read_back(
    shelf: IO[bytes], place: int, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...]
) -> torch.Tensor:
    shelf.seek(place)
    raw = bytearray(shelf.read(shape.numel() * dtype.itemsize))
    fresh = torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)
    laid = torch.empty_strided(shape, stride, dtype=dtype)
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)  # of an expanded dimension, one
    laid[once].copy_(fresh[once])
    return laid
