"""Prompt sources: a pure function of the step; files that are refused line by line."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign import Prompt
from diffalign.core import ConfigError
from diffalign.prompts import PromptFile, Prompts, read_prompts

LISTS = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=9, unique=True)


def endless(source, count, steps):
    return [prompt for step in range(steps) for prompt in source.draw(step, count)]


@given(LISTS, st.integers(1, 7), st.integers(0, 5))
def test_every_epoch_is_a_permutation_however_it_is_cut_into_steps(texts, count, seed):
    drawn = endless(Prompts(texts, seed), count, 3 * len(texts))
    for start in range(0, len(drawn), len(texts)):
        epoch = drawn[start : start + len(texts)]
        assert sorted(epoch) == sorted(texts)
    assert drawn == endless(Prompts(texts, seed), 1, len(drawn))


@given(LISTS, st.integers(1, 20))
def test_without_shuffle_the_list_is_repeated_in_order(texts, count):
    drawn = Prompts(texts, shuffle=False).draw(0, count)
    assert drawn == list(islice(texts * count, count))


def test_seeds_and_epochs_have_orders_of_their_own():
    texts = [str(number) for number in range(20)]
    orders = [Prompts(texts, seed).draw(epoch, 20) for seed in range(2) for epoch in range(2)]
    assert len({tuple(order) for order in orders}) == 4


def test_prompts_keep_their_metadata_and_text_becomes_a_prompt():
    source = Prompts([Prompt("a", {"count": 1}), "b"], shuffle=False)
    drawn = source.draw(0, 2)
    assert [type(prompt) for prompt in drawn] == [Prompt, Prompt]
    assert drawn[0].metadata == {"count": 1}
    assert drawn[1].metadata == {}


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match=r"Prompts.prompts must hold at least one prompt; got none"):
        Prompts([])


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = written(tmp_path, "list.txt", "a red cube\n  zwei Würfel \nlast")
    assert read_prompts(path) == ["a red cube", "zwei Würfel", "last"]


def test_json_lists_hold_texts_and_objects(tmp_path):
    path = written(tmp_path, "list.json", '["a", {"prompt": " b ", "count": 2, "boxes": [[0, 1]]}]')
    first, second = read_prompts(path)
    assert (first, dict(first.metadata)) == ("a", {})
    assert (second, dict(second.metadata)) == ("b", {"count": 2, "boxes": [[0, 1]]})


def test_jsonl_has_an_object_a_line(tmp_path):
    path = written(tmp_path, "list.jsonl", '{"prompt": "a", "text": "HI"}\n"b"\n')
    first, second = read_prompts(path)
    assert (first, dict(first.metadata)) == ("a", {"text": "HI"})
    assert (second, dict(second.metadata)) == ("b", {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", "a\n\nb\n", "line 2: the line is empty; every line must hold a prompt. Remove it."),
        ("list.txt", "a\n   \n", "line 2: the line is empty"),
        ("list.txt", "", "must hold at least one prompt; it is empty"),
        ("list.json", "[]", "must hold at least one prompt; it is empty"),
        ("list.json", '{"prompt": "a"}', "must hold a JSON list of prompts; got dict"),
        ("list.json", '["a",\n oops]', "line 2: not JSON: Expecting value"),
        ("list.json", '["a", 3]', 'entry 2: must be text, or an object with a text "prompt"; got 3'),
        ("list.json", '[{"text": "a"}]', 'entry 1: must be text, or an object with a text "prompt"'),
        ("list.json", '[{"prompt": " "}]', "entry 1: must be text"),
        ("list.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON: Expecting value at column 12"),
        ("list.jsonl", '{"prompt": "a"}\n\n', "line 2: the line is empty"),
        ("list.jsonl", '{"prompt": 3}', "line 1: must be text, or an object"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, name, text, message):
    path = written(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_with_the_lists_that_ship(tmp_path):
    with pytest.raises(
        ConfigError, match=r"prompts.path must be a readable UTF-8 file; got .*nowhere.txt.* Shipped lists: .*shapeworld/count"
    ):
        read_prompts(str(tmp_path / "nowhere.txt"))
    (tmp_path / "latin.txt").write_bytes("Würfel".encode("latin-1"))
    with pytest.raises(ConfigError, match="must be a readable UTF-8 file"):
        read_prompts(str(tmp_path / "latin.txt"))


def test_shipped_lists_go_by_name():
    shipped = PromptFile("shapeworld/count", shuffle=False)
    assert len(shipped.prompts) > 10
    assert shipped.draw(0, 3) == list(shipped.prompts[:3])
    assert not set(shipped.prompts) & set(PromptFile("shapeworld/count-held-out").prompts)


def test_a_prompt_file_draws_as_its_list_would(tmp_path):
    path = written(tmp_path, "list.txt", "\n".join("abcdefg"))
    assert endless(PromptFile(path, seed=4), 3, 5) == endless(Prompts(list("abcdefg"), seed=4), 3, 5)
    assert PromptFile(path).prompts == tuple("abcdefg")
