"""What a solver is: a generator that asks for predictions along a grid, and declares its order and its calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node

Steps = Generator[tuple[Tensor, Node], Prediction, Tensor]
"""Asks (x, node), is told a Prediction, returns the sample. The state is what the reply says (`p.x`): a caller may
edit it."""


class Many(NamedTuple):
    """A question of one batch: states, [K, B, ...], each at a node of its own; the answer is K predictions."""

    xs: Tensor
    nodes: tuple[Node, ...]


class Jet(NamedTuple):
    """A question with its change: the answer is (Prediction, d eps / ds), where x and t move as dx / ds and dt / ds.

    dx is [B, ...]; or a function of the prediction, where the direction follows from the answer itself.
    """

    x: Tensor
    node: Node
    dx: Callable[[Prediction], Tensor]
    dt: float


BatchSteps = Generator[Many, list[Prediction], Tensor]
JetSteps = Generator[Jet, tuple[Prediction, Tensor], Tensor]

Asks = Literal["points", "batches", "jets"]
Claim = int | Callable[..., int]
"""A number, or a function of the settings."""


@dataclass(frozen=True)
class Solver:
    """A solver with its claims, at settings of its own.

    Attributes:
        order: the error falls as (1 / steps) ** order on a smooth grid; of a stochastic one along a fixed Brownian path
            (strong order).
        calls: network calls a step.
        weak: of a stochastic one, the order of its moments.
        stochastic: adds fresh noise on the way, at its settings.
        adaptive: chooses its times itself: the grid's ends alone count.
        asks: for predictions at points, for batches of times, or for derivatives along the path as well.
        few: made for networks that were distilled to few steps; of no order.
        fitted: has settings that only a fit to a model gives; of no order.
        resizes: its states change their size on the way.
        systems: ids of the catalogue that it implements.
        settings: what was given for the keyword-only parameters of `run`.
    """

    run: Callable[..., Any]
    orders: Claim
    calls_of: Claim = 1
    weak: int = 0
    noisy: Claim = False
    adaptive: bool = False
    asks: Asks = "points"
    few: bool = False
    fitted: bool = False
    resizes: bool = False
    systems: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("__doc__", "__name__", "__module__"):
            object.__setattr__(self, name, getattr(self.run, name))

    def given(self, **settings: Any) -> Solver:
        """The same with these settings."""
        return replace(self, settings={**self.settings, **settings})

    @property
    def name(self) -> str:
        """Of its file and function."""
        return str(self.run.__name__)

    @property
    def order(self) -> int:
        """At its settings."""
        return self._claimed(self.orders)

    @property
    def calls(self) -> int:
        """A step, at its settings."""
        return self._claimed(self.calls_of)

    @property
    def stochastic(self) -> bool:
        """Whether it needs noise, at its settings."""
        return bool(self._claimed(self.noisy))

    def _claimed(self, claim: Claim) -> int:
        return claim if isinstance(claim, int) else claim(**(self.run.__kwdefaults__ or {}) | dict(self.settings))

    @property
    def unfit(self) -> str:
        """Why it can't be a pipeline's scheduler, in a line; empty where it can."""
        if self.adaptive:
            return f"{self.name} chooses its times while it runs, and a pipeline must know them before"
        if self.asks == "batches":
            return f"{self.name} asks for many times in one batch, and a pipeline asks for one after the other"
        if self.asks == "jets":
            return f"{self.name} asks for derivatives of the network, which a pipeline does not compute"
        return ""

    def __call__(self, x: Tensor, grid: Grid, noise: Noise | None = None) -> Any:
        """The generator, at x [B, ...] on grid.nodes[0].

        Raises:
            ValueError: a stochastic one is given no noise, or an order was set that so few steps can't have.
        """
        order = self.settings.get("order", 1)
        if order > len(grid) * self.calls:
            few = f"{self.name} of order {order} can't be had in so few steps, {len(grid)}"
            raise ValueError(f"{few}: take more steps or a lower order")
        if not self.stochastic:
            return self.run(x, grid, **self.settings)
        if noise is None:
            raise ValueError(f"{self.name} adds noise: give it some, such as noise=Brownian.of(generator)")
        return self.run(x, grid, noise, **self.settings)


def solver(
    order: Claim, calls: Claim = 1, *, weak: int = 0, stochastic: Claim = False, adaptive: bool = False,
    asks: Asks = "points", few: bool = False, fitted: bool = False, resizes: bool = False,
    systems: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Solver]:  # fmt: skip
    """Declares a generator function (x, grid, *, settings), or (x, grid, noise, *, settings), as a solver."""
    return lambda run: Solver(run, order, calls, weak, stochastic, adaptive, asks, few, fitted, resizes, systems)
