"""Tensors in a safetensors file that says whose they are."""

from __future__ import annotations

import os
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hasten.atomic import write_bytes_atomically


def write(file: str | os.PathLike[str], label: str, tensors: Mapping[str, Tensor], **about: str) -> None:
    """One file, whole or not at all.

    Args:
        label: whose the tensors are, such as "cache.clockwork".
        about: what else `read` gives back.
    """
    named = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes_atomically(file, save(named, {"hasten": label, **about}))


def read(file: str | os.PathLike[str], label: str, what: str, maker: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and what was written about them.

    Args:
        what: the tensors, in words, such as "adaptor".
        maker: who writes such files, in words.

    Raises:
        ValueError: in one line, where there is no such file or it is another's.
    """
    try:
        with safe_open(file, "pt") as f:
            about = dict(f.metadata() or {})
            if (whose := about.pop("hasten", None)) != label:
                raise ValueError(f"{file} holds no {what} of {label} (but of {whose}): give the file that {maker} made")
            return {key: f.get_tensor(key) for key in f.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give the file that {maker} made") from None
