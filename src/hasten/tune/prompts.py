"""Prompts to measure on: a user's file, those an embedded model knows, or a general set."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from hasten import reference


class PromptsError(ValueError):
    """A prompt file that cannot be used; one line."""


def read_prompts(file: Path) -> list[str]:
    """One prompt a line, UTF-8, empty lines left out.

    Raises:
        PromptsError: the file is missing, no text, or empty.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise PromptsError(f"{file}: not UTF-8 text; give one prompt a line") from None
    except OSError as error:
        raise PromptsError(f"{file}: {error.strerror}; give a text file with one prompt a line") from None
    found = [line for line in lines if line]
    if not found:
        raise PromptsError(f"{file}: no prompts in it; give one a line, 12 or more")
    return found


def default_prompts(model: str) -> list[str]:
    """36 prompts: of what an embedded model knows, else of everyday things."""
    if model in reference.NAMES:
        return reference.prompts(model, 36)
    return files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8").split("\n")[:36]
