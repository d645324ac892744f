"""What prompts mean, and which lists ship."""

from pathlib import Path

import pytest

import diffalign.digits
from diffalign.core import Prompt
from diffalign.digits import FAMILIES, Wish, parse, prompt_split
from diffalign.digits.grammar import NAMES, wishes

LISTS = Path(diffalign.digits.__file__).parent / "prompts"


@pytest.mark.parametrize(
    ("text", "classes", "thickness"),
    [
        ("a digit", range(10), None),
        ("an even digit", (0, 2, 4, 6, 8), None),
        ("an odd digit", (1, 3, 5, 7, 9), None),
        ("a digit above five", (6, 7, 8, 9), None),
        ("a digit below five", (0, 1, 2, 3, 4), None),
        ("a seven", (7,), None),
        ("an eight", (8,), None),
        ("a one", (1,), None),
        ("a thin seven", (7,), "thin"),
        ("a thick even digit", (0, 2, 4, 6, 8), "thick"),
        ("a thin digit", range(10), "thin"),
        ("a thick digit above five", (6, 7, 8, 9), "thick"),
        ("", (), None),
    ],
)
def test_by_hand(text, classes, thickness):
    assert parse(text) == parse(Prompt(text)) == Wish(tuple(classes), thickness)
    assert parse(text).caption == text


def test_there_are_45_prompts_and_each_is_read_back():
    captions = [wish.caption for family in FAMILIES for wish in wishes(family)]
    assert len(captions) == len(set(captions)) == 45
    assert all(parse(caption).caption == caption for caption in captions)
    assert [len(wishes(family)) for family in FAMILIES] == [3, 12, 30]


@pytest.mark.parametrize(
    "text", ["a cat", "seven", "a Seven", "a eight", "an one", "thin seven", "a thick", "a thin thick digit", "a digit above four", " "]
)
def test_other_text_is_refused_with_what_can_be_read(text):
    with pytest.raises(ValueError, match="is no prompt of digits") as error:
        parse(text)
    assert repr(text) in str(error.value)
    assert all(part in str(error.value) for part in ("'an even digit'", "'a thin seven'", *NAMES))


@pytest.mark.parametrize(
    ("classes", "thickness"), [((1, 2), None), ((0, 2, 4, 6), "thin"), ((), "thick"), ((10,), None), ((7, 7), None), ((7,), "bold")]
)
def test_wishes_that_no_prompt_can_have_are_refused(classes, thickness):
    with pytest.raises(ValueError, match=r"classes|thickness"):
        Wish(classes, thickness)


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_lists_are_the_grammars(family):
    train, held_out = ((LISTS / f"{family}{end}.txt").read_text().splitlines() for end in ("", "-held-out"))
    assert (train, held_out) == prompt_split(family)
    assert sorted(train + held_out) == sorted(wish.caption for wish in wishes(family))  # each once
    assert {parse(caption).family for caption in train + held_out} == {family}


def test_the_lists_of_all_are_those_of_the_families():
    for end in ("", "-held-out"):
        parts = [line for family in FAMILIES for line in (LISTS / f"{family}{end}.txt").read_text().splitlines()]
        assert (LISTS / f"all{end}.txt").read_text().splitlines() == parts
    assert "a digit" in (LISTS / "any.txt").read_text().splitlines()


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="family must be one of any, set, name; got 'count'"):
        prompt_split("count")
