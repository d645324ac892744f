"""The benchmark's rules on objects placed by hand."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import ConfigError
from diffalign.rewards.geneval_rules import Detected, correct, graded, relations, wanted
from diffalign.vocabulary import NAMES

CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}


def thing(score=0.9, box=(0, 0, 10, 10), color="red"):
    found = Detected(score, tuple(map(float, box)), torch.ones(1, 1, dtype=torch.bool))
    PAINT[id(found)] = (found, color)  # kept alive, so that no other object gets its number
    return found


PAINT: dict = {}


def colors_of(name, objects):
    return [PAINT[id(thing)][1] for thing in objects]


def holds(metadata, **found):
    return correct(wanted(Prompt("p", metadata), NAMES), found, colors_of, 0.1)


def grade(metadata, **found):
    return graded(wanted(Prompt("p", metadata), NAMES), found, colors_of, 0.1)


def things(number, **options):
    return [thing(**options) for _ in range(number)]


def test_single_object():
    metadata = {"tag": "single_object", "include": [CAT]}
    assert holds(metadata, cat=[thing()])
    assert holds(metadata, cat=things(2), dog=[thing()]), "other objects do no harm"
    assert not holds(metadata, dog=[thing()])
    assert not holds(metadata)


def test_two_objects():
    metadata = {"tag": "two_object", "include": [CAT, DOG]}
    assert holds(metadata, cat=[thing()], dog=[thing()])
    assert not holds(metadata, cat=things(2))


@pytest.mark.parametrize(("number", "expected"), [(1, False), (2, True), (3, False)])
def test_counting(number, expected):
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    assert holds(metadata, cat=things(number)) == expected
    assert wanted(Prompt("p", metadata), NAMES).counting


def test_colors_are_those_of_the_surest_objects():
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    assert holds(metadata, cat=[thing(color="red"), thing(color="blue")])
    assert not holds(metadata, cat=[thing(color="blue"), thing(color="red")])
    both = {"include": [{"class": "cat", "count": 2, "color": "red"}]}
    assert not holds(both, cat=[thing(color="red"), thing(color="blue"), thing(color="red")])
    assert holds(both, cat=things(2, color="red"))


def test_color_attribution():
    metadata = {"tag": "color_attr", "include": [{**CAT, "color": "red"}, {**DOG, "color": "blue"}]}
    assert holds(metadata, cat=[thing(color="red")], dog=[thing(color="blue")])
    assert not holds(metadata, cat=[thing(color="red")], dog=[thing(color="red")])
    assert not holds(metadata, cat=[thing(color="blue")], dog=[thing(color="blue")])


LEFT, RIGHT = (0, 40, 20, 60), (70, 40, 90, 60)
PLACED = {"tag": "position", "include": [DOG, {**CAT, "position": ["left of", 0]}]}


def test_position_is_seen_from_an_earlier_object():
    assert holds(PLACED, dog=[thing(box=RIGHT)], cat=[thing(box=LEFT)])
    assert not holds(PLACED, dog=[thing(box=LEFT)], cat=[thing(box=RIGHT)])
    assert not holds(PLACED, cat=[thing(box=LEFT)]), "there is nothing to be left of"


@pytest.mark.parametrize(
    ("wants", "there", "expected"), [(4, 4, 1), (4, 3, 0.75), (4, 5, 0.75), (4, 0, 0), (2, 3, 0.5), (1, 2, 0), (1, 4, -2)]
)
def test_a_grade_counts_how_far_a_count_is_off(wants, there, expected):
    """1 - |n - m| / n; the benchmark's own score is 0 for all that are not exact."""
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": wants}], "exclude": [{"class": "cat", "count": wants + 1}]}
    assert grade(metadata, cat=things(there)) == pytest.approx(expected)
    assert holds(metadata, cat=things(there)) == (expected == 1)


def test_a_grade_is_the_mean_over_objects():
    metadata = {"tag": "two_object", "include": [CAT, DOG]}
    assert grade(metadata) == 0
    assert grade(metadata, cat=[thing()]) == 0.5
    assert grade(metadata, cat=[thing()], dog=[thing()]) == 1
    assert grade(metadata, cat=[thing()], dog=things(2)) == 0.5, "one too many of one is none, which the benchmark's score does not mind"


