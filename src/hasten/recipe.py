"""A recipe: solver, grid, guidance and methods as data, strict and versioned; what a user saves and shares."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path as File
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from torch import nn

from hasten import tree
from hasten.atomic import write_text_atomically
from hasten.grid import Spacing
from hasten.method import Method, apply_all, conflict
from hasten.patch import Patch

VERSION = 1


class RecipeError(ValueError):
    """A recipe that cannot be used: what was given, what was expected, what to do, in one line."""


class Guidance(BaseModel):
    """Classifier-free guidance: u + scale (c - u) while t is in `interval`, the conditional branch alone elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float | None = Field(None, ge=0, le=100, strict=True)
    interval: tuple[float, float] | None = None

    @field_validator("interval")
    @classmethod
    def _rises(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] <= value[1] <= 1:
            raise ValueError("interval is [low, high] with 0 <= low <= high <= 1, times in which 1 is noise")
        return value


class Recipe(BaseModel):
    """Every part is optional; what is absent stays as the pipeline has it.

    Attributes:
        solver: name of a file in `solvers/`, or {name: settings}.
        grid: name of a file in `grids/`, {name: settings}, or the times themselves, falling from 1 to 0.
        steps: steps of the solver.
        noise: of a stochastic solver: "fresh" numbers a step, as diffusers draws them, or one Brownian "path" for every
            number of steps, so that more steps refine the same picture. Absent: fresh.
        methods: applied in order of their stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hasten: Literal[1] = 1
    solver: str | dict[str, dict[str, Any]] | None = None
    grid: str | dict[str, dict[str, Any]] | tuple[float, ...] | None = None
    steps: int | None = Field(None, ge=1, le=10_000, strict=True)
    noise: Literal["fresh", "path"] | None = None
    guidance: Guidance = Field(default_factory=lambda: Guidance.model_validate({}))
    methods: tuple[Method, ...] = ()

    @field_validator("solver", "grid", mode="before")
    @classmethod
    def _read_named(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, dict):
            if len(value) != 1:
                raise ValueError(f"a {info.field_name} is one name with its settings; given {list(value)}")
            ((name, settings),) = value.items()
            return {str(name): _mapping(str(name), settings)}
        times = isinstance(value, list | tuple) and all(type(t) in (int, float) for t in value)
        if times and info.field_name == "grid":
            return tuple(float(t) for t in value)
        if value is None or isinstance(value, str):
            return value
        more = ", or a list of times" if info.field_name == "grid" else ""
        raise ValueError(f"a {info.field_name} is a name, a name with its settings{more}; given {value!r:.80}")

    @field_validator("methods", mode="before")
    @classmethod
    def _read_methods(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("methods is a list such as [cache.interval: {every: 2}]")
        return tuple(_read_method(item) for item in value)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        solver = self.solving()
        if self.noise is not None and not (solver and solver.stochastic):
            raise ValueError("noise is of solvers that add some: take one such as sde_dpmpp_2m, or leave noise out")
        if self.grid is not None and self.solver is None:
            raise ValueError("a grid needs a solver; add `solver: ddim` to keep close to the usual one")
        if isinstance(self.grid, tuple):
            if len(self.grid) < 2 or any(b >= a for a, b in zip(self.grid, self.grid[1:], strict=False)):
                raise ValueError(f"the times of a grid fall from 1 (noise) to 0; given {list(self.grid)}")
            if not all(0 <= t <= 1 for t in self.grid):
                raise ValueError(f"the times of a grid lie in [0, 1]; given {list(self.grid)}")
            if self.steps not in (None, len(self.grid) - 1):
                raise ValueError(f"{len(self.grid)} times make {len(self.grid) - 1} steps, but steps is {self.steps}")
        elif self.grid is not None:
            self.spacing()
        if (why := conflict(self.all_methods())) is not None:
            raise ValueError(why)
        return self

    def all_methods(self) -> list[Method]:
        """The methods, with the guidance interval as the method it is, in the order they are applied."""
        found = list(self.methods)
        if self.guidance.interval is not None:
            low, high = self.guidance.interval
            found.append(tree.method("guidance.interval")(low=low, high=high))  # type: ignore[call-arg]
        return sorted(found, key=lambda m: m.stage)

    def solving(self) -> Any:
        """The solver with its settings; None where the recipe has none."""
        found = _named("solvers", self.solver)
        return None if found is None else found[0].given(**found[1])

    def spacing(self) -> tuple[Spacing, dict[str, Any]] | None:
        """The grid's function and settings; None where the grid is absent or a list of times."""
        return None if isinstance(self.grid, tuple) else _named("grids", self.grid)

    def apply(self, model: nn.Module) -> list[tuple[Method, Patch]]:
        """Applies the methods to a bare network; whoever drives the loop sets the `Moment`.

        Raises:
            RecipeError: the recipe has a solver, grid, steps or scale, which need a pipeline.
        """
        if self.solver or self.steps or self.guidance.scale is not None:
            raise RecipeError(
                "a bare network takes a recipe of methods alone: remove solver, grid, steps and guidance scale"
            )
        return apply_all(self.all_methods(), model)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Raises RecipeError in one line where anything is unknown, out of range or in conflict."""
        if not isinstance(data, dict):
            raise RecipeError(
                f"a recipe is a mapping such as {{hasten: 1, solver: dpmpp_2m, steps: 8}}; given {data!r:.80}"
            )
        version = data.get("hasten", VERSION)
        if type(version) is not int or version != VERSION:
            raise RecipeError(
                f"this recipe is of version {version!r:.20}, this hasten reads version {VERSION}: update one"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(_one_line(error, cls.model_fields)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back to an equal recipe; absent parts are left out."""
        grid = list(self.grid) if isinstance(self.grid, tuple) else self.grid
        guidance = self.guidance.model_dump(mode="json", exclude_none=True)
        parts = {"hasten": VERSION, "solver": self.solver, "grid": grid, "steps": self.steps, "noise": self.noise}
        methods = [{m.label(): m.model_dump(mode="json")} for m in self.methods]
        return {k: v for k, v in parts.items() if v is not None} | (
            {"guidance": guidance} if guidance else {}
        ) | ({"methods": methods} if methods else {})  # fmt: skip

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Recipe:
        """Reads YAML. Raises RecipeError naming the file."""
        try:
            text = File(file).read_text(encoding="utf-8")
            return cls.from_dict(yaml.load(text, _Strict))
        except RecipeError as error:
            raise RecipeError(f"{file}: {error}") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise RecipeError(f"{file}: not YAML of a recipe: nested too deeply") from None
        except UnicodeDecodeError:
            raise RecipeError(f"{file}: not a text file; a recipe is YAML") from None
        except OSError as error:
            raise RecipeError(f"{file}: {error.strerror or error}; give a recipe file that can be read") from None

    def save(self, file: str | os.PathLike[str], comment: str = "") -> None:
        """Writes YAML, under `comment` as lines of #; whole or not at all (written beside, then renamed)."""
        head = "".join(f"# {line}\n" for line in comment.splitlines())
        text = head + yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None)
        write_text_atomically(file, text)


