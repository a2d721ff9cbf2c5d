"""Bottleneck sampling: the first and the last steps at full size, those between on a smaller picture."""

from __future__ import annotations

from collections.abc import Generator
from math import log, prod, sqrt
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node
from hasten.solvers.ddim import ddim
from hasten.solvers.declare import Steps, solver
from hasten.solvers.dpmpp_2m import dpmpp_2m
from hasten.solvers.euler import euler
from hasten.solvers.unipc import unipc

BASES = {"ddim": ddim, "euler": euler, "dpmpp_2m": dpmpp_2m, "unipc": unipc}
Sides = tuple[int, ...]


@solver(order=0, stochastic=True, resizes=True, systems=("bottleneck-sampling",))
def bottleneck(
    x: Tensor, grid: Grid, noise: Noise, *,
    base: Literal["ddim", "euler", "dpmpp_2m", "unipc"] = "ddim",
    scale: Annotated[float, Field(ge=0.25, le=1)] = 0.5,
    first: Annotated[int, Field(ge=1, le=1000, json_schema_extra={"high": 8})] = 2,
    last: Annotated[int, Field(ge=1, le=1000, json_schema_extra={"high": 8})] = 4,
    fresh: bool = False,
    multiple: Annotated[int, Field(ge=1, le=64)] = 2,
) -> Steps:  # fmt: skip
    """High, low, high: of N steps the `first` and the `last` at full size, those between on sides times `scale`, which
    cost their network scale^2 of the tokens. Training-free, N calls in all. Tian et al. 2025, arXiv:2503.18940.

    In the paper (`fresh`), the clean prediction of a stage's last call is resized, and noise brings it to where the
    next stage starts: alpha R(x0) + sigma z. The times between are shifted with the size: sigma / alpha is `scale`
    times the full picture's, at which both are as uncertain (Esser et al. 2024, arXiv:2403.03206 eq. 23), so noise
    rises on the way back. R is exact on frequencies: a cosine transform, cut or filled with zeros.

    A network's x0 is a mean, of less variance than pictures have, and noise does not give that back. By default it is
    therefore the state that is resized, x0 and noise alike: on the way down the cut leaves just the noise that the
    shifted times ask for, and on the way up only the frequencies that come back get some. Wherever a stage starts, its
    states then have the law of resized pictures at that noise, if those at the end of the last had. Where rounding
    sides leaves less noise than that, some is added; where more, a step of `ddim` from the last prediction takes it.

    At scale 1 this is the base, bit for bit; `fresh` makes a step of `consistency` of the last step before either
    switch there. In no more than first + last steps all are at full size. States of rows alone, [B, ...] of less than
    three dimensions, keep their size.

    Args:
        base: runs each stage on its own times; its memory ends with the stage.
        first, last: steps.
        fresh: as in the paper.
        multiple: what sides of the smaller latents are rounded to multiples of: 2 for transformers of patches of 2.

    Raises:
        ValueError: the state is [B, ., .], of which rows and columns are not known.
    """
    go, full, sides = BASES[base], _sides(x), _sides(x, scale, multiple)
    down, up = first, len(grid) - last
    if down >= up or (scale == 1 and not fresh):
        return (yield from go(x, grid))
    if x.ndim == 3:
        raise ValueError(
            f"bottleneck resizes [B, C, rows, columns] and videos; of a state of {list(x.shape)} it knows no rows and "
            "columns: take another solver"
        )
    like, share = x, sqrt(prod(sides) / prod(full))  # what the cut makes of the deviation of white noise
    low = _shifted(Grid(grid.nodes[down : up + 1], grid.path), scale)

    x0, x = yield from _run(go(x, Grid(grid.nodes[: down + 1], grid.path)))
    here, after = grid.nodes[down], low.nodes[0]
    x, x0 = resized(x, sides), resized(x0, sides)
    if fresh:
        x = (x0 * after.alpha).add_(resized(noise(0.0, 1.0, like), sides), alpha=after.sigma / share)
    else:
        x, lacks = _brought(x, x0, here.alpha, here.sigma * share, after)
        x = x.add_(resized(noise(0.0, 1.0, like), sides), alpha=lacks / share) if share < scale else x

    x0, x = yield from _run(go(x, low))
    here, after, z = low.nodes[-1], grid.nodes[up], noise(1.0, 2.0, like)
    kept = resized(resized(z, sides), full)  # z in the frequencies that were there all along
    x, x0 = resized(x, full), resized(x0, full)
    if fresh:
        x = (x0 * after.alpha).add_(z, alpha=after.sigma)
    else:
        x, lacks = _brought(x, x0, here.alpha, here.sigma / share, after)
        x = x.add_(z, alpha=after.sigma).add_(kept, alpha=lacks - after.sigma)
    return (yield from go(x, grid.since(up)))


def _brought(x: Tensor, x0: Tensor, alpha: float, sigma: float, to: Node) -> tuple[Tensor, float]:
    """A state of alpha x0 + sigma eps at the signal of `to`, and the deviation of the noise that it lacks there. If it
    has more than it should, x0 is taken for its prediction: a step of DDIM, and nothing lacks."""
    gain = to.alpha / alpha
    if gain * sigma <= to.sigma:
        return x * gain, sqrt(to.sigma**2 - (gain * sigma) ** 2)
    kept = to.sigma / sigma
    return (x * kept).add_(x0, alpha=to.alpha - kept * alpha), 0.0


def resized(x: Tensor, sides: Sides) -> Tensor:
    """[..., h, w] as [..., rows, columns] of the same picture: its cosine transform cut, or filled with zeros.

    Constants stay. White noise of deviation 1 becomes white, of deviation sqrt(rows columns / (h w)) where it is cut;
    a cut undoes a filling exactly. No sides leave x as it is.
    """
    if sides in ((), tuple(x.shape[-2:])):
        return x
    rows, columns = (_cut(a, b).to(x) for a, b in zip(x.shape[-2:], sides, strict=True))
    return rows @ x @ columns.mT


def _cut(size: int, wanted: int) -> Tensor:
    """[wanted, size], float64: the orthonormal cosine transform, its lowest frequencies, and back at the new size."""
    kept = min(size, wanted)
    return sqrt(wanted / size) * _cosines(wanted)[:kept].T @ _cosines(size)[:kept]


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, [frequency, place], float64."""
    k, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    waves = torch.cos(torch.pi / size * (i + 0.5) * k) * sqrt(2 / size)
    waves[0] /= sqrt(2)
    return waves


def _sides(x: Tensor, scale: float = 1.0, multiple: int = 1) -> Sides:
    """Rows and columns times `scale`, rounded to a multiple and never more than they are; none where there are none."""
    if x.ndim < 4:
        return ()
    rows, columns = (min(n, max(multiple, round(n * scale / multiple) * multiple)) for n in x.shape[-2:])
    return rows, columns


def _shifted(grid: Grid, factor: float) -> Grid:
    """sigma / alpha times `factor` at every node."""
    return grid if factor == 1 else Grid(grid.met([n.lam - log(factor) for n in grid.nodes]), grid.path)


def _run(steps: Steps) -> Generator[tuple[Tensor, Node], Prediction, tuple[Tensor, Tensor]]:
    """A stage of the base: the last clean prediction, and the state it ends in."""
    query = next(steps)
    while True:
        p = yield query
        try:
            query = steps.send(p)
        except StopIteration as end:
            return p.x0, end.value
