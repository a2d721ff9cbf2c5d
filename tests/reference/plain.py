"""What embedded pipelines are asked alike: by those who have diffusers alone, and of their prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hasten.bridge.drawing import draw
from hasten.measure.features import efficientnet_lite0
from hasten.measure.fidelity import feature_distances
from hasten.reference import emoji

WANTED = [
    "grinning face", "heart with ribbon", "ninja", "flag: france", "rainbow", "pensive face", "student", "flag: germany"
]  # fmt: skip


def drawn(folder: Path, pipeline: str, network: str) -> str:
    """Has a fresh process load the folder and draw a picture, without hasten; what it complained of."""
    code = (
        f"import sys, torch; from diffusers import {pipeline};"
        f"p = {pipeline}.from_pretrained({str(folder)!r});"
        f"assert 'hasten' not in sys.modules; assert p.{network}.dtype == p.text_encoder.dtype == torch.float32;"
        "i = p('a red apple', num_inference_steps=2).images[0]; assert i.size == (64, 64)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def follows(pipe: Any) -> float:
    """The share of prompts whose pictures are nearer, in features of an ImageNet network, to the emoji of that name
    than to others; drawn without guidance by an empty prompt as with it."""
    where = {n: i for i, e in reversed(list(enumerate(emoji.entries()))) for n in e.names() if not e.tone}
    features = efficientnet_lite0()
    made = features(torch.cat(list(draw(pipe, WANTED, [0] * len(WANTED), 8, num_inference_steps=10))))
    truth = features(emoji.pictures()[[where[w] for w in WANTED]].float() / 255)
    apart = feature_distances(made, truth)
    own = apart.diagonal()
    return float((own < (apart.sum(1) - own) / (len(WANTED) - 1)).float().mean())
