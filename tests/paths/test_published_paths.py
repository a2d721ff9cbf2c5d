"""Each path is what its paper says: by the formula, by the SDE that it solves, by a peer's table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.grid import at
from hasten.path import Path, lam
from hasten.paths import discrete
from hasten.paths.cosine import Cosine
from hasten.paths.exploding import Exploding
from hasten.paths.flow import Flow
from hasten.paths.gvp import GVP
from hasten.paths.interpolant import Interpolant
from hasten.paths.log_snr import LogSNR
from hasten.paths.preserving import Preserving
from hasten.paths.shifted import Shifted, shift_of
from hasten.paths.sub_preserving import SubPreserving
from hasten.paths.tabulated import Tabulated

T = torch.linspace(0, 1, 401, dtype=torch.float64)


@pytest.mark.system("iddpm")
def test_cosine_is_the_published_formula() -> None:
    """Nichol & Dhariwal 2021, eq. 17, and sigma to all digits where 1 - alpha^2 would lose them."""
    f = torch.cos((T + 0.008) / 1.008 * math.pi / 2) ** 2
    assert (Cosine().alpha(T) ** 2 - f / f[0]).abs().max() < 1e-14
    assert Cosine().alpha(T[-1]) == 0
    small = torch.tensor(1e-9, dtype=torch.float64)
    want = math.pi / 1.008 * math.tan(0.008 / 1.008 * math.pi / 2)  # -d alpha^2 / dt at 0
    assert abs(float(Cosine().sigma(small) ** 2 / small) / want - 1) < 1e-6


@pytest.mark.system("iddpm")
def test_discrete_cosine_is_the_formula_with_its_clip_and_diffusers() -> None:
    from diffusers import DDPMScheduler

    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    product, want = 1.0, []
    for i in range(1000):
        product *= 1 - min(1 - bar((i + 1) / 1000) / bar(i / 1000), 0.999)
        want.append(product)
    got = torch.tensor(discrete.cosine().alpha_bar, dtype=torch.float64)
    assert (got / torch.tensor(want, dtype=torch.float64) - 1).abs().max() < 1e-9
    peer = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    assert (got - peer).abs().max() < 1e-5
    assert got[-1] > 0  # what the clip is for: the path itself ends in pure noise
    path = Cosine().alpha(torch.arange(1, 1000, dtype=torch.float64) / 1000) ** 2
    assert (got[:-1] - path).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("path", "schedule", "first", "last"),
    [(discrete.linear(), "linear", 1e-4, 0.02), (discrete.scaled_linear(), "scaled_linear", 0.00085, 0.012)],
    ids=["linear", "scaled linear"],
)
def test_tables_are_diffusers(path: Tabulated, schedule: str, first: float, last: float) -> None:
    from diffusers import DDIMScheduler

    betas = {"beta_schedule": schedule, "beta_start": first, "beta_end": last}
    peer = DDIMScheduler(**betas).alphas_cumprod.double()
    assert (torch.tensor(path.alpha_bar, dtype=torch.float64) / peer - 1).abs().max() < 1e-4
    peer = DDIMScheduler(**betas, rescale_betas_zero_snr=True).alphas_cumprod.double()
    got = torch.tensor(discrete.to_pure_noise(path).alpha_bar, dtype=torch.float64)
    assert (got[:-1] / peer[:-1] - 1).abs().max() < 1e-3
    assert got[-1] == 0 == peer[-1]


@pytest.mark.parametrize("betas", [(0.0, 0.5), (0.5, 1.5), (1.0, 0.5), (float("nan"), 0.5)])
def test_betas_that_are_none_are_refused(betas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"betas lie in \(0, 1\)"):
        discrete.of_betas(torch.tensor(betas))


def beta_and_sum(t: float) -> tuple[float, float]:
    """beta(t) = b0 + t (b1 - b0) of the VP SDE and its integral from 0."""
    return 0.1 + t * 19.9, 0.1 * t + t**2 * 19.9 / 2


@pytest.mark.system("score-sde")
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_marginals_solve_their_sdes(t: float) -> None:
    """Song et al. 2020, appendix B: dx = f x dt + g dw has mean alpha x0 with alpha' = f alpha and variance sigma^2
    with (sigma^2)' = 2 f sigma^2 + g^2; f and g are written here as the paper writes them."""
    beta, total = beta_and_sum(t)
    rise = math.log(50 / 0.01)
    sdes: list[tuple[Path, float, float]] = [
        (Preserving(), -beta / 2, beta),
        (SubPreserving(), -beta / 2, beta * (1 - math.exp(-2 * total))),
        (Exploding(), 0.0, (0.01 * math.exp(rise * t)) ** 2 * 2 * rise),
    ]
    for path, f, g2 in sdes:
        n = at(path, [t, 0.0]).nodes[0]
        assert abs(n.dalpha - f * n.alpha) < 1e-10 * max(1, abs(f))
        assert abs(2 * n.sigma * n.dsigma - 2 * f * n.sigma**2 - g2) < 1e-9 * g2
        assert abs(n.diffusion - g2) < 1e-9 * g2, path


