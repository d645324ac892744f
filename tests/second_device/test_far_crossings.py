"""What a step moves between host and device, and how often the host waits: counted, and no more than is needed."""

import pytest

from benchmarks.cost import crossings
from diffalign.samplers import FixedPlan, TreeSampler

TREE = TreeSampler(6, FixedPlan((1, 2), branches=2))
"""Smaller than the benchmark's: no wait is one of a sample, of a call or of a piece, of which the update has two."""


@pytest.fixture(scope="module")
def found():
    return crossings.table(TREE, samples=2)


def test_waits_of_a_step(found):
    """Ceilings: a new `.item()` in a hot path shows; fewer are welcome."""
    assert found["TMPO"]["waits"] <= 55
    assert found["TDM-R1"]["waits"] <= 98


def test_no_micro_batch_of_an_update_waits(found):
    assert not [place for place in found["TMPO"]["places"] if place.split()[-1] in ("below", "select", "_accumulate", "evaluate", "add")]


def test_what_goes_down_is_pictures_numbers_and_little_else(found):
    pictures = 8 * 3 * 64 * 64 * 4  # 8 samples in float32, for the reward; the first 16, all of them, again for the report
    kept = pictures
    assert pictures + kept < found["TMPO"]["bytes down"] < pictures + kept + 50_000
    noise = (2 + 2 * (2 + 4)) * 4 * 8 * 8 * 4
    assert found["TMPO"]["bytes up"] > noise
