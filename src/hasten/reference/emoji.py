"""The emoji that the embedded models learned from: 3,786 Noto Emoji pictures (Apache-2.0) and their names (emoji-data,
MIT)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO

import numpy as np
import torch
from torch import Tensor

SIDE = 64


@dataclass(frozen=True, slots=True)
class Emoji:
    """What is known of one picture in words."""

    name: str
    short: tuple[str, ...]
    kind: str
    tone: str

    def names(self) -> list[str]:
        """Every way to call it, without its skin tone; the full name first."""
        if self.kind.endswith("flag") and self.name.endswith(" flag"):
            place = self.name.removesuffix(" flag")
            return [f"flag: {place}", f"{place} flag", f"flag of {place}", self.name]
        found = [self.name, re.sub(r" (sign|symbol|face)$", "", self.name) if " " in self.name else self.name]
        found += [re.sub("[_-]", " ", s) for s in self.short if not re.search(r"\d$|^flag-", s)]
        return list(dict.fromkeys(found))

    def caption(self, rng: torch.Generator | None = None) -> str:
        """One caption; with a generator, one of many wordings, without, the plainest."""

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=rng)) if rng is not None else 0

        names = self.names()
        text = names[draw(len(names))]
        if self.tone:
            text += (f", {self.tone} skin tone", f", {self.tone} skin", f" {self.tone} skin")[draw(3)]
        elif draw(6) == 5:
            text += ", " + re.sub("[-&]+", " ", self.kind)
        if draw(6) == 5 and not text.startswith("flag"):
            text = "a " + text
        return text


@cache
def entries() -> tuple[Emoji, ...]:
    """The words of every tile, in the sheet's order."""
    raw = json.loads(files(__package__).joinpath("data/emoji.json").read_text())
    return tuple(Emoji(e["name"], tuple(e["short"]), e["kind"], e["tone"]) for e in raw)


def pictures() -> Tensor:
    """Every tile on white, uint8 [3786, 3, 64, 64], in the order of `entries`."""
    from PIL import Image

    sheet = Image.open(BytesIO(files(__package__).joinpath("data/emoji.webp").read_bytes())).convert("RGBA")
    white = Image.new("RGBA", sheet.size, "white")
    white.alpha_composite(sheet)
    pixels = np.asarray(white.convert("RGB"))
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    tiles = pixels.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    return torch.from_numpy(tiles[: len(entries())].copy())


def weights() -> Tensor:
    """How often each tile is drawn, [3786], relative: a skin-tone variant counts a sixth."""
    return torch.tensor([1 / 6 if e.tone else 1.0 for e in entries()])