def test_a_grade_has_a_term_for_the_colour():
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}]}
    assert grade(metadata, cat=things(2, color="red")) == 1
    assert grade(metadata, cat=[thing(color="red"), thing(color="blue")]) == pytest.approx((1 + 0.5) / 2)
    assert grade(metadata, cat=things(2, color="blue")) == pytest.approx((1 + 0) / 2)
    assert grade(metadata, cat=[thing(color="red")]) == pytest.approx((0.5 + 0) / 2), "of too few objects no colour counts"
    both = {"tag": "color_attr", "include": [{**CAT, "color": "red"}, {**DOG, "color": "blue"}]}
    assert grade(both, cat=[thing(color="red")], dog=[thing(color="red")]) == pytest.approx((1 + 1 + 1 + 0) / 4)


def test_a_grade_has_a_term_for_the_place():
    assert grade(PLACED, dog=[thing(box=RIGHT)], cat=[thing(box=LEFT)]) == 1
    assert grade(PLACED, dog=[thing(box=LEFT)], cat=[thing(box=RIGHT)]) == pytest.approx((1 + 1 + 0) / 3)
    assert grade(PLACED, cat=[thing(box=LEFT)]) == pytest.approx((0 + 1 + 0) / 3)
    assert grade(PLACED, dog=[thing(box=RIGHT)]) == pytest.approx((1 + 0 + 0) / 3)
    painted = {"include": [DOG, {**CAT, "color": "red", "position": ["left of", 0]}]}
    assert grade(painted, dog=[thing(box=RIGHT)], cat=[thing(box=LEFT, color="blue")]) == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_relations_by_hand():
    # centres (15, 50) and (75, 50), sizes 10: |d| = 60, slack 0.1 * (10 + 10) = 2 -> d' = -58 / 60 < -1/2
    assert relations((10, 45, 20, 55), (70, 45, 80, 55), 0.1) == {"left of"}
    assert relations((70, 45, 80, 55), (10, 45, 20, 55), 0.1) == {"right of"}
    assert relations((0, 0, 10, 10), (0, 60, 10, 70), 0.1) == {"above"}
    # d = (-60, -60): each share 58 / 84.9 = 0.68
    assert relations((0, 0, 10, 10), (60, 60, 70, 70), 0.1) == {"left of", "above"}
    # d = (-4, 0), sizes 20: slack 4 -> nothing is left of it
    assert relations((0, 0, 20, 20), (4, 0, 24, 20), 0.1) == set()
    # d = (-5, 0), slack 4 -> 1 / 5 < 1/2
    assert relations((0, 0, 20, 20), (5, 0, 25, 20), 0.1) == set()
    # d = (-9, 0), slack 4 -> 5 / 9 > 1/2
    assert relations((0, 0, 20, 20), (9, 0, 29, 20), 0.1) == {"left of"}
    assert relations((0, 0, 20, 20), (0, 0, 20, 20), 0.1) == set()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "prompt 'p' has no metadata 'include'"),
        ({"include": []}, "has no metadata 'include'"),
        ({"include": "cat"}, "metadata 'include' of prompt 'p' must be a list"),
        ({"include": [{"class": "cat"}]}, "an entry must have class and count, and may have color and position; got {'class': 'cat'}"),
        ({"include": [{**CAT, "colour": "red"}]}, "an entry must have class and count"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "the detector knows no 'unicorn'"),
        ({"include": [{"class": "cat", "count": 0}]}, "count must be a whole number of at least 1; got 0"),
        ({"include": [{"class": "cat", "count": 1.5}]}, "count must be a whole number"),
        ({"include": [{**CAT, "color": "teal"}]}, "color must be one of red, orange"),
        ({"include": [{**CAT, "position": ["left of", 0]}]}, "an earlier entry's number"),
        ({"include": [DOG, {**CAT, "position": ["beside", 0]}]}, "position must be one of left of"),
        ({"include": [CAT], "exclude": [{"class": "cat"}]}, "metadata 'exclude' of prompt 'p': an entry must have"),
    ],
)
def test_wrong_metadata_is_named(metadata, message):
    with pytest.raises(ConfigError, match=message):
        wanted(Prompt("p", metadata), NAMES)


def test_classes_are_those_of_coco_in_order():
    assert len(NAMES) == len(set(NAMES)) == 80
    assert (NAMES[0], NAMES[11], NAMES[57], NAMES[62], NAMES[79]) == ("person", "stop sign", "couch", "tv", "toothbrush")
