"""Time, in interleaved pairs: what slows the machine down slows both sides of a pair, and the ratio keeps out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """A summary of repeated measurements: their median, and how far it can be trusted.

    Attributes:
        median: the middle value.
        low, high: quartiles, 0.25 and 0.75; half of the measurements lie between.
        tenth: 9 of 10 measurements are above it.
        min, max: the extremes.
    """

    median: float
    low: float
    high: float
    tenth: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quantiles, linear between measurements. Raises ValueError where there are none."""
        if not values:
            raise ValueError("a spread needs one measurement or more")
        x = torch.tensor(list(values), dtype=torch.float64)
        at = torch.tensor([0.5, 0.25, 0.75, 0.1, 0.0, 1.0], dtype=torch.float64)
        return cls(*x.quantile(at).tolist())

    def text(self, unit: str = "x") -> str:
        """Median and quartiles, to three digits.

        >>> Spread.of([11.8, 12.3, 12.9]).text()
        '12.3x (12.1-12.6)'
        """
        return f"{_digits(self.median)}{unit} ({_digits(self.low)}-{_digits(self.high)})"

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Paired:
    """Seconds of `before` and `after`, pair by pair.

    Attributes:
        before, after: seconds of each call, in the order of the pairs.
        first_before, first_after: seconds of the very first call of each: compilation, allocation, caches.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    first_before: float
    first_after: float

    @property
    def ratios(self) -> tuple[float, ...]:
        """before / after of each pair: above 1, `after` is faster."""
        return tuple(b / a for b, a in zip(self.before, self.after, strict=True))

    @property
    def speedup(self) -> Spread:
        """Spread of the ratios: the number to quote."""
        return Spread.of(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: spreads of both and of the ratio, the first calls, and every measurement."""
        return {
            "speedup": self.speedup.to_dict(),
            "before_seconds": Spread.of(self.before).to_dict(),
            "after_seconds": Spread.of(self.after).to_dict(),
            "first_call_seconds": {"before": self.first_before, "after": self.first_after},
            "pairs": [{"before": b, "after": a} for b, a in zip(self.before, self.after, strict=True)],
        }


def compare(
    before: Callable[[], object],
    after: Callable[[], object],
    pairs: int = 20,
    warmup: int = 2,
    sync: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Times two calls in interleaved pairs; the order within a pair alternates (B A, A B, ...), so drift cancels too.

    Two medians from two runs on a busy machine have said 9.9x where interleaved pairs said 2.2x.

    Args:
        warmup: untimed calls of each before the first pair, at least 1; the first of them is kept apart, timed.
        sync: waits for the device before each reading of the clock; left out, CUDA is waited for where it is in use.
        clock: seconds, rising.

    Raises:
        ValueError: fewer than 1 pair or warm-up.
    """
    if pairs < 1 or warmup < 1:
        raise ValueError(f"pairs and warmup must be 1 or more, got {pairs} and {warmup}")
    wait = sync if sync is not None else _wait

    def timed(call: Callable[[], object]) -> float:
        wait()
        start = clock()
        kept = call()  # freed after the clock is read
        wait()
        seconds = clock() - start
        del kept
        return seconds

    firsts = timed(before), timed(after)
    for _ in range(warmup - 1):
        timed(before), timed(after)
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            seconds[side].append(timed((before, after)[side]))
    return Paired(tuple(seconds[0]), tuple(seconds[1]), *firsts)


@contextmanager
def cold() -> Iterator[None]:
    """What runs inside compiles as if nothing had been compiled before, in this process or on this disk. What was
    compiled before is forgotten: time other things first."""
    from torch._inductor.utils import fresh_inductor_cache

    torch._dynamo.reset()
    with fresh_inductor_cache():
        yield


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _digits(x: float) -> str:
    """Three digits, never in exponents."""
    size = abs(x)
    return f"{x:.0f}" if size >= 100 else f"{x:.1f}" if size >= 10 else f"{x:.2f}" if size >= 0.1 else f"{x:.4f}"
