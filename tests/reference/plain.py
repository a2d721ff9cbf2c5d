"""What is written here, to those who have diffusers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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
