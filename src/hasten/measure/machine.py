"""The machine that a number was measured on, without which the number says little. No host names, no paths."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

INSTRUCTIONS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni")
"""Instruction sets that decide how fast bfloat16 and int8 products run."""


def machine() -> dict[str, Any]:
    """Plain data for JSON: processor, threads that torch uses, instruction sets, memory in GiB, GPU or None, versions.

    An instruction set is None where the system does not tell (anything but Linux).
    """
    model, flags = _processor(_cpuinfo())
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": {name: None if flags is None else name in flags for name in INSTRUCTIONS},
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor(cpuinfo: str) -> tuple[str | None, frozenset[str] | None]:
    """Model name and flags, from the text of /proc/cpuinfo; None for what it does not tell."""
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip().lower(), value.strip())
    flags = found.get("flags", found.get("features"))
    return found.get("model name"), frozenset(flags.split()) if flags is not None else None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
