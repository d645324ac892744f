"""Prompt sources: a pure function of the step; files that are refused line by line."""

import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign import Prompt
from diffalign.cli import main
from diffalign.core import ConfigError
from diffalign.prompts import PromptFile, Prompts, read_prompts

LISTS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5), min_size=1, max_size=9, unique=True
)


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


@pytest.mark.parametrize("text", ["three red circles", Prompt("three red circles")])
def test_one_text_is_no_list_of_its_letters(text):
    with pytest.raises(ValueError, match=r"must be a list of texts; got the text 'three red circles'. Put it in a list: \['three red cir"):
        Prompts(text)


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
        ("list.txt", "a\n   \nb", "line 2: the line is empty"),
        ("list.txt", "", "must hold at least one prompt; it is empty"),
        ("list.json", "[]", "must hold at least one prompt; it is empty"),
        ("list.json", '{"prompt": "a"}', "must hold a JSON list of prompts; got dict"),
        ("list.json", '["a",\n oops]', "line 2: not JSON: Expecting value"),
        ("list.json", '["a", 3]', 'entry 2: must be text, or an object with a text "prompt"; got 3'),
        ("list.json", '[{"text": "a"}]', 'entry 1: must be text, or an object with a text "prompt"'),
        ("list.json", '[{"prompt": " "}]', "entry 1: must be text"),
        ("list.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON: Expecting value at column 12"),
        ("list.jsonl", '{"prompt": "a"}\n\n"b"\n', "line 2: the line is empty"),
        ("list.jsonl", '"a"\n{"prompt": "b\\ud800c"}', "line 2: character 2 is half a character (lone surrogate U+D800)"),
        ("list.json", '["\\udfffa"]', "entry 1: character 1 is half a character (lone surrogate U+DFFF)"),
        ("list.csv", "text,tag\na,b\n", 'line 1: must name the columns, each once, one of them "prompt"'),
        ("list.csv", "prompt,prompt\na,b\n", "line 1: must name the columns"),
        ("list.csv", "prompt,tag\na\n", "line 2: must have 2 cells, as the first line; got 1"),
        ("list.csv", "prompt,tag\na,b,c\n", "line 2: must have 2 cells, as the first line; got 3"),
        ("list.csv", 'prompt\n"a\n', "no table that can be read: unexpected end of data"),
        ("list.csv", "prompt,tag\n,b\n", "line 2: must be text"),
        ("list.csv", "prompt\na\n\nb\n", "line 3: the line is empty"),
        ("list.csv", "prompt,height\na,64\n", "line 2: a prompt's height and width must both be whole numbers"),
        ("list.csv", "prompt,height,width\na,64.5,64\n", "line 2: a prompt's height and width must both be whole numbers"),
        ("list.csv", "prompt\n", "must hold at least one prompt; it is empty"),
        ("list.tsv", "", "line 1: must name the columns"),
        ("list.jsonl", '{"prompt": 3}', "line 1: must be text, or an object"),
        ("list.jsonl", '{"prompt": "a", "n": 1, "prompt": "b"}', "line 1: an object has 'prompt' twice; keep one"),
        ("list.json", '[{"prompt": "a", "include": [{"class": "cat", "class": "dog"}]}]', "an object has 'class' twice"),
        ("list.jsonl", '"a\\u0000b"', "line 1: character 2 is NUL (U+0000), which is no text"),
        ("list.txt", "a\n\0b\n", "line 2: character 1 is NUL"),
        ("list.csv", "prompt\na \0\n", "line 2: character 3 is NUL"),
        ("list.txt", "a red cube\ra blue ball\r", "lines must end at line feeds; there are only carriage returns"),
        (
            "list.txt",
            '{"prompt": "a"}\n{"prompt": "b"}\n',
            "line 1: a line of a .txt file is the prompt itself; this one is JSON. Name the file .jsonl",
        ),
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


LETTERS = {"U+2028": "\u2028", "U+0085": "\x85", "form feed": "\x0c", "vertical tab": "\x0b", "file separator": "\x1c"}


