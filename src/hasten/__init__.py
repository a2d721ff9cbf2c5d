"""hasten makes diffusion and flow models fast, and proves it.

>>> import hasten
>>> handle = hasten.accelerate(pipe, "recipe.yaml")  # doctest: +SKIP
>>> handle.remove()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.api import Handle as Handle
    from hasten.api import accelerate as accelerate
    from hasten.api import load as load
    from hasten.api import save as save
    from hasten.recipe import Recipe as Recipe

__version__ = "0.1.0"
_WHERE = {
    "accelerate": "api",
    "save": "api",
    "load": "api",
    "Handle": "api",
    "Recipe": "recipe",
    "reference": "reference",
}


def __getattr__(name: str) -> Any:
    """Loads a part when it is first asked for, so that `import hasten` is instant."""
    if name not in _WHERE:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    module = import_module(f"hasten.{_WHERE[name]}")
    return module if name == _WHERE[name] else getattr(module, name)
