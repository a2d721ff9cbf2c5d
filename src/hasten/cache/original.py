"""What is kept of an original picture's trajectory, and which parts of an edit of it have to be computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.cache.tiles import Tiles, Window, active, differs, grow, resize
from hasten.moment import Moment

Sides = tuple[int, int]
Place = tuple[str, int]
"""A branch and a step."""

FAINTEST = 0.01
"""Least share of the clean picture at which an edit is looked for in a noisy state."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the network for the original: its state, the other inputs, what it returned, its multiply-adds."""

    x: Tensor
    others: Any
    out: Any
    said: Tensor
    cost: int


@dataclass
class Original:
    """The trajectory of an original picture.

    Attributes:
        calls: of the network.
        layers: by number of the layer, branch and step: what it returned, or the statistics of a norm.
        sides: resolutions that were met.
        run: which trajectory; None before any.
        last, steps: its last step so far, and how many there were to be.
    """

    calls: dict[Place, Call] = field(default_factory=dict)
    layers: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    sides: set[Sides] = field(default_factory=set)
    run: int | None = None
    last: int = -1
    steps: int = 0

    @property
    def bytes(self) -> int:
        """Memory that it holds, but for the inputs other than the state."""
        kept = [*self.layers.values(), *(t for c in self.calls.values() for t in (c.x, c.said))]
        return sum(t.numel() * t.element_size() for t in kept)

    @property
    def whole(self) -> bool:
        """It went to its end."""
        return self.run is not None and self.last + 1 >= self.steps

    def begin(self, here: Moment) -> None:
        """Notes a call; of another trajectory, after dropping what was kept of the last."""
        if self.run != here.run:
            self.forget()
        self.run, self.last, self.steps = here.run, here.step, here.steps

    def forget(self) -> None:
        """Drops everything."""
        self.calls.clear()
        self.layers.clear()
        self.sides.clear()
        self.run, self.last, self.steps = None, -1, 0


@dataclass
class Edit:
    """An edit under way.

    Attributes:
        mask: [H, W], over the network's input, what was edited; None before the first call.
        touched: where what the network said is no longer the original's, so that the state differs without an edit.
        full: it has to be computed as a whole from here on.
        last, branches: the step it is at, and the branches asked there.
        tiles, tokens: made of the mask, as they are asked for.
    """

    mask: Tensor | None = None
    touched: Tensor | None = None
    full: bool = False
    run: int | None = None
    last: int = -1
    branches: set[str] = field(default_factory=set)
    masks: dict[Sides, Tensor] = field(default_factory=dict)
    tiles: dict[tuple[Sides, Window], Tiles] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)

    def goes_on(self, here: Moment) -> bool:
        """Whether the moment is of this trajectory."""
        later = here.step > self.last or (here.step == self.last and here.branch not in self.branches)
        return self.run == here.run and later

    def note(self, here: Moment) -> None:
        """The moment is of this trajectory."""
        self.branches = (self.branches if here.step == self.last else set()) | {here.branch}
        self.run, self.last = here.run, here.step

    def look(self, x: Tensor, call: Call, more_than: float) -> None:
        """Adds to the mask what differs from the original and was not computed: that was edited."""
        found = differs(x, call.x, more_than)
        if self.mask is None or self.touched is None:
            self.mask, self.touched = found, torch.zeros_like(found)
        elif bool((found & ~self.touched & ~self.mask).any()):
            self.mask = self.mask | (found & ~self.touched)
            self.masks, self.tiles, self.tokens = {}, {}, {}

    def touch(self, said: Tensor, call: Call) -> None:
        """Notes where the network's answer is another than for the original."""
        if self.touched is not None and said.shape[-2:] == self.touched.shape:
            self.touched = self.touched | differs(said, call.said, 0.0)


Mode = Literal["plain", "record", "edit"]


@dataclass
class State:
    """What the layers of an edited network share.

    Attributes:
        mode: what the running call does.
        here: its branch and step.
        rows: tokens that the running block was given, of all; None where it was given all.
        asked, sealed: within `recording`; an original is there and stays.
    """

    tile: int
    dilation: int
    original: Original = field(default_factory=Original)
    edit: Edit = field(default_factory=Edit)
    mode: Mode = "plain"
    here: Place = ("both", 0)
    rows: Tensor | None = None
    asked: bool = False
    sealed: bool = False

    def records(self, here: Moment) -> bool:
        """Whether this call is the original's: within `recording`, or of the first trajectory that went to its end."""
        if self.asked or self.sealed:
            return self.asked
        if self.original.run not in (None, here.run) and self.original.whole:
            self.sealed = True
        return not self.sealed

    def keep(self, layer: int, value: Tensor) -> None:
        """Of the running call; a copy, for a later layer may write into what it is given."""
        self.original.layers[layer, *self.here] = value.detach().clone()

    def kept(self, layer: int) -> Tensor:
        """What `keep` was given for the same layer and call of the original."""
        return self.original.layers[layer, *self.here]

    def mask(self, sides: Sides) -> Tensor:
        """[h, w]: what has to be computed at a resolution; all of it at one that the original did not have, or had with
        a border of its own."""
        if sides not in self.edit.masks:
            assert self.edit.mask is not None
            inner = (sides[0] - 1, sides[1] - 1)  # some networks pad by one before they halve
            if sides in self.original.sides:
                found = grow(resize(self.edit.mask, sides), self.dilation)
            elif inner in self.original.sides:
                found = torch.nn.functional.pad(self.mask(inner), (0, 1, 0, 1))
            else:
                found = torch.ones(sides, dtype=torch.bool, device=self.edit.mask.device)
            self.edit.masks[sides] = found
        return self.edit.masks[sides]

    def tiles(self, sides: Sides, window: Window) -> Tiles:
        """The active tiles of a convolution on an image of these sides."""
        if (sides, window) not in self.edit.tiles:
            self.edit.tiles[sides, window] = active(self.mask(sides), window, self.tile)
        return self.edit.tiles[sides, window]

    def tokens(self, count: int) -> Tensor | None:
        """[K], which of so many tokens have to be computed; None where no resolution has so many."""
        sides = next((s for s in self.original.sides if s[0] * s[1] == count), None)
        if sides is None:
            return None
        if count not in self.edit.tokens:
            self.edit.tokens[count] = self.mask(sides).flatten().nonzero()[:, 0]
        return self.edit.tokens[count]
