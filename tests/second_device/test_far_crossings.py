"""What a step moves between host and device, and how often the host waits: counted, and no more than is needed."""

import pytest

from benchmarks.cost import crossings


@pytest.fixture(scope="module")
def found():
    return crossings.table()


def test_waits_of_a_step(found):
    """Ceilings: a new `.item()` in a hot path shows; fewer are welcome."""
    assert found["TMPO"]["waits"] <= 56
    assert found["TDM-R1"]["waits"] <= 98


def test_no_micro_batch_of_an_update_waits(found):
    assert not [place for place in found["TMPO"]["places"] if place.split()[-1] in ("below", "select", "_accumulate", "evaluate", "add")]


def test_what_goes_down_is_pictures_numbers_and_little_else(found):
    pictures = 54 * 3 * 64 * 64 * 4  # 54 samples in float32, for the reward; the first 16 again, for the report
    kept = pictures * 16 // 54
    assert pictures + kept < found["TMPO"]["bytes down"] < pictures + kept + 50_000
    noise = (2 + 2 * (3 + 9 + 27)) * 4 * 8 * 8 * 4
    assert found["TMPO"]["bytes up"] > noise
