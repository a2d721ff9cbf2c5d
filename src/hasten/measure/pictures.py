"""Pictures for people: the same prompts and seeds side by side, and quality against time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hasten.atomic import write_bytes_atomically

INK, PAPER, FAINT = "#1c1e21", "#ffffff", "#6b7177"
UNTOUCHED, CHOSEN, OTHER = "#6b7177", "#d1495b", "#9fb3c8"


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe in `pareto`: seconds an image, quality in [0, 1], and its interval where it is known."""

    name: str
    seconds: float
    quality: float
    low: float | None = None
    high: float | None = None
    untouched: bool = False


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    captions: Sequence[str],
    path: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """A sheet with a labelled row a pipeline and a captioned column a prompt; written to `path` as PNG where given.

    Pictures below 128 pixels are doubled (exactly, so artefacts stay visible) until they are not. Long captions are
    broken into lines, then cut.

    Raises:
        ValueError: no rows, or a row with another number of pictures than there are captions.
    """
    if not rows or not captions or any(len(pictures) != len(captions) for _, pictures in rows):
        raise ValueError(f"expected rows of {len(captions)} pictures, got {[len(p) for _, p in rows]}")
    width, height = (max(p.size[i] for _, row in rows for p in row) for i in (0, 1))
    scale = 1
    while scale * max(width, height) < 128:
        scale *= 2
    width, height, gap, font = width * scale, height * scale, 10, ImageFont.load_default(15)
    texts = [_lines(caption, font, width, 3) for caption in captions]
    labels = [_lines(label, font, 150, 5) for label, _ in rows]
    left = 2 * gap + max(int(font.getlength(line)) + 1 for label in labels for line in label)
    top = 2 * gap + 19 * max(len(text) for text in texts)
    sheet = Image.new("RGB", (left + len(captions) * (width + gap), top + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(texts):
        x = left + i * (width + gap) + width / 2
        draw.text((x, top - gap), "\n".join(text), INK, font, anchor="md", align="center", spacing=4)
    for j, (label, (_, pictures)) in enumerate(zip(labels, rows, strict=True)):
        y = top + j * (height + gap)
        draw.text((left - gap, y + height / 2), "\n".join(label), INK, font, anchor="rm", align="right", spacing=4)
        for i, picture in enumerate(pictures):
            size = (picture.width * scale, picture.height * scale)
            x = left + i * (width + gap)
            large = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
            sheet.paste(large, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))
    return kept(sheet, path)


def gallery(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int = 8,
    path: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Captioned pictures in rows of `columns`; written to `path` as PNG where given. Raises as `contact_sheet`."""
    parts = [slice(i, i + columns) for i in range(0, max(len(pictures), len(captions)), columns)]
    rows = [contact_sheet([("", pictures[part])], captions[part]) for part in parts]
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), PAPER)
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height
    return kept(sheet, path)


def pareto(
    points: Sequence[Point], chosen: str | None = None, path: str | os.PathLike[str] | None = None
) -> Image.Image:
    """Seconds an image (log) against quality, with the front that no recipe beats in both, the `chosen` recipe by name
    and the untouched pipeline; written to `path` as PNG where it is given.

    Raises:
        ValueError: no points, or `chosen` names none.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not points or chosen not in (None, *(p.name for p in points)):
        raise ValueError(f"expected points, one named {chosen!r}; got {[p.name for p in points]}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    figure = Figure(figsize=(8.4, 5.2), dpi=120, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    edge = front(points)
    xs, ys = [p.seconds for p in edge], [p.quality for p in edge]
    axes.step(xs, ys, where="post", color=OTHER, lw=2, zorder=1, label="front")
    for p in points:
        marked = p.name == chosen or p.untouched
        colour = CHOSEN if p.name == chosen else UNTOUCHED if p.untouched else OTHER
        shape, size = ("*", 330) if p.name == chosen else ("D", 90) if p.untouched else ("o", 42)
        label = f"{p.name}: {_seconds(p.seconds)}, quality {p.quality:.2f}" if marked else None
        style: dict[str, Any] = {
            "marker": shape,
            "color": colour,
            "edgecolor": PAPER,
            "lw": 1,
            "zorder": 3 + marked,
            "label": label,
        }
        axes.scatter(p.seconds, p.quality, s=size, **style)
        if p.low is not None and p.high is not None:
            axes.vlines(p.seconds, p.low, p.high, color=colour, lw=1.4, zorder=2)
    low, high = min(p.seconds for p in points), max(p.seconds for p in points)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.35, high * 1.35)
    axes.set_ylim(-0.02, 1.04)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5) if low / 1.35 <= m * 10.0**e <= high * 1.35]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds an image (log)", fontsize=13)
    axes.set_ylabel("quality (1: like the untouched pipeline)", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.25, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    columns = 3 if all(len(p.name) < 24 for p in points if p.untouched or p.name == chosen) else 1
    figure.legend(loc="outside upper left", fontsize=12, frameon=False, ncols=columns, columnspacing=1.4)
    file = BytesIO()
    canvas.print_png(file)
    return kept(Image.open(file).convert("RGB"), path)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both time and quality, from the fastest on: quality rises along it."""
    kept: list[Point] = []
    for p in sorted(points, key=lambda p: (p.seconds, -p.quality)):
        if not kept or p.quality > kept[-1].quality:
            kept.append(p)
    return kept


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if not lines[-1] or font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" ...")
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _seconds(x: float) -> str:
    return f"{x:.3g} s" if x >= 1 else f"{1000 * x:.3g} ms"


def pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """Float pictures in [0, 1], [B, 3, H, W] on the CPU, as PIL ones."""
    pixels = (images_BCHW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(p) for p in pixels]


def kept(picture: Image.Image, path: str | os.PathLike[str] | None) -> Image.Image:
    """The picture, written to `path` as PNG where one is given, whole or not at all."""
    if path is not None:
        file = BytesIO()
        picture.save(file, "PNG")
        write_bytes_atomically(path, file.getvalue())
    return picture
