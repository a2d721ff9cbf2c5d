"""What every feature cache shares: a module that runs, or gives again what it returned last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.method import Refused
from hasten.moment import Moment, now
from hasten.patch import Patch

Decide = Callable[[Moment], bool]
"""Whether what was kept may be given again at this moment."""

Form = tuple[torch.Size, torch.dtype] | None
"""Shape and dtype of a tensor, None where there is none."""


def form(x: Tensor | None) -> Form:
    """What an input must have in common with the one that something was kept for."""
    return None if x is None else (x.shape, x.dtype)


@dataclass(frozen=True, slots=True)
class Held:
    """What a module returned, and for which form of input, when."""

    moment: Moment
    form: Form
    out: Any
    versions: tuple[int, ...]

    @classmethod
    def of(cls, here: Moment, x: Tensor | None, out: Any) -> Held:
        """`out`, which a module returned for `x`."""
        return cls(here, form(x), out, _versions(out))

    def usable(self, here: Moment, x: Tensor | None) -> bool:
        """Taken earlier in this very trajectory, on the same branch, for an input of the same form."""
        return here.since(self.moment) > 0 and self.moment.branch == here.branch and self.form == form(x)


def hold(patch: Patch, module: nn.Module, decide: Decide, weight: int = 1) -> None:
    """Makes `module` run, or, where `decide` says so and there is something kept, give its last output again.

    What was kept is read only in the trajectory and on the branch that it was taken on, so step 0 reads nothing; it is
    dropped when a new trajectory begins on that branch.

    Args:
        weight: what it counts for in the handle's tally of what ran and what was reused.

    Raises, at the call:
        Refused: the network writes into what it was given, so that what was kept is no longer what was computed.
    """
    kept: dict[str, Held] = {}

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here, x = now(), first_tensor(args, kwargs)
        held = kept.get(here.branch)
        if held is not None and held.usable(here, x) and decide(here):
            if held.versions != _versions(held.out):
                raise Refused(
                    f"what a {type(module).__name__} returned was written into afterwards, as FreeU does, so it can't "
                    "be reused: call pipe.disable_freeu(), or leave the cache out"
                )
            patch.tally["reused"] += weight
            return held.out
        patch.tally["ran"] += weight
        kept.pop(here.branch, None)  # where the forward raises, nothing stale is left
        out = forward(*args, **kwargs)
        kept[here.branch] = Held.of(here, x, out)
        return out

    patch.wrap(module, around, traced=False)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor that a module is called with: its image states, in every family."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def _versions(out: Any) -> tuple[int, ...]:
    """How often each tensor of an output was written to; of inference mode's nothing is known."""
    if isinstance(out, Tensor):
        return () if out.is_inference() else (out._version,)
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, list | tuple) else ()
    return tuple(v for part in parts for v in _versions(part))


def same(a: Any, b: Any) -> bool:
    """Whether two inputs of a network are the same, tensors by their numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
