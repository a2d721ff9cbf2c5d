"""The table of methods and families in a reduced form: every method on some of the families that the contract does not
have, every family under some of the methods. `make compatibility` does all, and every pair."""

from __future__ import annotations

import math
from hashlib import blake2b

import pytest

from compatible import METHODS, alone, together
from families import FAMILIES, Family
from families_more import MORE
from hasten.method import conflict
from pipelines import PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
FURTHER = [f for f in (*PIPELINES, *MORE) if f not in FAMILIES]
LABELS = [label for label in METHODS if label != "runtime.compile"]  # a minute each


def lot(*words: str) -> int:
    """The same number for the same words, everywhere."""
    return int.from_bytes(blake2b(" ".join(words).encode(), digest_size=4).digest())


CASES = [pytest.param(m, f, id=f"{m}-{f.name}") for m in LABELS for f in FURTHER if lot(m, f.name) % 4 == 0]
PAIRS = [
    (a, b, FAMILIES[lot(a, b) % len(FAMILIES)])
    for i, a in enumerate(LABELS)
    for b in LABELS[:i]
    if conflict([METHODS[a](), METHODS[b]()]) is None and lot(b, a) % 3 == 0
]


@pytest.mark.parametrize(("label", "family"), CASES)
def test_a_method_works_or_is_refused_and_goes_without_a_trace(label: str, family: Family) -> None:
    found = alone(label, family)
    assert found["restored"]
    assert found.get("neutral", True)
    if "refused" in found:
        assert len(found["refused"]) > 40
        assert "\n" not in found["refused"]
    else:
        assert found["places"] > 0
        assert math.isfinite(found["moved"])


@pytest.mark.parametrize(("a", "b", "family"), [pytest.param(*p, id=f"{p[0]}+{p[1]}-{p[2].name}") for p in PAIRS])
def test_two_that_do_not_conflict_compose_or_are_refused(a: str, b: str, family: Family) -> None:
    found = together(a, b, family)
    assert found["restored"]
    assert "refused" in found or math.isfinite(found["moved"])
