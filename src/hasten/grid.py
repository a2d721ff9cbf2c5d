"""The times a sampler visits, as plain floats, so that no solver ever asks a device for a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from hasten.path import Path


@dataclass(frozen=True, slots=True)
class Node:
    """One time of a grid on a path: x_t = alpha x0 + sigma eps.

    Attributes:
        t: in [0, 1], 1 is noise.
        lam: log(alpha / sigma), inf where clean, -inf where pure noise.
        dalpha, dsigma: derivatives by t.
        end: where the step that asks here ends, for networks that are told (flow maps); None where none is named.
    """

    t: float
    alpha: float
    sigma: float
    lam: float
    dalpha: float
    dsigma: float
    end: Node | None = field(default=None, compare=False, repr=False)

    @property
    def clean(self) -> bool:
        """No noise is left: the sample is alpha x0."""
        return self.sigma == 0

    @property
    def diffusion(self) -> float:
        """g^2 of the forward SDE dx = f x dt + g dw that has these marginals, 2 sigma (sigma' - sigma alpha' / alpha);
        infinite at pure noise. Kingma et al. 2021, arXiv:2107.00630 eq. 20 of the appendix."""
        return 2 * self.sigma * (self.dsigma - self.sigma * self.dalpha / self.alpha) if self.alpha else math.inf


@dataclass(frozen=True, slots=True)
class Grid:
    """Nodes in falling t, at least two, and the path they lie on, for solvers that also ask in between."""

    nodes: tuple[Node, ...]
    path: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        times = [n.t for n in self.nodes]
        if len(times) < 2 or any(b >= a for a, b in pairwise(times)):
            raise ValueError(f"a grid needs two or more falling times, got {times}")

    def steps(self) -> Iterator[tuple[Node, Node]]:
        """(now, after) of each step."""
        return pairwise(self.nodes)

    def since(self, index: int) -> Grid:
        """The grid from node `index` on."""
        return Grid(self.nodes[index:], self.path)

    def between(self, share: float) -> tuple[Node | None, ...]:
        """Of each step the node `share` of the way in lam; None where lam is infinite at an end of the step."""
        ends = [(a.lam, b.lam) for a, b in self.steps()]
        lams = [a + share * (b - a) if math.isfinite(a) and math.isfinite(b) else None for a, b in ends]
        found = iter(self.met([lam for lam in lams if lam is not None]))
        return tuple(None if lam is None else next(found) for lam in lams)

    def met(self, lams: Sequence[float]) -> tuple[Node, ...]:
        """Nodes of the path at these lam.

        Raises:
            ValueError: the grid was made of nodes alone.
        """
        if self.path is None:
            raise ValueError("this solver asks between the times of its grid: make the grid with grid.at(path, times)")
        times = self.path.time(torch.tensor(list(lams), dtype=torch.float64)).clamp(0, 1).tolist()
        return nodes(self.path, times) if times else ()

    def __len__(self) -> int:
        return len(self.nodes) - 1


def at(path: Path, times: Sequence[float]) -> Grid:
    """The grid that visits `times`, [steps + 1] falling in [0, 1], computed in float64."""
    return Grid(nodes(path, times), path)


def nodes(path: Path, times: Sequence[float]) -> tuple[Node, ...]:
    """Nodes of a path, in any order. Raises ValueError for times outside [0, 1]."""
    if not all(0 <= t <= 1 for t in times):
        raise ValueError(f"times lie in [0, 1], 1 is noise; got {list(times)}")
    with torch.inference_mode(False), torch.enable_grad():  # pipelines run with gradients off
        t = torch.tensor(list(times), dtype=torch.float64, requires_grad=True)
        alpha, sigma = path.alpha(t), path.sigma(t)

        def slope(y: torch.Tensor) -> list[float]:
            if not y.requires_grad:  # constant in t
                return [0.0] * len(times)
            found = torch.autograd.grad(y.sum(), t)[0].tolist()
            return [math.inf if math.isnan(d) else d for d in found]  # a root's slope at 0 reads as 0 x inf

        slopes = slope(alpha), slope(sigma)

    def ratio(a: float, s: float) -> float:
        return math.inf if s == 0 else -math.inf if a == 0 else math.log(a / s)

    rows = zip(times, alpha.tolist(), sigma.tolist(), *slopes, strict=True)
    return tuple(Node(float(t), a, s, ratio(a, s), da, ds) for t, a, s, da, ds in rows)


Spacing = Callable[..., Sequence[float]]
"""(path, steps, **settings) -> [steps + 1] falling times from 1 to 0; one a file in `grids/`, its settings
keyword-only."""


def build(path: Path, spacing: Spacing, steps: int, **settings: Any) -> Grid:
    """The grid of `steps` steps that `spacing` lays on `path`."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    return at(path, spacing(path, steps, **settings))
