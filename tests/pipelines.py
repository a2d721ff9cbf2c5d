"""Every pipeline family that a solver must run in."""

from __future__ import annotations

from families import FAMILIES
from families_image import IMAGES
from families_video import VIDEOS

PIPELINES = [*FAMILIES, *IMAGES, *VIDEOS]
