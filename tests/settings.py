"""Settings of methods at which a test sees them."""

from __future__ import annotations

from typing import Any

STRONG: dict[str, dict[str, Any]] = {
    "cache.interval": {"every": 3},
    "cache.first_block": {"threshold": 2.0},
    "cache.planned": {"compute": (0, 3), "steps": 6},
    "cache.tea": {"threshold": 10.0},
    "cache.magnitude": {"ratios": (1.0,), "threshold": 0.5},
    "guidance.interval": {"low": 0.4, "high": 0.6},
}
"""At which a method certainly acts within six steps; others do by default."""


def strong(label: str) -> dict[str, Any]:
    return STRONG.get(label, {})