@pytest.mark.parametrize("letter", LETTERS.values(), ids=LETTERS)
def test_lines_end_at_line_feeds_alone(tmp_path, letter):
    text = f"a sign{letter}above a bar"
    assert read_prompts(written(tmp_path, "list.txt", f"{text}\na red cube\n")) == [text, "a red cube"]
    lines = f'{{"prompt": {json.dumps(text, ensure_ascii=False)}}}\n"a red cube"\n'
    if letter in ("\u2028", "\x85"):  # the others must be escaped in JSON
        assert read_prompts(written(tmp_path, "list.jsonl", lines)) == [text, "a red cube"]
    assert read_prompts(written(tmp_path, "list.csv", f'prompt\n"{text}"\na red cube\n')) == [text, "a red cube"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "a red cube\na blue ball\n"),
        ("list.json", '["a red cube",\n"a blue ball"]'),
        ("list.JSONL", '{"prompt": "a red cube"}\n{"prompt": "a blue ball"}\n'),
        ("list.ndjson", '"a red cube"\n"a blue ball"'),
        ("list.csv", "prompt\na red cube\na blue ball\n"),
        ("list.Tsv", "tag\tprompt\nx\ta red cube\ny\ta blue ball"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("more", ["", "\n", "\n  \n\n"])
def test_a_file_of_any_editor_is_read(tmp_path, name, text, mark, ending, more):
    path = tmp_path / name
    path.write_bytes((mark + text + more).replace("\n", ending).encode())
    assert read_prompts(str(path)) == ["a red cube", "a blue ball"]


def test_a_byte_order_mark_that_was_copied_along_is_no_part_of_a_prompt(tmp_path):
    assert read_prompts(written(tmp_path, "list.txt", "\ufeff\ufeffa cube \ufeff\n \ufeff \ufeff b\ufeff \ufeff\n")) == ["a cube", "b"]


def test_a_table_has_columns_as_metadata(tmp_path):
    path = written(tmp_path, "list.csv", 'tag,prompt,height,width\nx,"a sign, ""HI""",64,32\n,"two\nlines",,\n')
    first, second = read_prompts(path)
    assert (first, dict(first.metadata), first.size) == ('a sign, "HI"', {"tag": "x", "height": 64, "width": 32}, (64, 32))
    assert (second, dict(second.metadata), second.size) == ("two\nlines", {"tag": "", "height": None, "width": None}, None)


@pytest.mark.parametrize("name", ["list", "list.yaml", "list.txt.bak", "list.json5"])
def test_another_ending_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"must end in one of \.txt, \.json, \.jsonl, \.ndjson, \.csv, \.tsv"):
        read_prompts(written(tmp_path, name, "a red cube\n"))


def test_utf_16_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes("a red cube\r\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"is UTF-16\. Save it as UTF-8"):
        read_prompts(str(tmp_path / "list.txt"))


def test_a_path_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "list.txt", "a red cube")
    assert PromptFile("~/list.txt").prompts == ("a red cube",)


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_without_a_mark_is_no_text_with_holes(tmp_path, order):
    (tmp_path / "list.txt").write_bytes("a red cube\r\nb\r\n".encode(f"utf-16-{order}"))
    with pytest.raises(ConfigError, match=r"list\.txt, line 1: character \d is NUL \(U\+0000\), which is no text\. Is it UTF-16\?"):
        read_prompts(str(tmp_path / "list.txt"))


def test_half_a_character_is_refused_wherever_it_comes_from(capsys):
    with pytest.raises(ConfigError, match=r"Prompts\.prompts\[1\]: character 3 is half a character"):
        Prompts(["a cube", "a \udc80 cube"])
    assert main(["sample", "shapeworld_tmpo", "--prompt", "a \udcff cube", "--out", "cube.png"]) == 2
    assert "--prompt: character 3 is half a character (lone surrogate U+DCFF)" in capsys.readouterr().err
