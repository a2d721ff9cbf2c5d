"""A report: what a recipe gained and what it cost, both from one run, with the machine that they were measured on."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from hasten.atomic import write_text_atomically
from hasten.measure.quality import Quality
from hasten.measure.timing import Spread

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one side, untouched or recipe, spends.

    Attributes:
        seconds: an image, from prompt to picture.
        denoising_seconds: an image, of the loop over the network alone.
        first_call_seconds: the first call in its process: compiling, allocating.
        calls: network calls an image.
        flops: an image, as `flops.count` sees them; None where they were not counted.
        activation_bytes: peak of a call beside the weights.
        weight_bytes: parameters and buffers.
    """

    seconds: Spread
    denoising_seconds: Spread
    first_call_seconds: float
    calls: float
    flops: int | None
    activation_bytes: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `recipe` gained and cost.

    Attributes:
        recipe: as `Recipe.to_dict` gives it.
        pipeline: what it was put on, in words.
        untouched, tuned: cost of each side.
        end_to_end, denoising: untouched seconds over tuned seconds, pair by pair of interleaved runs.
        quality: see `hasten.measure.quality`.
        psnr_db: median over pictures, to the untouched ones of the same seeds, dB; infinite where they are equal.
        feature_distance: mean 1 - cosine to the untouched ones of the same seeds.
        frechet, kernel: distance of the recipe's pictures from an untouched run with other seeds.
        frechet_untouched, kernel_untouched: the same for the untouched pictures: what two equal laws have.
        features: name of the features.
        machine: as `machine.machine` gives it.
    """

    recipe: dict[str, Any]
    pipeline: str
    untouched: Cost
    tuned: Cost
    end_to_end: Spread
    denoising: Spread
    quality: Quality
    psnr_db: float
    feature_distance: float
    frechet: float
    frechet_untouched: float
    kernel: float
    kernel_untouched: float
    features: str
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the version of its form; what is not finite becomes None, for JSON has no word."""
        plain = asdict(self)
        speedup = {name: plain.pop(name) for name in ("denoising", "end_to_end")}
        finite: dict[str, Any] = _finite({"report": VERSION, "speedup": speedup, **plain})
        return finite

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all. Raises OSError where it can't; the old file then stands."""
        write_text_atomically(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table's rows: what, untouched, recipe, gain; the same in the terminal and on the page."""
        a, b = self.untouched, self.tuned
        return [
            ("seconds an image", a.seconds.text(" s"), b.seconds.text(" s"), str(self.end_to_end)),
            ("of them denoising", a.denoising_seconds.text(" s"), b.denoising_seconds.text(" s"), str(self.denoising)),
            ("first call", f"{a.first_call_seconds:.2f} s", f"{b.first_call_seconds:.2f} s", ""),
            ("network calls an image", f"{a.calls:g}", f"{b.calls:g}", _times(a.calls, b.calls)),
            ("FLOPs an image", _scaled(a.flops, ""), _scaled(b.flops, ""), _times(a.flops, b.flops)),
            ("weights", *_both(a.weight_bytes, b.weight_bytes)),
            ("peak memory beside them", *_both(a.activation_bytes, b.activation_bytes)),
            ("quality (1: like untouched)", "1", str(self.quality), ""),
            ("  shows what was asked", "1", _score(self.quality.prompt), ""),
            ("  varied and sharp", "1", f"{self.quality.spread:.3f}", ""),
            ("Fréchet distance", f"{self.frechet_untouched:.4g}", f"{self.frechet:.4g}", ""),
            ("kernel distance", f"{self.kernel_untouched:.4g}", f"{self.kernel:.4g}", ""),
            ("same seeds: PSNR", "", f"{self.psnr_db:.1f} dB", ""),
            ("same seeds: features apart", "", f"{self.feature_distance:.4f}", ""),
        ]

    def footnote(self) -> str:
        """On what it was measured, in one line."""
        m, q = self.machine, self.quality
        device = m.get("gpu") or f"{m.get('cpu')}, {m.get('threads')} threads"
        seen = f"{q.pictures} pictures of {q.prompts} prompts, {self.features}"
        how = "Times and ratios: median (quartiles) of interleaved pairs."
        return f"{self.pipeline}; {seen}; {device}; torch {m.get('torch')}. {how}"

    def table(self) -> Table:
        """For a terminal."""
        table = Table(caption=self.footnote(), caption_justify="left", title_justify="left")
        table.add_column("", no_wrap=True)
        for name in ("untouched", "recipe", "gain"):
            table.add_column(name, justify="right")  # a narrow terminal breaks at the spread, and cuts nothing off
        for row in self.rows():
            table.add_row(*row)
        return table


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _both(before: int, after: int) -> tuple[str, str, str]:
    return _scaled(before, "B"), _scaled(after, "B"), _times(before, after)


def _times(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}x" if before and after else ""


def _scaled(value: int | None, unit: str) -> str:
    """Three digits with a decimal prefix: 12.3 MB, 4.56 T."""
    if value is None:
        return "not counted"
    size, prefixes = float(value), iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while size >= 999.5:
        size, prefix = size / 1000, next(prefixes, "?")
    return f"{size:.3g} {prefix}{unit}".rstrip()


def _score(value: float | None) -> str:
    return "untouched does not" if value is None else f"{value:.3f}"
