"""Frechet distance between two sets of features, each taken as one Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

systems: tuple[str, ...] = ("fid",)


@dataclass(slots=True)
class Moments:
    """Count, mean [D] and scatter [D, D] of features that arrive in parts, in float64.

    Merging is exact: Chan, Golub & LeVeque 1979, eq. 2.1 (the pairwise update), which loses no digits to a large mean
    as the textbook sum of squares does.
    """

    count: int = 0
    mean: Tensor | None = None
    scatter: Tensor | None = None

    @classmethod
    def of(cls, x_ND: Tensor) -> Moments:
        """Moments of features [N, D]. Raises ValueError where they are not [N, D]."""
        return cls().update(x_ND)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D]. Raises ValueError below 2 samples."""
        if self.scatter is None or self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, x_ND: Tensor) -> Moments:
        """Takes in features [N, D]; returns itself. O(N D^2). Raises ValueError where they are not [N, D]."""
        if x_ND.ndim != 2:
            raise ValueError(f"expected features [N, D], got {list(x_ND.shape)}")
        if len(x_ND):
            x = x_ND.detach().double()
            mean = x.mean(0)
            x = x - mean
            self.merge(Moments(len(x), mean, x.mT @ x))
        return self

    def merge(self, other: Moments) -> Moments:
        """Takes in what another saw; returns itself. Raises ValueError where the lengths of features differ."""
        if other.mean is None or other.scatter is None:
            return self
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return self
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and {len(other.mean)} numbers can't be merged")
        count, apart = self.count + other.count, other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        self.mean = self.mean + apart * (other.count / count)
        self.count = count
        return self


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): squared 2-Wasserstein distance of two Gaussians.

    Dowson & Landau 1982; as a measure of pictures, Heusel et al. 2017, arXiv:1706.08500 eq. 6. The trace of the root is
    the sum of singular values of S_a^(1/2) S_b^(1/2), which stays real where a covariance is singular. O(D^3); never
    below 0. It is biased upwards by the number of samples: compare only distances between sets of equal sizes.

    Raises:
        ValueError: a set has fewer than 2 samples, or features differ in length.
    """
    s_a, s_b = a.covariance, b.covariance
    if s_a.shape != s_b.shape or a.mean is None or b.mean is None:
        raise ValueError(f"features of {len(s_a)} and {len(s_b)} numbers can't be compared")
    cross = torch.linalg.svdvals(_root(s_a) @ _root(s_b)).sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + s_a.trace() + s_b.trace() - 2 * cross))


def frechet_small(x_ND: Tensor, y_MD: Tensor) -> float:
    """`frechet` of two feature sets [N, D], [M, D] that are smaller than D: the same number without a D x D matrix.

    With X_c, Y_c the centred sets, S_x = X_c^T X_c / (N - 1) and tr (S_x S_y)^(1/2) is the nuclear norm of
    X_c Y_c^T / sqrt((N - 1) (M - 1)), an N x M matrix. O(N M (D + min(N, M))), in float64.

    Raises:
        ValueError: not [N, D] and [M, D], or a set of fewer than 2.
    """
    if x_ND.ndim != 2 or y_MD.ndim != 2 or x_ND.shape[1] != y_MD.shape[1]:
        raise ValueError(f"expected features [N, D] and [M, D], got {list(x_ND.shape)} and {list(y_MD.shape)}")
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2:
        raise ValueError(f"a covariance needs 2 samples or more, got {n} and {m}")
    x, y = x_ND.detach().double(), y_MD.detach().double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x) / (n - 1) ** 0.5, (y - mean_y) / (m - 1) ** 0.5
    cross = torch.linalg.svdvals(x @ y.mT).sum()
    return max(0.0, float((mean_x - mean_y).square().sum() + x.square().sum() + y.square().sum() - 2 * cross))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
