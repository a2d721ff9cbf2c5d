"""The file tree is the registry: a solver, grid or method is one file, found here by the name of its room and file."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any, get_type_hints

from pydantic import ConfigDict, create_model
from pydantic.fields import FieldInfo
from torch import nn

from hasten.method import Method
from hasten.patch import Patch

Recorder = Callable[[nn.Module, Any], tuple[Patch, Callable[[], Method]]]
"""(network, method) -> what watches the network, and what then gives the method with the settings it measured."""

METHOD_ROOMS = ("runtime", "quant", "attention", "tokens", "cache", "guidance")


def files(room: str) -> list[str]:
    """Names of the modules of a room, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(import_module(f"hasten.{room}").__path__))


def function(room: str, name: str) -> Any:
    """The function `name` of the file `name` in `room`. Raises ValueError with the names there are."""
    if name in files(room):
        found = getattr(import_module(f"hasten.{room}.{name}"), name, None)
        if found is not None:
            return found
    raise ValueError(_unknown(room.removesuffix("s"), name, functions(room)))


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    if len(names) > 16:
        near = get_close_matches(name, names, 3, 0.5)
        meant = f", did you mean {' or '.join(near)}?" if near else ","
        return f"unknown {kind} {name!r:.40}{meant} `hasten methods` lists all {len(names)}"
    return f"unknown {kind} {name!r:.40}; known: {', '.join(names)}"


def functions(room: str) -> dict[str, Any]:
    """Every file of a room that holds a function of its own name."""
    found = {n: getattr(import_module(f"hasten.{room}.{n}"), n, None) for n in files(room)}
    return {n: f for n, f in found.items() if f is not None}


def method(label: str) -> type[Method]:
    """The method of a label such as "cache.interval". Raises ValueError with the labels there are."""
    room, _, name = label.partition(".")
    if room in METHOD_ROOMS and name.isidentifier() and find_spec(f"hasten.{room}.{name}"):
        found = _method_in(f"hasten.{room}.{name}")
        if found is not None:
            return found
    raise ValueError(_unknown("method", label, methods()))


def methods() -> dict[str, type[Method]]:
    """Every method, by label."""
    names = [f"{room}.{name}" for room in METHOD_ROOMS for name in files(room)]
    found = {n: _method_in(f"hasten.{n}") for n in names}
    return {n: m for n, m in found.items() if m is not None}


def recorder(label: str) -> Recorder:
    """How the settings of a method are measured on a network: the function `recorder` of its file. Raises ValueError
    with the methods that have one."""
    method(label)
    found = {n: getattr(import_module(f"hasten.{n}"), "recorder", None) for n in methods()}
    if (one := found[label]) is None:
        raise ValueError(f"{label} has nothing to record; these have: {', '.join(n for n, f in found.items() if f)}")
    return one


def _method_in(module: str) -> type[Method] | None:
    members = vars(import_module(module)).values()
    own = [m for m in members if inspect.isclass(m) and issubclass(m, Method) and m.__module__ == module]
    return own[0] if own else None


def settings(function: Callable[..., Any]) -> dict[str, tuple[Any, Any, Any]]:
    """Keyword-only settings of a solver, grid or guidance: name -> (type, default, pydantic field or None)."""
    function = getattr(function, "run", function)  # of a solver, its generator
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for name, p in inspect.signature(function).parameters.items():
        if p.kind is p.KEYWORD_ONLY:
            hint = hints.get(name, Any)
            field = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, FieldInfo)), None)
            found[name] = (getattr(hint, "__origin__", hint) if field else hint, p.default, field)
    return found


def checked(function: Callable[..., Any], given: dict[str, Any] | None) -> dict[str, Any]:
    """The settings `given` for a function, validated against the ranges it declares. Raises ValueError in one line."""
    function = getattr(function, "run", function)
    hints = get_type_hints(function, include_extras=True)
    shape: dict[str, Any] = {n: (hints[n], default) for n, (_, default, _) in settings(function).items()}
    model = create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **shape)
    return model.model_validate(given or {}).model_dump(exclude_unset=True)
