"""Settings of methods at which a test sees them."""

from __future__ import annotations

from typing import Any

STRONG: dict[str, dict[str, Any]] = {
    "attention.exact": {"backend": "tiled"},
    "attention.sage": {"emulate": True},
    "attention.sla": {"queries": 4, "keys": 4},
    "attention.sliding_tile": {"tile_t": 1, "tile_y": 2, "tile_x": 2, "window_t": 1, "window_y": 1, "window_x": 1},
    "attention.spatial_temporal": {"frames": 1, "dense": 1.0, "queries": 4, "keys": 4},
    "attention.top_blocks": {"queries": 4, "keys": 4},
    "cache.interval": {"every": 3},
    "cache.first_block": {"threshold": 2.0},
    "cache.planned": {"compute": (0, 3), "steps": 6},
    "cache.tea": {"threshold": 10.0},
    "cache.magnitude": {"ratios": (1.0,), "threshold": 0.5},
    "guidance.interval": {"low": 0.4, "high": 0.6},
}
"""At which a method certainly acts within six steps on tiny networks; others do by default."""


def strong(label: str) -> dict[str, Any]:
    return STRONG.get(label, {})