@pytest.mark.system("score-sde")
def test_sub_preserving_has_the_variance_of_preserving_as_its_deviation() -> None:
    assert (SubPreserving().sigma(T) - Preserving().sigma(T) ** 2).abs().max() < 1e-15
    assert torch.equal(SubPreserving().alpha(T), Preserving().alpha(T))
    assert at(SubPreserving(), [1.0, 0.0]).nodes[-1].dsigma == pytest.approx(0.1)  # beta(0): finite, where VP's is not


@pytest.mark.system("score-sde")
def test_exploding_is_geometric_and_clean_at_its_end() -> None:
    path = Exploding(0.02, 80.0)
    assert (path.sigma(T) ** 2 + 0.02**2 - (0.02 * 4000**T) ** 2).abs().max() < 1e-9
    assert path.sigma(T[0]) == 0
    for bad in ((0.0, 1.0), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="sigma must rise from above 0"):
            Exploding(*bad)


def test_gvp_is_a_quarter_circle_at_even_speed() -> None:
    assert (GVP().alpha(T) - torch.cos(math.pi / 2 * T)).abs().max() < 1e-15
    for n in at(GVP(), [0.9, 0.4, 0.1]).nodes:
        assert abs(math.hypot(n.dalpha, n.dsigma) - math.pi / 2) < 1e-12


@pytest.mark.parametrize("base", [Flow(), Preserving()], ids=lambda p: type(p).__name__)
def test_shifted_is_its_base_at_another_time(base: Path) -> None:
    for s in (0.3, 1.0, 3.0, 20.0):
        path, moved = Shifted(base, s), s * T / (1 + (s - 1) * T)
        assert (path.alpha(T) - base.alpha(moved)).abs().max() < 1e-13
        assert (path.sigma(T) - base.sigma(moved)).abs().max() < 1e-13
    inner = T[1:-1]
    assert (lam(Shifted(Flow(), 3.0), inner) - lam(Flow(), inner) + math.log(3)).abs().max() < 1e-12
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="shift must be above 0"):
            Shifted(base, bad)


def test_the_shift_of_a_size_is_flux() -> None:
    """mu as `calculate_shift` of diffusers' Flux pipeline gives it, whose import is slow."""
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4096, 1.15), (9216, 2.0166666666666666)):
        assert math.log(shift_of(tokens)) == pytest.approx(mu, abs=1e-12)
    smaller = shift_of(1000, base_shift=0.5, max_shift=0.9, max_tokens=8192)
    assert math.log(smaller) == pytest.approx(0.5375, abs=1e-12)


@pytest.mark.parametrize("known", [Flow(), GVP(), Cosine(), Preserving()], ids=lambda p: type(p).__name__)
def test_halving_finds_the_time_that_a_closed_form_gives(known: Path) -> None:
    path = Interpolant(known.alpha, known.sigma)
    lams = torch.linspace(-4, 6, 101, dtype=torch.float64).reshape(1, 101)
    assert (path.time(lams) - known.time(lams)).abs().max() < 1e-14
    assert path.time(lams).shape == lams.shape
    assert path.time(lams.float()).dtype == torch.float32


def test_a_lam_off_a_path_is_nan_and_a_path_whose_lam_rises_is_refused() -> None:
    path = LogSNR(-6.0, 4.0, lambda t: t**2)  # lam from 3 to -2
    times = path.time(torch.tensor([3.1, 3.0, 0.0, -2.0, -2.1], dtype=torch.float64))
    assert times.isnan().tolist() == [True, False, False, False, True]
    assert (times[1], times[3]) == (0, 1)

    def late(t: Tensor) -> Tensor:
        return torch.where(t < 0.5, t, 1 - t)

    for bad in (late, lambda t: 1 - t, lambda t: t - 0.5):
        with pytest.raises(ValueError, match="alpha / sigma must fall"):
            Interpolant(lambda t: torch.ones_like(t), bad)


@pytest.mark.system("vdm")
def test_log_snr_runs_between_its_ends() -> None:
    """Kingma et al. 2021: alpha^2 / sigma^2 = exp(-gamma)."""
    for path in (LogSNR(), LogSNR(-8.0, 3.0, lambda t: (torch.exp(2 * t) - 1) / (math.exp(2) - 1))):
        snr = path.alpha(T) ** 2 / path.sigma(T) ** 2
        assert (snr.log() + path.gamma(T)).abs().max() < 1e-9
        assert path.gamma(T[0]) == path.gamma_0
        assert abs(path.gamma(T[-1]) - path.gamma_1) < 1e-12
    with pytest.raises(ValueError, match="gamma must rise with t, got 5"):
        LogSNR(5.0, -13.3)
    with pytest.raises(ValueError, match="gamma must rise"):
        LogSNR(shape=lambda t: t * (1 - t))
