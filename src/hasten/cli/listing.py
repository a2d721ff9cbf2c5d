"""`hasten methods`: what there is, read from the file tree."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from hasten import tree
from hasten.tune.space import bounds


def everything() -> list[dict[str, Any]]:
    """One object a thing: name, kind, systems, settings, source; for solvers order, calls, stochastic; for methods
    stage and writes."""
    found: list[dict[str, Any]] = []
    for name, s in tree.functions("solvers").items():
        claims = {"order": s.order, "calls": s.calls, "stochastic": s.stochastic}
        found.append(_entry(name, "solver", s.systems, [], s.__doc__, claims))
    for room, kind in (("grids", "grid"), ("guidance", "guidance")):
        for name, f in tree.functions(room).items():
            systems = getattr(import_module(f.__module__), "systems", ())
            settings = [_setting(k, hint, default, field) for k, (hint, default, field) in tree.settings(f).items()]
            found.append(_entry(name, kind, systems, settings, f.__doc__, {}))
    for label, m in tree.methods().items():
        settings = [_setting(k, f.annotation, f.default, f) for k, f in m.model_fields.items()]
        claims = {"stage": m.stage.name, "writes": sorted(m.writes)}
        found.append(_entry(label, "method", m.systems, settings, m.__doc__, claims))
    for kind, room in (("objective", "objectives.pretrain"), ("metric", "measure")):
        for name in tree.files(room):
            module = import_module(f"hasten.{room}.{name}")
            if hasattr(module, "systems"):
                found.append(_entry(name, kind, module.systems, [], module.__doc__, {}))
    return found


def show(as_json: bool) -> None:
    """Prints it, as a table or as JSON."""
    if as_json:
        print(json.dumps(everything(), indent=2, default=str))
        return
    console = Console()
    things = everything()
    for kind in dict.fromkeys(t["kind"] for t in things):
        table = Table(title=f"{kind}s", title_justify="left", show_lines=False)
        for column in ("name", "settings", "claims", "what it does and where it is from"):
            table.add_column(column)
        for t in things:
            if t["kind"] == kind:
                settings = "\n".join(_told(s) for s in t["settings"])
                keys = ("order", "calls", "stochastic", "stage", "writes")
                claims = "\n".join(
                    f"{k} {v if not isinstance(v, list) else ', '.join(v)}" for k in keys if (v := t.get(k))
                )
                table.add_row(t["name"], settings, claims, t["source"])
        console.print(table)


def _entry(
    name: str, kind: str, systems: Any, settings: list[Any], doc: str | None, more: dict[str, Any]
) -> dict[str, Any]:
    source = " ".join((doc or "").split("\n\n")[0].split())
    return {"name": name, "kind": kind, "systems": list(systems), "settings": settings, **more, "source": source}


def _setting(name: str, hint: Any, default: Any, field: Any) -> dict[str, Any]:
    low, high, _ = bounds(field)
    choices = list(get_args(hint)) if "Literal" in str(hint) else None
    bounded = [low, high] if low is not None or high is not None else choices
    return {"name": name, "type": getattr(hint, "__name__", str(hint)), "default": default, "range": bounded}


def _told(s: dict[str, Any]) -> str:
    span = f" {s['range']}" if s["range"] else ""
    return f"{s['name']}={s['default']}{span}"
