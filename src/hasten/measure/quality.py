"""Quality, the definition: how near a recipe's pictures are to what the untouched pipeline would make with other seeds.

Three sets of pictures of the same prompts, in the same order, read as features:

    A  untouched, seeds s         B  untouched again, other seeds         R  the recipe, seeds s

    prompt = (d_other - d(R, B)) / (d_other - d(A, B))           does it show what was asked?
    spread = 1 - max(0, FD(R, B) - FD(A, B)) / tr cov(B)         is it as varied, and as sharp?
    quality = min(prompt, spread), each clipped to [0, 1]

d is the mean `feature_distance` of pictures of one prompt, d_other that of A and B over different prompts, FD the
Frechet distance. 1: no further from B than a second untouched run is; 0: no nearer than pictures of other prompts, or
further than one average picture for all would be from the whole law. R is compared with B alone, never with A: what a
recipe is asked for is a sample of the same law, not the same picture (for that, see `hasten.measure.fidelity`).

FD is biased upwards in small sets, so FD(A, B) > 0 is what two equal laws have at this many pictures. `Quality.floor`
tells how much of the scale of `spread` it hides: with too few pictures even one average picture scores `floor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.measure.fidelity import feature_distances

systems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality with its parts, all in [0, 1].

    Attributes:
        value: min(prompt, spread).
        low, high: 95 % bootstrap interval over prompts, moved so that the resamples' median is at `value`.
        prompt: adherence; None where the untouched pipeline shows none (one prompt for all, or d_other <= d(A, B)), and
            the value is `spread` alone.
        spread: nearness of the two sets as wholes.
        floor: `spread` of one average picture for all, FD(A, B) / tr cov(B): below 0.5 with enough pictures.
        pictures: rows of each set.
        prompts: different prompts.
    """

    value: float
    low: float
    high: float
    prompt: float | None
    spread: float
    floor: float
    pictures: int
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


def quality(
    untouched: Tensor,
    again: Tensor,
    recipe: Tensor,
    generator: torch.Generator,
    prompts: Sequence[int] | None = None,
    resamples: int = 200,
) -> Quality:
    """Quality of `recipe` (R) against `untouched` (A) and `again` (B): features [N, D], row i of each for one prompt.

    Args:
        generator: draws the bootstrap's prompts; on the CPU.
        prompts: an id a row; rows of one id are pictures of one prompt: resampled together, paired with each other, and
            never counted in d_other. Left out, each row is a prompt of its own.
        resamples: of the prompts (Efron 1979); each costs two SVDs of about 0.6 N rows. 0: low = high = value. A
            resample repeats pictures, so it is as a smaller set, further from the law: without the move of its median
            to `value`, the interval held the mean of 64 pictures' quality 3 times in 10, with it 8 or 9 times.

    Returns:
        The quality; 0 throughout where any feature of R is not finite (a broken picture is not averaged away).

    Raises:
        ValueError: the shapes differ, N < 3, A or B is not finite, or B's pictures are all the same.
    """
    _check(untouched, again, prompts)
    _, ids = torch.tensor(list(prompts) if prompts is not None else range(len(again))).unique(return_inverse=True)
    count = int(ids.max()) + 1
    if recipe.shape == again.shape and not recipe.isfinite().all():
        return Quality(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, len(again), count)
    _check(recipe, again, prompts)
    centre = again.detach().double().mean(0)  # keeps the digits of the Gram matrices; no distance changes
    sets = _Sets(untouched, again, recipe, centre, ids.to(again.device))
    units = ids if count > 1 else torch.arange(len(again))  # of one prompt alone, the pictures are resampled
    total, drawn = int(units.max()) + 1, []
    with _one_thread():
        prompt, spread, floor, follows = sets.scores(torch.ones(len(again), dtype=torch.float64, device=again.device))
        value = min(prompt, spread) if follows else spread
        for _ in range(resamples):
            picked = torch.randint(total, (total,), generator=generator).bincount(minlength=total)[units]
            if int((picked > 0).sum()) > 1:
                p, s, _, _ = sets.scores(picked.double().to(again.device))
                drawn.append(min(p, s) if follows else s)
    at = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)
    low, middle, high = torch.tensor(drawn or [value], dtype=torch.float64).quantile(at).tolist()
    low, high = (_clip(end + value - middle) for end in (low, high))
    kept = prompt if follows else None
    return Quality(value, low, high, kept, spread, floor, len(again), count)


