"""An ODE as a layer: gradients by integrating their own ODE backwards, in memory that does not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.solvers.rk45 import integrate

systems = ("neural-ode",)

Field = Callable[[float, Tensor], Tensor]
"""dy/ds at (s, y)."""


def flow(
    f: Field, y: Tensor, start: float, stop: float, params: Sequence[Tensor] = (), rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:  # fmt: skip
    """y at `stop` of dy/ds = f(s, y), y [B, ...] at `start`; gradients of y and of `params`, those that f reads, by the
    adjoint method. Chen et al. 2018, arXiv:1806.07366 alg. 1.

    Nothing between the ends is kept: the way back integrates y again beside a = dL/dy, da/ds = -a df/dy, and
    dg/ds = -a df/dparams, at the same tolerances. The ends get no gradient.

    Raises:
        ValueError: a tolerance is not above 0, or no step meets them.
    """
    return _Flow.apply(f, start, stop, rtol, atol, y, *params)


class _Flow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Field, start: float, stop: float, rtol: float, atol: float, y: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.call = f, start, stop, rtol, atol
        end = integrate(f, y, start, stop, rtol, atol)  # gradients are off here
        ctx.save_for_backward(end, *params)
        return end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (f, start, stop, rtol, atol), (end, *params) = ctx.call, ctx.saved_tensors
        parts = [end, grads[0], *(torch.zeros_like(p) for p in params)]

        def rise(s: float, row: Tensor) -> Tensor:
            y, a, *_ = _parted(row, parts)
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                slope = f(s, y)
                wanted = [y, *(p for p in params if p.requires_grad)]
                pulls = iter(torch.autograd.grad(slope, wanted, -a, allow_unused=True, materialize_grads=True))
            moved = [next(pulls) if p.requires_grad else torch.zeros_like(p) for p in (y, *params)]
            return _row([slope.detach(), *moved])

        _, *found = _parted(integrate(rise, _row(parts), stop, start, rtol, atol), parts)
        return (None, None, None, None, None, *found)


def _row(parts: Sequence[Tensor]) -> Tensor:
    """All of them end to end, [1, N]."""
    return torch.cat([p.reshape(1, -1) for p in parts], 1)


def _parted(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `_row`, in the shapes of `like`."""
    return [p.reshape(q.shape) for p, q in zip(row.split([q.numel() for q in like], 1), like, strict=True)]
