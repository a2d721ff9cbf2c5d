"""What the search may choose, read from the file tree: every solver, grid and method with the ranges it declares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, Protocol, get_args, get_origin

from pydantic.fields import FieldInfo
from torch import nn

from hasten import tree
from hasten.method import Method, conflict
from hasten.recipe import Recipe

NONE = "none"
"""Of a room, no method."""


class Trial(Protocol):
    """The part of an Optuna trial that is used."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


def suggest(trial: Trial, labels: Sequence[str], most_steps: int, guided: bool) -> Recipe:
    """One recipe. Of a room whose methods exclude each other, as caches do, one or none is chosen; another method is
    offered only while it composes with those chosen before it, so no combination that conflicts is ever tried.

    Args:
        labels: methods that can be applied to this network, as found by trying.
        most_steps: network evaluations of the untouched pipeline; a recipe makes at most as many.
        guided: guidance is on, so that an interval for it is a choice.
    """
    name = trial.suggest_categorical("solver", solvers())
    solver = tree.function("solvers", name)
    chosen_settings = {k: value(trial, f"solver.{name}.{k}", *s) for k, s in tree.settings(solver).items()}
    grid = trial.suggest_categorical("grid", sorted(tree.functions("grids")))
    settings = {k: value(trial, f"grid.{grid}.{k}", *s) for k, s in tree.settings(tree.function("grids", grid)).items()}
    steps = trial.suggest_int("calls", min(4, most_steps), most_steps, log=True)
    if "order" in chosen_settings:  # more than there are steps is refused
        chosen_settings["order"] = min(chosen_settings["order"], steps)
    chosen: list[Method] = []
    for room, choices in rooms(labels, guided).items():
        if room is not None:
            picked = trial.suggest_categorical(room, [NONE, *choices])
            choices = [c for c in choices if c == picked]
        for label in choices:
            kind = tree.method(label)
            if conflict([*chosen, kind()]) is not None:
                continue
            if room is None and not trial.suggest_categorical(label, [False, True]):
                continue
            fields = {k: value(trial, f"{label}.{k}", f.annotation, f.default, f) for k, f in kind.model_fields.items()}
            if {"low", "high"} <= fields.keys():
                fields["low"], fields["high"] = sorted((fields["low"], fields["high"]))
            chosen.append(kind(**fields))
    return Recipe(
        solver={name: chosen_settings} if chosen_settings else name,
        grid={grid: settings} if settings else grid,
        steps=steps,
        methods=tuple(chosen),
    )


def rooms(labels: Sequence[str], guided: bool = True) -> dict[str | None, list[str]]:
    """Methods that may be tried, by the rooms in which each excludes every other; under None the rest, with those that
    exclude none of their room."""
    tried = [n for n in labels if tree.method(n).saves and (guided or n != "guidance.interval")]
    found: dict[str | None, list[str]] = {}
    for name in dict.fromkeys(n.split(".")[0] for n in tried):
        inside = [n for n in tried if n.split(".")[0] == name]
        apart = {p: conflict([tree.method(n)() for n in p]) is not None for p in combinations(inside, 2)}
        free = [n for n in inside if not any(apart[p] for p in apart if n in p)]
        rest = [n for n in inside if n not in free]
        exclusive = all(apart[p] for p in combinations(rest, 2))
        found.setdefault(None, []).extend(free)
        found.setdefault(name if exclusive and rest else None, []).extend(rest)
    return found


def solvers() -> list[str]:
    """Those that a search tries: a pipeline can run them, they add no noise, and a call makes a step."""
    fit = {n: s for n, s in tree.functions("solvers").items() if not (s.unfit or s.stochastic or s.few or s.fitted)}
    return sorted(n for n, s in fit.items() if s.calls == 1)


def value(trial: Trial, name: str, kind: Any, default: Any, field: FieldInfo | None) -> Any:
    """A setting within its range: of a bool or a Literal any, of a number between the bounds of its field.

    Raises:
        TypeError: a number without bounds; a method must say what may be tried.
    """
    if fixed(field):
        return default
    if kind is bool:
        return trial.suggest_categorical(name, [False, True])
    if get_origin(kind) is Literal:
        return trial.suggest_categorical(name, list(get_args(kind)))
    if kind not in (int, float):
        return default
    low, high, log = bounds(field)
    if low is None or high is None:
        raise TypeError(f"{name} has no range: declare it with Field(ge=..., le=...)")
    if kind is int:
        return trial.suggest_int(name, int(low), int(high), log=log)
    return trial.suggest_float(name, float(low), float(high), log=log)


def fixed(field: FieldInfo | None) -> bool:
    """The field's json_schema_extra says that a search leaves it as it is."""
    extra = field.json_schema_extra if field is not None else None
    return isinstance(extra, dict) and bool(extra.get("fixed"))


def bounds(field: FieldInfo | None) -> tuple[float | None, float | None, bool]:
    """(low, high, log) of a field: its ge/gt and le/lt, narrowed for searching by json_schema_extra's low, high and
    log."""
    low = high = None
    for m in field.metadata if field is not None else ():
        low = next((v for n in ("ge", "gt") if (v := getattr(m, n, None)) is not None), low)
        high = next((v for n in ("le", "lt") if (v := getattr(m, n, None)) is not None), high)
    extra = field.json_schema_extra if field is not None and isinstance(field.json_schema_extra, dict) else {}
    return extra.get("low", low), extra.get("high", high), bool(extra.get("log", False))  # type: ignore[return-value]


def refusals(net: nn.Module, tokens: int | None = None) -> dict[str, str]:
    """label -> reason, of the methods that can't be applied to `net` on this machine, found by trying, or can't pay at
    so many tokens."""
    found = {}
    for label, kind in tree.methods().items():
        if tokens is not None and tokens < kind.from_tokens:
            found[label] = f"it pays from {kind.from_tokens:,} tokens on, and here are {tokens:,}"
            continue
        try:
            kind().apply(net).remove()
        except ValueError as reason:  # Refused is one
            found[label] = str(reason)
    return found


def starts(labels: Sequence[str], most_steps: int) -> list[dict[str, Any]]:
    """Where the search begins: plain good sense, as parameters for `suggest`."""
    sure: dict[str, Any] = {}
    for room, choices in rooms(labels).items():
        good = [label for label in choices if tree.method(label).sure]
        sure |= {c: c in good for c in choices} if room is None else {room: good[0] if good else NONE}
    plain: dict[str, Any] = {"grid": "uniform"}
    shifted: dict[str, Any] = {"grid": "shifted", "grid.shifted.shift": 2.0}
    half = {"guidance.interval": True, "guidance.interval.low": 0.15, "guidance.interval.high": 0.95}
    half = half if "guidance.interval" in labels else {}
    late: dict[str, Any] = {"grid": "shifted", "grid.shifted.shift": 0.6}
    tries: tuple[tuple[float, str, dict[str, Any]], ...] = (
        (0.3, "dpmpp_2m", shifted),
        (0.36, "dpmpp_2m", plain | half),
        (0.36, "euler", late),
        (0.3, "unipc", shifted),
        (0.4, "euler", late),
        (0.43, "euler", plain | half),
        (0.47, "euler", late),
        (0.57, "euler", late),
        (0.5, "dpmpp_2m", plain),
    )
    return [{"solver": s, "calls": max(4, round(most_steps * share)), **sure, **more} for share, s, more in tries]