class _Strict(yaml.SafeLoader):
    """YAML in which no key stands twice: of two, the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((k for i, k in enumerate(keys) if k in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _named(room: str, given: str | dict[str, dict[str, Any]] | None) -> tuple[Any, dict[str, Any]] | None:
    """What stands in `room` under a name, and its checked settings."""
    if given is None:
        return None
    ((name, settings),) = ({given: {}} if isinstance(given, str) else given).items()
    found = tree.function(room, name)
    try:
        return found, tree.checked(found, settings)
    except ValidationError as error:
        raise ValueError(f"{name}: {_one_line(error, tree.settings(found))}") from None


def _read_method(item: Any) -> Method:
    if isinstance(item, Method):
        return item
    if isinstance(item, str):
        item = {item: {}}
    if not (isinstance(item, dict) and len(item) == 1):
        raise ValueError(
            f"a method is one name with its settings, such as cache.interval: {{every: 2}}; given {item!r:.80}"
        )
    ((label, settings),) = item.items()
    found = tree.method(str(label))
    try:
        return found.model_validate(_mapping(str(label), settings))
    except ValidationError as error:
        raise ValueError(f"{label}: {_one_line(error, found.model_fields)}") from None


def _mapping(name: str, settings: Any) -> dict[str, Any]:
    """Settings as YAML gives them: a mapping, or nothing."""
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: its settings are a mapping of names to values; given {settings!r:.60}")
    return settings


def _one_line(error: ValidationError, known: Iterable[str]) -> str:
    def tell(e: Any) -> str:
        place = ".".join(str(x) for x in e["loc"])
        given = "" if isinstance(e["input"], dict | list | tuple) else f", given {e['input']!r:.60}"
        if e["type"] == "extra_forbidden":
            names = Guidance.model_fields if place.startswith("guidance.") else known
            return f"unknown key {place!r}; known: {', '.join(names) or 'none'}"
        text = e["msg"].removeprefix("Value error, ").removesuffix(" after validation")
        text = re.sub(r"^(Input|Tuple|Keys) should", "must", text)
        text = re.sub(r"a valid dictionary or instance of \w+", "a mapping", text)
        text = re.sub(r" after validation|valid ", "", text)
        return text if e["type"] == "value_error" else f"{place}: {text}{given}"

    return "; ".join(dict.fromkeys(tell(e) for e in error.errors()))
