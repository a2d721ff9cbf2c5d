"""The adaptive solver of the reverse SDE: what it keeps, what its tolerance buys, and rows that go their own way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from affine import exact, moments
from hasten import tree
from hasten.brownian import Brownian
from hasten.denoiser import Prediction, denoiser
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve
from hasten.solvers.euler_maruyama import euler_maruyama
from hasten.solvers.gotta_go_fast import gotta_go_fast

PATHS = [Flow(), EDM(8.0), Preserving()]


def told(value: object) -> str:
    return type(value).__name__


class Asked:
    """A law's denoiser for rows at nodes of their own, which notes them."""

    def __init__(self, law: Gaussian | Mixture) -> None:
        self.law, self.calls = law, list[tuple[Node, ...]]()

    def __call__(self, x: Tensor, n: Node) -> Prediction:
        self.calls.append((n,))
        return self.law.denoise(x, n)

    def many(self, xs: Tensor, nodes: tuple[Node, ...]) -> list[Prediction]:
        self.calls.append(nodes)
        return [self.law.denoise(x, n) for x, n in zip(xs, nodes, strict=True)]


def started(law: Gaussian, n: Node, rows: int = 1, size: int = 10_000) -> Tensor:
    mean, var = exact(law, n)
    z = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return mean + var**0.5 * z


def kept(calls: list[tuple[Node, ...]], row: int, last: Node) -> list[tuple[Node, Node]]:
    """Of one row's attempts, (from, to) each, those after which it went on."""
    attempts = [(a[row], b[row]) for a, b in zip(calls[::2], calls[1::2], strict=True)]
    after = [*(a for a, _ in attempts[1:]), last]
    return [(a, b) for (a, b), c in zip(attempts, after, strict=True) if c.t < a.t - 1e-12]


def improved_euler(steps: list[tuple[Node, Node]], law: Gaussian) -> float:
    """Error of the variance where stochastic improved Euler takes these steps on a Gaussian, from the law's own: in one
    dimension the reverse SDE backwards is dx = (a x + b) ds + g dw."""

    def drift(n: Node) -> tuple[float, float]:
        gain = law.var * n.alpha / (law.var * n.alpha**2 + n.sigma**2)  # of E[x0 | x]
        g2 = 2 * n.sigma * (n.dsigma - n.sigma * n.dalpha / n.alpha)
        return -n.dalpha / n.alpha - g2 * (1 - n.alpha * gain) / n.sigma**2, g2**0.5

    var = exact(law, steps[0][0])[1]
    for now, after in steps:
        (a, g), (a_after, g_after), h = drift(now), drift(after), now.t - after.t
        on = 1 + h / 2 * (a + a_after * (1 + h * a))
        noise = h**0.5 / 2 * (g + g_after + h * a_after * g)
        var = on**2 * var + noise**2
    return var - exact(law, steps[-1][1])[1]


@pytest.mark.system("gotta-go-fast")
@pytest.mark.parametrize("path", [EDM(8.0), Preserving()], ids=told)
def test_the_error_falls_with_the_tolerance_as_calls_rise_and_is_below_euler_maruyamas(path: Path) -> None:
    """On the paper's two processes. One sample of many elements makes its step sizes all but certain; of the steps it
    kept the variance's error follows without sampling. Euler-Maruyama gets as many calls, in even steps. (On a straight
    flow even steps suit Euler-Maruyama by chance of this law, and it is not beaten.)"""
    law, errors, calls = Gaussian(0.7, 0.25), [], []
    grid = at(path, [0.98, 0.02])
    for tolerance in (0.2, 0.1, 0.05, 0.025):
        ask = Asked(law)
        solver = gotta_go_fast.given(rtol=tolerance, atol=tolerance / 10)
        solve(solver, ask, started(law, grid.nodes[0]), grid, Brownian([7]))
        errors.append(abs(improved_euler(kept(ask.calls, 0, grid.nodes[-1]), law)))
        calls.append(len(ask.calls))
        even = at(path, [0.98 - 0.96 * i / calls[-1] for i in range(calls[-1] + 1)])
        assert errors[-1] < 0.5 * max(map(abs, moments(euler_maruyama, even, law)))
    assert all(b < 0.5 * a for a, b in pairwise(errors)), errors
    assert all(b > a for a, b in pairwise(calls)), calls
    assert calls[-1] < 200