class _Sets:
    """What the scores need of the features, as N x N matrices, so that a resample is a weight a row, not a new
    product."""

    def __init__(self, a: Tensor, b: Tensor, r: Tensor, centre: Tensor, ids: Tensor) -> None:
        self.same = ids[:, None] == ids[None, :]
        self.apart_a, self.apart_r = (feature_distances(x, b) for x in (a, r))
        x_a, x_b, x_r = (x.detach().double() - centre for x in (a, b, r))
        self.gram_a, self.gram_b, self.gram_r = (x @ x.mT for x in (x_a, x_b, x_r))
        self.cross_a, self.cross_r = x_a @ x_b.mT, x_r @ x_b.mT

    def scores(self, w: Tensor) -> tuple[float, float, float, bool]:
        """Prompt score, spread score, its floor, and whether A follows its prompts, where row i is there w[i] times."""
        within = w[:, None] * self.same
        between = torch.outer(w, w) * ~self.same
        d_a, d_r = (float((within * d).sum() / within.sum()) for d in (self.apart_a, self.apart_r))
        follows = bool(between.any())
        d_other = float((between * self.apart_a).sum() / between.sum()) if follows else 0.0
        follows = follows and d_other > d_a
        prompt = (d_other - d_r) / (d_other - d_a) if follows else float(d_r <= d_a)
        varied = _varied(self.gram_b, w)
        fd_a, fd_r = (
            _frechet(gram, self.gram_b, cross, w)
            for gram, cross in ((self.gram_a, self.cross_a), (self.gram_r, self.cross_r))
        )
        spread = 1 - max(0.0, fd_r - fd_a) / varied if varied > 0 else float(fd_r <= fd_a)
        return _clip(prompt), _clip(spread), _clip(fd_a / varied) if varied > 0 else 1.0, follows


def _frechet(gram_x: Tensor, gram_y: Tensor, cross: Tensor, w: Tensor) -> float:
    """`frechet_small` of weighted rows, from their products alone; rows of weight 0 cost nothing."""
    p, n = w / w.sum(), float(w.sum())
    keep = w > 0
    rows, columns, middle = cross @ p, p @ cross, p @ cross @ p
    centred = (cross - rows[:, None] - columns[None, :] + middle)[keep][:, keep]
    root = w[keep].sqrt()
    nuclear = torch.linalg.svdvals(root[:, None] * centred * root[None, :]).sum() / (n - 1)
    apart = p @ gram_x @ p + p @ gram_y @ p - 2 * middle
    return max(0.0, float(apart + _varied(gram_x, w) + _varied(gram_y, w) - 2 * nuclear))


def _varied(gram: Tensor, w: Tensor) -> float:
    """Trace of the unbiased covariance of weighted rows."""
    n = w.sum()
    return float((w @ gram.diagonal() - w @ gram @ w / n) / (n - 1))


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many small SVDs: on a busy machine, two threads that wait for each other took 50 to 200 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clip(x: float) -> float:
    return min(1.0, max(0.0, x))


def _check(x: Tensor, again: Tensor, prompts: Sequence[int] | None) -> None:
    if x.ndim != 2 or x.shape != again.shape or len(again) < 3:
        given = f"{list(x.shape)} and {list(again.shape)}"
        raise ValueError(f"expected three sets of features [N, D] with N >= 3, got {given}")
    if prompts is not None and len(prompts) != len(again):
        raise ValueError(f"expected a prompt id for each of {len(again)} pictures, got {len(prompts)}")
    if not x.isfinite().all() or not again.isfinite().all():
        raise ValueError("the untouched pictures have features that are not finite: mend the pipeline before measuring")
    if bool((again == again[0]).all()):
        raise ValueError("the untouched pictures are all the same: give them different seeds and prompts")
