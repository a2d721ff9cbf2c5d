"""Published tables are met to the last digit at their own numbers of steps, and in between run along them."""

from __future__ import annotations

import pytest
import torch

from hasten import tree
from hasten.grid import build
from hasten.grids.ays import SD15, SDXL, SVD
from hasten.grids.gits import TEACHER_STEPS
from hasten.path import Path
from hasten.paths import discrete
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow

SD = discrete.scaled_linear()


def levels(name: str, steps: int, path: Path = SD, **settings: object) -> torch.Tensor:
    nodes = build(path, tree.function("grids", name), steps, **settings).nodes
    return torch.tensor([n.sigma / n.alpha for n in nodes if n.alpha], dtype=torch.float64)


def test_ays_is_diffusers() -> None:
    from diffusers.schedulers import AysSchedules

    assert list(SD15[:-1]) == AysSchedules["StableDiffusionTimesteps"]
    assert list(SDXL[:-1]) == AysSchedules["StableDiffusionXLTimesteps"]
    assert list(SVD[:-1]) == AysSchedules["StableDiffusionVideoSigmas"][:-1]
    for model, key in (("sd15", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas")):
        want = torch.tensor(AysSchedules[key], dtype=torch.float64)  # rounded, and not quite those of the timesteps
        assert (levels("ays", 10, model=model) - want).abs().max() < 4e-3


@pytest.mark.parametrize(
    ("model", "want"),
    [
        ("sd15", [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904,
                  0.6523686016, 0.3977456272, 0.1515232662, 0]),
        ("sdxl", [14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289,
                  0.3798540708, 0.2332364134, 0.1114188177, 0]),
    ],
)  # fmt: skip
def test_ays_has_the_levels_of_its_authors_node(model: str, want: list[float]) -> None:
    """As ComfyUI ships them. The grid's nodes are those levels on any path that reaches them."""
    want = torch.tensor(want, dtype=torch.float64)
    assert (levels("ays", 10, model=model) - want).abs().max() < 1e-6
    for path in (Flow(), EDM()):
        assert (levels("ays", 10, path, model=model)[-10:] - want[-10:]).abs().max() < 1e-6


def test_between_its_steps_ays_is_log_linear() -> None:
    """20 steps hold the ten-step levels at every other place, and their geometric means between; the last is 0."""
    ten = levels("ays", 10)
    twenty = levels("ays", 20)
    assert (twenty[:-1:2] / ten[:-1] - 1).abs().max() < 1e-9
    assert (twenty[1:-3:2] ** 2 / (ten[:-2] * ten[1:-1]) - 1).abs().max() < 1e-9
    assert abs(twenty[-2] ** 2 / (ten[-2] * 0.0291671582) - 1) < 1e-6


@pytest.mark.parametrize(
    ("coeff", "steps", "want"),
    [
        ("1.20", 2, [14.61464119, 0.803307, 0]),
        ("1.20", 5, [14.61464119, 2.84484982, 1.24153244, 0.59516323, 0.25053367, 0]),
        ("1.20", 10, [14.61464119, 5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381,
                      0.32104823, 0.19894916, 0.09824532, 0]),
        ("1.15", 7, [14.61464119, 5.85520077, 2.84484982, 1.51179266, 0.803307, 0.41087446, 0.17026083, 0]),
        ("1.00", 4, [14.61464119, 6.77309084, 2.36326075, 0.803307, 0]),
        ("1.10", 8, [14.61464119, 6.77309084, 3.07277966, 1.84880662, 1.08895338, 0.64427125, 0.34370604, 0.13792117,
                     0]),
    ],
)  # fmt: skip
def test_gits_has_the_levels_of_its_authors_node(coeff: str, steps: int, want: list[float]) -> None:
    """As ComfyUI ships them, to all their digits: they are even places in Stable Diffusion's 1000 steps."""
    assert (levels("gits", steps, coeff=coeff) - torch.tensor(want, dtype=torch.float64)).abs().max() < 5e-6


def test_gits_has_a_row_for_each_number_of_steps_and_runs_along_the_last() -> None:
    for rows in TEACHER_STEPS.values():
        assert [len(row) for row in rows] == list(range(1, 20))
        for row in rows:
            assert list(row) == sorted(set(row), reverse=True)
            assert row[-1] > 0
            assert row[0] < 100
    assert (levels("gits", 40)[:-1:2] / levels("gits", 20)[:-1] - 1).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["ays", "gits"])
def test_on_a_path_that_starts_lower_the_rest_of_the_curve_is_used(name: str) -> None:
    got = levels(name, 6, EDM(3.0))
    assert got[0] == 3.0
    assert got[:-1].log().diff().max() < -0.1
