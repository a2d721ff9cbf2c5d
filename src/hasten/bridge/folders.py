"""Pipelines from folders and hub ids, and back, with faults told in one line."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from hasten.bridge.scheduler import SolverScheduler

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class ModelError(ValueError):
    """A model that cannot be loaded or saved; one line says what was found and what to do."""


def read(model: str | os.PathLike[str], **kwargs: Any) -> DiffusionPipeline:
    """The pipeline of a folder, or, for `owner/name` that is no folder, of the hub. Only safetensors are read.

    Raises:
        ModelError: nothing there, a part missing, a truncated or corrupt file, or weights as a pickle.
    """
    folder = Path(model)
    if folder.is_dir():
        kwargs = _left_out(_look_over(folder)) | kwargs | {"local_files_only": True}
    elif folder.exists():
        raise ModelError(f"{model}: a file; give the folder of a diffusers pipeline (the one with model_index.json)")
    elif not is_hub_id(str(model)):
        raise ModelError(f"{model}: no such folder; give a diffusers folder, a hub id (owner/name) or an embedded name")
    try:
        return DiffusionPipeline.from_pretrained(str(model), use_safetensors=True, **kwargs)
    except (OSError, ValueError, SafetensorError, AttributeError, TypeError, KeyError, RuntimeError) as error:
        raise ModelError(f"{model}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def write(pipe: DiffusionPipeline, folder: Path) -> None:
    """Saves an untouched pipeline as safetensors, whole or not at all (written beside, then renamed).

    Raises:
        ModelError: it is accelerated, or the folder cannot be written.
    """
    if isinstance(pipe.scheduler, SolverScheduler) or "set_timesteps" in vars(pipe.scheduler):
        raise ModelError(
            "this pipeline is accelerated; call handle.remove() before saving, the recipe is saved beside it"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror}; choose a folder that can be written") from None
    try:
        pipe.save_pretrained(fresh, safe_serialization=True)
        _name_absent_parts(pipe, fresh)
        fresh.chmod(0o755)
        if folder.exists():
            old = fresh.with_name(fresh.name + ".old")
            folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror or error}; nothing was changed") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _name_absent_parts(pipe: DiffusionPipeline, folder: Path) -> None:
    """Parts that are None (a text encoder left out) stand in the index, so that `from_pretrained` asks for nothing."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {name: [None, None] for name, part in pipe.components.items() if part is None}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def is_hub_id(model: str) -> bool:
    """Whether it can name a model on the hub: owner/name, and nothing else."""
    owner, slash, name = model.partition("/")
    return bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~", "/"))


def _left_out(parts: dict[str, Any]) -> dict[str, None]:
    """Further text encoders that a pipeline may be saved without (SD3 without T5); `from_pretrained` must be told."""
    wanted = inspect.signature(getattr(diffusers, str(parts.get("_class_name")), dict)).parameters
    further = (n for n in wanted if re.fullmatch(r"(text_encoder|tokenizer)_\d", n))
    return {n: None for n in further if not (parts.get(n) or [None])[0]}


def _look_over(folder: Path) -> dict[str, Any]:
    """Finds the usual faults before diffusers does, to say them plainly. Returns what model_index.json holds."""
    index = folder / "model_index.json"
    if not index.exists():
        raise ModelError(
            f"{folder}: has no model_index.json, so it is no diffusers pipeline; give the folder that has one"
        )
    try:
        parts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{index}: cannot be read ({error}); download the pipeline again") from None
    for name, value in parts.items():
        if not (isinstance(value, list) and len(value) == 2 and value[0]):
            continue
        part = folder / name
        if not part.is_dir():
            raise ModelError(f"{folder}: the part {name!r} named in model_index.json is missing; download it again")
        _look_over_weights(part)
    return parts


def _look_over_weights(part: Path) -> None:
    weights = sorted(part.glob("*.safetensors"))
    pickles = sorted(p for p in part.iterdir() if p.suffix in PICKLES)
    if pickles and not weights:
        raise ModelError(
            f"{pickles[0]}: weights as a pickle can run any code and are refused; save the pipeline with "
            "safe_serialization=True"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: truncated or corrupt ({' '.join(str(error).split())}); download it again"
            ) from None