@pytest.mark.system("gotta-go-fast")
@pytest.mark.parametrize("path", PATHS, ids=told)
def test_it_comes_to_a_mixture_from_noise_to_clean(path: Path) -> None:
    """Mean, variance and the shares of the outer modes, within four Monte-Carlo errors and 1% for the tolerance."""
    law, rng, size = Mixture(), torch.Generator().manual_seed(3), 6000
    grid, ask = at(path, [1.0, 0.0]), Asked(law)
    x = torch.randn(2, size // 2, dtype=torch.float64, generator=rng) * grid.nodes[0].sigma

    def told_by(x: Tensor) -> Tensor:
        x = x.flatten()
        return torch.stack([x.mean(), x.var(), (x < -0.25).double().mean(), (x > 1).double().mean()])

    got = told_by(solve(gotta_go_fast, ask, x, grid, Brownian([7])))
    want, errors = told_by(law.sample(50 * size, rng).double()), 4 / size**0.5 * torch.tensor([0.96, 1.1, 0.46, 0.4])
    assert ((got - want).abs() < errors + 0.01).all(), (got, want)
    assert all(n.alpha > 0 for call in ask.calls[1:] for n in call)
    assert not any(n.clean for call in ask.calls for n in call)


@pytest.mark.system("gotta-go-fast")
@pytest.mark.parametrize("error", [0.9, 1.1])
def test_an_attempt_is_algorithm_1(error: float) -> None:
    """Written out, at the tolerance that makes its error E: h = 0.01 first, then 0.9 h E^-0.9; on to x'' where E is at
    most 1, else again from x."""
    law, x, noise = Mixture(), torch.linspace(-2, 2, 5, dtype=torch.float64)[None], Brownian([1])
    now, after = at(Preserving(), [0.5, 0.49]).nodes

    def change(x: Tensor, n: Node, z: Tensor) -> Tensor:
        score = -law.denoise(x, n).eps / n.sigma
        return -0.01 * (n.dalpha / n.alpha * x - n.diffusion * score) + (0.01 * n.diffusion) ** 0.5 * z

    z = noise((now.alpha / now.sigma) ** 2, (after.alpha / after.sigma) ** 2, x)
    one = change(x, now, z)
    two = change(x + one, after, z)
    scale = torch.maximum((x + one).abs(), x.abs()).clamp_min(1)  # with rtol = atol
    tolerance = float(((two - one) / 2 / scale).square().mean().sqrt()) / error

    steps = gotta_go_fast.given(rtol=tolerance, atol=tolerance)(x, at(Preserving(), [0.5, 0.1]), noise)
    asked = [next(steps)]
    for _ in range(3):
        asked.append(steps.send(Asked(law).many(*asked[-1])))
    _, ahead, then, further = asked
    assert torch.allclose(ahead.xs[:, 0], x + one, atol=1e-12)
    assert torch.allclose(then.xs[:, 0], x + (one + two) / 2 if error <= 1 else x, atol=1e-12)
    assert then.nodes[0].t == pytest.approx(0.49 if error <= 1 else 0.5, abs=1e-12)
    assert then.nodes[0].t - further.nodes[0].t == pytest.approx(0.009 * error**-0.9, rel=1e-9)


@pytest.mark.system("gotta-go-fast")
def test_samples_of_a_batch_take_steps_of_their_own_and_are_what_they_are_alone() -> None:
    """Three samples, one of them large: each keeps other times. With noise that depends on row and clock alone, each is
    the sample that it is without its neighbours."""
    law, grid, rows = Mixture(), at(Flow(), [0.9, 0.05]), torch.arange(3.0, dtype=torch.float64)[:, None]
    x = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[1] *= 30

    def run(which: list[int]) -> tuple[Tensor, list[list[float]]]:
        def noise(start: float, stop: float, like: Tensor) -> Tensor:
            return torch.sin((rows[which] + 1) * 40 * start + 3 * torch.linspace(0, 9, 40, dtype=torch.float64))

        ask = Asked(law)
        got = solve(gotta_go_fast, ask, x[which], grid, noise)
        return got, [[n.t for n, _ in kept(ask.calls, i, grid.nodes[-1])] for i in range(len(which))]

    together, times = run([0, 1, 2])
    assert len({len(t) for t in times}) > 1
    for row in range(3):
        alone, own = run([row])
        assert torch.allclose(alone[0], together[row], atol=1e-10)
        assert own[0] == pytest.approx(times[row], abs=1e-10)


@pytest.mark.parametrize("times", [[1.0, 0.995], [0.005, 0.0], [1.0, 0.5], [0.5, 0.0]])
def test_grids_that_lie_within_its_margins_at_an_end_are_solved_too(times: list[float]) -> None:
    """From pure noise to a node beyond sigma / alpha = 100, and from one below 0.01 to clean: one call is enough."""
    law, grid, ask = Gaussian(0.7, 0.25), at(Flow(), times), Asked(Gaussian(0.7, 0.25))
    got = solve(gotta_go_fast, ask, started(law, grid.nodes[0]), grid, Brownian([3]))
    mean, var = exact(law, grid.nodes[-1])
    assert abs(float(got.mean()) - mean) < 0.05 * var**0.5
    assert float(got.var()) == pytest.approx(var, rel=0.08)
    assert (len(ask.calls) == 1) == (abs(times[0] - times[1]) < 0.01)


def test_a_question_is_one_network_call_for_all_samples_in_their_order() -> None:
    """So that conditioning of the batch fits: the network sees [B, ...] states and [B] times."""
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.shape, t))
        return torch.tanh(x) * torch.arange(1.0, 4)[:, None] / 3  # "conditioned" on the row

    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    got = solve(gotta_go_fast, denoiser(network, "flow"), x, at(Flow(), [1.0, 0.0]), Brownian([5]))
    assert got.shape == (3, 16) and got.isfinite().all()
    assert all(shape == (3, 16) and t.shape == (3,) for shape, t in seen)
    assert any(len(set(t.tolist())) > 1 for _, t in seen)


def test_bad_input_is_refused() -> None:
    x, grid = torch.randn(2, 8, generator=torch.Generator().manual_seed(2)), at(Flow(), [0.9, 0.1])
    with pytest.raises(ValueError, match=r"make the grid with grid.at\(path, times\)"):
        solve(gotta_go_fast, Asked(Mixture()), x, Grid(grid.nodes), Brownian([1]))
    with pytest.raises(ValueError, match="errs by nan times what is allowed: raise rtol, or look for NaN"):
        solve(gotta_go_fast, lambda x, n: Prediction(x, x * torch.nan, x), x, grid, Brownian([1]))
    rough = torch.Generator().manual_seed(3)
    with pytest.raises(ValueError, match="times what is allowed: raise rtol"):
        solve(
            gotta_go_fast,
            lambda x, n: Prediction(x, 1e6 * torch.randn(x.shape, generator=rough), x),
            x,
            grid,
            Brownian([1]),
        )
    for given in ({"rtol": 0.0}, {"atol": 2.0}, {"tol": 0.1}):
        with pytest.raises(ValueError, match="validation error"):
            tree.checked(gotta_go_fast, given)
    assert "chooses its times while it runs" in gotta_go_fast.unfit
