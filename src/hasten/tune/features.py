"""Which features a run measures with."""

from __future__ import annotations

from hasten.bridge.features import encoder, inception
from hasten.measure.features import Features, efficientnet_lite0

OWN = "efficientnet-lite0"


def features(given: str = OWN, device: str | None = None) -> Features:
    """hasten's own, which need no download; or those of a CLIP or DINOv2 model (folder or hub id), or of an Inception
    file (.pt). Raises ModelError where it can't be read."""
    if given == OWN:
        return efficientnet_lite0()  # where pictures are handed over: on the CPU
    place = device or "cpu"
    return inception(given, place) if given.endswith(".pt") else encoder(given, place)
