"""What every test shares: one thread's worth of noise kept out, and leaks found."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)  # tiny networks gain nothing from more, and two workers share two cores


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """A test that changes the default dtype, gradient mode, environment or leaves a thread of its own fails."""
    before = torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)
    threads = {t.name for t in threading.enumerate() if not t.daemon}
    yield
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[:2]
    changed = {k for k in os.environ.keys() | before[2].keys() if os.environ.get(k) != before[2].get(k)}
    assert not {k for k in changed if not k.startswith(("PYTEST", "TORCHINDUCTOR", "_TORCHINDUCTOR", "TRITON"))}, (
        changed
    )
    assert {t.name for t in threading.enumerate() if not t.daemon} <= threads


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """No pool of threads; and the variable that the first compilation sets for good is not blamed on a test."""
    from torch._inductor import config as inductor

    with inductor.patch(compile_threads=1):
        torch.compile(torch.abs)(torch.ones(3))
        yield
