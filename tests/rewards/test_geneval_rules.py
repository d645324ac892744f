"""The benchmark's rules on objects placed by hand."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import ConfigError
from diffalign.rewards.detection import NAMES
from diffalign.rewards.geneval_rules import Detected, judged, relations, wanted

CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}


def thing(score=0.9, box=(0, 0, 10, 10), color="red"):
    found = Detected(score, tuple(map(float, box)), torch.ones(1, 1, dtype=torch.bool))
    PAINT[id(found)] = (found, color)  # kept alive, so that no other object gets its number
    return found


PAINT: dict = {}


def holds(metadata, **found):
    want = wanted(Prompt("p", metadata), NAMES)
    return judged(want, found, lambda name, objects: [PAINT[id(thing)][1] for thing in objects], 0.1)


def test_single_object():
    metadata = {"tag": "single_object", "include": [CAT]}
    assert holds(metadata, cat=[thing()]) == [True]
    assert holds(metadata, cat=[thing(), thing()], dog=[thing()]) == [True], "other objects do no harm"
    assert holds(metadata, dog=[thing()]) == [False]
    assert holds(metadata) == [False]


def test_two_objects():
    metadata = {"tag": "two_object", "include": [CAT, DOG]}
    assert holds(metadata, cat=[thing()], dog=[thing()]) == [True, True]
    assert holds(metadata, cat=[thing(), thing()]) == [True, False]


@pytest.mark.parametrize(("number", "expected"), [(1, [False, True]), (2, [True, True]), (3, [True, False])])
def test_counting(number, expected):
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    assert holds(metadata, cat=[thing()] * number) == expected
    assert wanted(Prompt("p", metadata), NAMES).counting


def test_colors_are_those_of_the_surest_objects():
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    assert holds(metadata, cat=[thing(color="red"), thing(color="blue")]) == [True]
    assert holds(metadata, cat=[thing(color="blue"), thing(color="red")]) == [False]
    both = {"include": [{"class": "cat", "count": 2, "color": "red"}]}
    assert holds(both, cat=[thing(color="red"), thing(color="blue"), thing(color="red")]) == [False]
    assert holds(both, cat=[thing(color="red"), thing(color="red")]) == [True]


def test_color_attribution():
    metadata = {"tag": "color_attr", "include": [{**CAT, "color": "red"}, {**DOG, "color": "blue"}]}
    assert holds(metadata, cat=[thing(color="red")], dog=[thing(color="blue")]) == [True, True]
    assert holds(metadata, cat=[thing(color="blue")], dog=[thing(color="red")]) == [False, False]


def test_position_is_seen_from_an_earlier_object():
    metadata = {"tag": "position", "include": [DOG, {**CAT, "position": ["left of", 0]}]}
    left, right = (0, 40, 20, 60), (70, 40, 90, 60)
    assert holds(metadata, dog=[thing(box=right)], cat=[thing(box=left)]) == [True, True]
    assert holds(metadata, dog=[thing(box=left)], cat=[thing(box=right)]) == [True, False]
    assert holds(metadata, cat=[thing(box=left)]) == [False, False], "there is nothing to be left of"


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
