"""TeaCache: what enters the first block, after the time has modulated it, tells how much the output changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import Block, anatomy
from hasten.cache.first_block import change
from hasten.cache.hold import first_tensor
from hasten.cache.residual import reuse
from hasten.halves import said
from hasten.method import Method, Part, Stage, in_memory
from hasten.moment import Moment, now
from hasten.patch import Patch


class Tea(Method):
    """Adds up f(relative L1 change, from one step to the next, of the timestep-modulated input of the first block);
    while the sum stays under `threshold` the blocks give their last residual again, else they run and the sum starts
    anew. The first and the last step always run. threshold = 0 changes nothing. Liu et al. 2024 (TeaCache),
    arXiv:2411.19108 sec. 3.3, eq. 4 to 7; `coefficients` are those of f, the highest power first (as of numpy.poly1d,
    and as the authors print them), by default the identity; `fit` finds them from a run under `record`. Below zero f
    counts as zero.

    The modulated input is what the first attention of the block that runs first is given, found by running that
    block up to there (a norm); a block without attention, as in a U-Net, is asked by its input. On an accelerator the
    decision is one number read back a step.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"threshold": 0.0}

    threshold: float = Field(0.2, ge=0, le=10, json_schema_extra={"high": 1.0})
    coefficients: tuple[float, ...] = Field((1.0, 0.0), strict=False, min_length=1, max_length=10)

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            if self.threshold > 0:
                in_memory(self, model)
                chains = anatomy(model).chains
                judge = _Judge(self.threshold, self.coefficients)
                for chain in chains:
                    reuse(patch, chain, judge.spares)
                for chain in chains:
                    patch.wrap(chain[0].module, judge.watch(chain[0]))
            return patch.keep()


@dataclass
class _Account:
    """One branch: when and by which block it was last asked, what entered then, the sum since the blocks ran, and the
    decision."""

    moment: Moment
    block: Block
    entered: Tensor
    total: float = 0.0
    spare: bool = False


class _Judge:
    """Decides once an evaluation and branch, when the first of the blocks that run is about to."""

    def __init__(self, threshold: float, coefficients: Sequence[float]) -> None:
        self.threshold, self.coefficients = threshold, coefficients
        self.accounts: dict[str, _Account] = {}

    def watch(self, block: Block) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here = now()
            last = self.accounts.get(here.branch)
            if last is None or here.since(last.moment) != 0 or last.block is block:
                self.accounts[here.branch] = self._judged(last, here, block, modulated(block, args, kwargs))
            return forward(*args, **kwargs)

        return around

    def spares(self, here: Moment) -> bool:
        return self.accounts[here.branch].spare

    def _judged(self, last: _Account | None, here: Moment, block: Block, entered: Tensor) -> _Account:
        new = _Account(here, block, entered)
        if last is None or here.step == 0 or here.since(last.moment) < 0 or last.entered.shape != entered.shape:
            return new
        new.total = last.total + rescaled(change(entered, last.entered), self.coefficients)
        new.spare = new.total < self.threshold and here.step < here.steps - 1
        new.total = new.total if new.spare else 0.0
        return new


class _Reached(Exception):
    """An attention was reached, with this input."""

    def __init__(self, entered: Tensor) -> None:
        self.entered = entered


def modulated(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the block's first attention would be given: its normed input, modulated as the family does it. The block's
    own input where it has no attention. Nothing stays changed: neither a graph nor another method's edits are
    touched."""

    def stop(*given: Any, **named: Any) -> None:
        found = first_tensor(given, named)
        raise _Reached(block.inputs(args, kwargs).x if found is None else found)

    with Patch() as patch:
        for site in block.attentions:
            patch.set(site.module, "forward", stop)
        if patch.sites:
            try:
                type(block.module).forward(block.module, *args, **kwargs)
            except _Reached as reached:
                return reached.entered
    return block.inputs(args, kwargs).x


def rescaled(moved: float, coefficients: Sequence[float]) -> float:
    """f(moved) of the polynomial, the highest power first; 0 where that is negative."""
    total = 0.0
    for c in coefficients:
        total = total * moved + c
    return max(0.0, total)


def fit(pairs: Sequence[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """Coefficients, the highest power first, of the polynomial that gives output changes from input changes with the
    least squared error (arXiv:2411.19108 eq. 6; the fourth degree is enough there).

    Raises:
        ValueError: there are not more input changes, all different, than the degree.
    """
    inputs, outputs = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True)) if pairs else (
        torch.empty(0), torch.empty(0))  # fmt: skip
    if len(inputs.unique()) <= degree:
        raise ValueError(
            f"a polynomial of degree {degree} needs {degree + 1} different input changes, given "
            f"{len(inputs.unique())}: record more steps or take a lower degree"
        )
    wide = inputs.abs().max().clamp_min(1e-30)  # powers of numbers about 1 keep their digits
    powers = torch.stack([(inputs / wide) ** k for k in range(degree, -1, -1)], 1)
    solved = torch.linalg.lstsq(powers, outputs[:, None], driver="gelsd").solution[:, 0]
    return tuple(float(c / wide**k) for c, k in zip(solved, range(degree, -1, -1), strict=True))


def record(model: nn.Module) -> tuple[Patch, list[tuple[float, float]]]:
    """Watches an untouched network: the list gets, each evaluation after the first of a trajectory and a branch, how
    far the modulated input and the output have changed. In a pipeline it goes on before the handle, whose clock then
    tells it the moment."""
    pairs: list[tuple[float, float]] = []
    entered: dict[str, tuple[Moment, Tensor]] = {}
    before: dict[str, tuple[Moment, Tensor, Tensor]] = {}

    def watch(block: Block) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            entered.setdefault(now().branch, (now(), modulated(block, args, kwargs)))
            return forward(*args, **kwargs)

        return around

    def end(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here = now()
        entered.pop(here.branch, None)
        out = forward(*args, **kwargs)
        first = entered.pop(here.branch, None)
        if first is None:  # no block ran
            return out
        new, old = (here, first[1], said(out).detach().clone()), before.get(here.branch)
        if old is not None and here.since(old[0]) == 1 and old[1].shape == new[1].shape:
            pairs.append((change(new[1], old[1]), change(new[2], old[2])))
        before[here.branch] = new
        return out

    with Patch() as patch:
        for chain in anatomy(model).chains:
            patch.wrap(chain[0].module, watch(chain[0]))
        patch.wrap(model, end)
        return patch.keep(), pairs


def recorder(model: nn.Module, method: Tea) -> tuple[Patch, Callable[[], Tea]]:
    """`record`, and what then gives `method` with the coefficients found."""
    patch, pairs = record(model)
    return patch, lambda: Tea(**{**dict(method), "coefficients": fit(pairs)})
