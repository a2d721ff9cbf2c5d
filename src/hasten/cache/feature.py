"""Attentions, feed-forwards and residual branches at key steps only; norms, modulation, skips and time go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import RESIDUAL, anatomy
from hasten.cache.hold import Held, first_tensor, hold
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch

Kind = Literal["attention", "feed_forward", "residual"]
KINDS: tuple[Kind, ...] = ("attention", "feed_forward", "residual")
PARALLEL = ("proj_mlp", "proj_out")
"""Children of a block that runs its feed-forward beside its attention and joins both in the second."""


class Feature(Method):
    """Runs what `keep` names at every `every`-th step and gives its last output in between, while norms, modulation,
    gates, skips, shortcuts and the time's path are computed at every step. every = 1 changes nothing.

    On transformers this is FORA (Selvaraju et al. 2024, arXiv:2407.01425 sec. 3.2); on U-Nets, with the branch of each
    residual block, the feature reuse of FRDiff (So et al. 2023, arXiv:2312.03517 sec. 3; there a whole transformer's
    branch is kept, here its attentions and feed-forwards, so its norms go on).

    FRDiff's score mixing (its sec. 3 and the authors' code): at a step between, the network's answer e becomes w e +
    (1 - w) e_key, with e_key the answer at the last key step and w = clip((temperature (s - mix) + 2) / 4, 0, 1) at the
    share s of the trajectory: early the answer at fewer steps, whose cost is nothing where w = 0, late the reused
    features. The default `mix` is w = 1 throughout: features alone; the authors' is 0.5. mix = 1.1 is w = 0 throughout.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    systems: ClassVar = ("frdiff",)
    neutral: ClassVar[dict[str, Any]] = {"every": 1}

    every: int = Field(2, ge=1, le=20, json_schema_extra={"high": 10})
    keep: tuple[Kind, ...] = Field(KINDS, strict=False, min_length=1)
    mix: float = Field(-0.1, ge=-0.1, le=1.1, description="share of the trajectory where reuse takes over")
    temperature: float = Field(30.0, ge=20, le=200, description="how fast it takes over")

    def apply(self, model: nn.Module) -> Patch:
        modules = list(parts(model, self.keep))
        if not modules:
            raise Refused(
                f"cache.feature finds no {' or '.join(self.keep)} in {type(model).__name__}: name other kinds in "
                "`keep`, or take cache.interval, which acts on whole blocks"
            )
        with Patch() as patch:
            if self.every > 1:
                for module in modules:
                    hold(patch, module, self._between)
                if weight(0.0, self.mix, self.temperature) < 1:
                    self._mix(patch, model)
            return patch.keep()

    def _between(self, here: Moment) -> bool:
        return here.step % self.every != 0

    def _mix(self, patch: Patch, model: nn.Module) -> None:
        keys: dict[str, Held] = {}

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here, x = now(), first_tensor(args, kwargs)
            key = keys.get(here.branch)
            if key is None or not key.usable(here, x) or not self._between(here):
                keys.pop(here.branch, None)  # where the forward raises, nothing stale is left
                out = forward(*args, **kwargs)
                keys[here.branch] = Held.of(here, x, out)
                return out
            w = weight(here.step / here.steps, self.mix, self.temperature)
            if w == 0:
                patch.tally["answered"] += 1
                return key.out
            out = forward(*args, **kwargs)
            return out if w == 1 else mixed(out, key.out, w)

        patch.wrap(model, around)


def parts(model: nn.Module, keep: tuple[Kind, ...]) -> Iterator[nn.Module]:
    """The modules whose outputs are kept, each once.

    Of a block whose feed-forward runs beside its attention (single-stream blocks), the layer that joins them is kept
    too where both are. Of a residual block, both convolutions: the second's output is the branch, the first's is then
    not asked for.
    """
    blocks = [b for chain in anatomy(model).chains for b in chain]
    found: dict[nn.Module, None] = {}
    for block in blocks:
        beside = [block.module._modules.get(n) for n in PARALLEL]
        if "attention" in keep:
            found |= dict.fromkeys(site.module for site in block.attentions)
        if "feed_forward" in keep:
            found |= dict.fromkeys(feed for _, feed in block.feed_forwards)
        if block.attentions and not block.feed_forwards and beside[0] is not None and "feed_forward" in keep:
            found |= dict.fromkeys(m for m in beside[: 2 if "attention" in keep else 1] if m is not None)
    if "residual" in keep:
        for module in model.modules():
            convolutions = [module._modules.get(n) for n in RESIDUAL]
            found |= dict.fromkeys(c for c in convolutions if c is not None) if None not in convolutions else {}
    yield from found


def weight(share: float, mix: float, temperature: float) -> float:
    """w of the answer with reused features, in [0, 1], at a share of the trajectory: 1/2 at `mix`, 0 and 1 from 2 /
    temperature before and after it."""
    return min(1.0, max(0.0, (temperature * (share - mix) + 2) / 4))


def mixed(new: Any, key: Any, w: float) -> Any:
    """w new + (1 - w) key of every tensor, in the container it came in."""
    if isinstance(new, Tensor):
        return w * new + (1 - w) * key
    if isinstance(new, dict):
        return type(new)(**{k: mixed(v, key[k], w) for k, v in new.items()})
    if isinstance(new, list | tuple):
        return type(new)(mixed(a, b, w) for a, b in zip(new, key, strict=True))
    return new
