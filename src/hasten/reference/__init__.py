"""The embedded reference models: small, trained, shipped with the package, loaded by plain diffusers too."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

NAMES = ("emoji-flow", "emoji-unet")


def folder(name: str) -> Path:
    """Where an embedded pipeline lies, in diffusers' layout. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"no embedded model {name!r}; there is {', '.join(NAMES)}")
    return Path(str(files(__package__).joinpath("weights", name)))


def pipeline(name: str = "emoji-flow") -> Any:
    """An embedded pipeline in float32, a plain `StableDiffusion3Pipeline` (emoji-flow) or `StableDiffusionPipeline`
    (emoji-unet). Raises ValueError for an unknown name."""
    from hasten.bridge import folders

    return folders.read(folder(name))


def prompts(name: str = "emoji-flow", count: int = 64) -> list[str]:
    """Prompts that an embedded model knows, evenly over its data, no skin-tone variants; always the same ones."""
    from hasten.reference.emoji import entries

    folder(name)
    plain = [e.caption() for e in entries() if not e.tone]
    return [plain[i * len(plain) // count] for i in range(count)]
