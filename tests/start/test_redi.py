"""The trajectory store: exact where it has been, nearer the fuller it is, and clear about what it can't serve."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten import tree
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.measure.frechet import Moments, frechet
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.reference.laws import Mixture
from hasten.solvers.declare import Solver, Steps, solver
from hasten.solvers.drive import solve
from hasten.start.redi import Store

LAW = Mixture()
DDIM = tree.function("solvers", "ddim")


def even(steps: int, path: Flow | EDM | None = None) -> Grid:
    return at(path or Flow(), [1 - i / steps for i in range(steps + 1)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(xs: Tensor, at_step: int = 3, to: int = 12, solver: Solver = DDIM) -> Store:
    return Store.build(solver, LAW.denoise, xs, even(20), at_step, to)


@pytest.mark.system("redi")
@pytest.mark.parametrize("name", ["ddim", "heun", "euler"])
@pytest.mark.parametrize(("at_step", "to"), [(0, 7), (3, 12), (5, 20)])
def test_a_stored_start_returns_its_exact_trajectory(name: str, at_step: int, to: int) -> None:
    solver, xs = tree.function("solvers", name), normal(50, 2)
    store = built(xs, at_step, to, solver)
    some = xs[[7, 31, 4]]
    assert torch.equal(store.sample(solver, LAW.denoise, some, even(20)), solve(solver, LAW.denoise, some, even(20)))
    index, distance = store.nearest(store.keys[[7, 31, 4]])
    assert index.tolist() == [7, 31, 4]
    assert distance.tolist() == [0, 0, 0]


@pytest.mark.system("redi")
def test_a_multistep_solver_keeps_its_memory_up_to_the_value() -> None:
    """A stored value is a state of the unbroken run; only after it does the solver begin anew."""
    solver, xs, grid = tree.function("solvers", "dpmpp_2m"), normal(20, 2), even(20)
    store = built(xs, 3, 12, solver)
    value = solve(solver, LAW.denoise, xs, Grid(grid.nodes[:13], grid.path))
    want = solve(solver, LAW.denoise, value[:4], grid.since(12))
    assert torch.equal(store.sample(solver, LAW.denoise, xs[:4], grid), want)


@pytest.mark.system("redi")
@pytest.mark.parametrize(("at_step", "to", "calls"), [(3, 12, 11), (2, 18, 4), (0, 20, 0)])
def test_skipped_steps_are_not_paid_for(at_step: int, to: int, calls: int) -> None:
    asked: list[Node] = []

    def denoise(x: Tensor, n: Node) -> Prediction:
        asked.append(n)
        return LAW.denoise(x, n)

    store = built(normal(30, 2), at_step, to)
    store.sample(DDIM, denoise, normal(5, 2, seed=1), even(20))
    assert len(asked) == calls
    assert asked == [*even(20).nodes[:at_step], *even(20).nodes[to:20]]


@pytest.mark.system("redi")
def test_the_error_falls_as_the_store_grows() -> None:
    """In two dimensions the nearest of n keys is n^(-1/2) away: four times the store, half the error."""
    x = normal(1000, 2, seed=1)
    full = solve(DDIM, LAW.denoise, x, even(20))
    errors = []
    for size in (100, 400, 1600, 5000):
        y = built(normal(size, 2)).sample(DDIM, LAW.denoise, x, even(20))
        errors.append(float((y - full).norm(dim=1).mean()))
    assert all(later < 0.65 * sooner for sooner, later in pairwise(errors))


@pytest.mark.system("redi")
def test_it_is_nearer_the_law_than_ddim_at_equal_calls() -> None:
    """Frechet distance to draws of the law, 1,600 trajectories stored, for skips of 4, 8 and 14 of 20 steps."""
    rng = torch.Generator().manual_seed(0)
    real = Moments.of(torch.stack([LAW.sample(100_000, rng) for _ in range(2)], -1))
    xs, x = normal(1600, 2), normal(4000, 2, seed=1)
    found = {}
    for to in (6, 10, 16):
        y = built(xs, 2, to).sample(DDIM, LAW.denoise, x, even(20))
        plain = solve(DDIM, LAW.denoise, x, even(20 - to + 2))
        found[to] = frechet(Moments.of(y), real), frechet(Moments.of(plain), real)
    assert all(redi < plain for redi, plain in found.values())
    assert found[16][0] < 0.25 * found[16][1]


def test_it_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    store = built(normal(30, 3, 2), solver=tree.function("solvers", "heun"))
    store.save(tmp_path / "store.safetensors")
    again = Store.load(tmp_path / "store.safetensors")
    assert torch.equal(again.keys, store.keys) and torch.equal(again.values, store.values)
    assert torch.equal(again.levels, store.levels)
    assert (again.at, again.to, again.solver) == (3, 12, "heun()")
    x = normal(4, 3, 2, seed=1)
    heun = tree.function("solvers", "heun")
    assert torch.equal(*(s.sample(heun, LAW.denoise, x, even(20)) for s in (store, again)))


def _wrong(**change: object) -> tuple[Solver, Tensor, Grid]:
    given = {"solver": DDIM, "x": normal(4, 2), "grid": even(20)} | change
    return given["solver"], given["x"], given["grid"]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"solver": tree.function("solvers", "heun")},
            r"holds trajectories of ddim\(\), not of heun\(\): build another",
        ),
        ({"grid": even(10)}, "the store's grid has 20 steps, this one 10: build another"),
        ({"grid": even(20, EDM())}, "built on other times or another path of as many steps: build another"),
        ({"x": normal(4, 3)}, r"holds states of shape \[2\], got \[3\]: build another"),
        ({"x": normal(4, 2).double()}, "holds torch.float32, got torch.float64: build another, or convert"),
    ],
    ids=["solver", "steps", "path", "shape", "dtype"],
)
def test_what_a_store_can_not_serve_is_refused_in_a_line(change: dict[str, object], said: str) -> None:
    solver, x, grid = _wrong(**change)
    with pytest.raises(ValueError, match=said) as refused:
        built(normal(10, 2)).sample(solver, LAW.denoise, x, grid)
    assert "\n" not in str(refused.value)


@solver(order=1)
def toy(x: Tensor, grid: Grid, *, share: float = 1.0) -> Steps:
    for now, after in grid.steps():
        p = yield x, now
        x = p.mix(x0=after.alpha, eps=after.sigma * share)
    return x


def test_settings_count_as_what_they_come_to() -> None:
    """A default that is written out is the same solver; another value is not."""
    store, x = built(normal(10, 2), solver=toy), normal(2, 2)
    store.sample(toy.given(share=1.0), LAW.denoise, x, even(20))
    with pytest.raises(ValueError, match=r"of toy\(share=1.0\), not of toy\(share=0.9\): build another"):
        store.sample(toy.given(share=0.9), LAW.denoise, x, even(20))


@pytest.mark.parametrize(("at_step", "to"), [(5, 5), (-1, 4), (3, 21), (9, 4)])
def test_steps_out_of_order_are_refused(at_step: int, to: int) -> None:
    with pytest.raises(ValueError, match=f"got at={at_step}, to={to} on 20 steps"):
        built(normal(4, 2), at_step, to)


def test_a_solver_that_adds_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="consistency adds noise, so no later state follows from an early one"):
        built(normal(4, 2), solver=tree.function("solvers", "consistency"))


def test_a_missing_file_and_one_that_is_no_store_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no store at .*none.safetensors: write one with Store.build"):
        Store.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    save_file({"keys": torch.zeros(1)}, tmp_path / "half", {"redi": '{"at": 1, "to": 2, "solver": "ddim()"}'})
    save_file({"keys": torch.zeros(1)}, tmp_path / "strange", {"redi": "{"})
    for name in ("text", "other", "half", "strange"):
        with pytest.raises(ValueError, match=f"{name} holds no store of trajectories") as refused:
            Store.load(tmp_path / name)
        assert "\n" not in str(refused.value)
