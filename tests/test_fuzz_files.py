"""Broken run files, overrides and prompt files: a small share of what `python -m benchmarks break fuzz` tries."""

import pytest
from hypothesis import given, settings

from benchmarks.breaking import fuzz
from diffalign import config
from diffalign.core import ConfigError


def test_the_run_that_is_broken_is_whole_before():
    assert fuzz.check_run(fuzz.RUN, [])


@settings(max_examples=150)
@given(fuzz.run_files(), fuzz.overrides)
def test_a_broken_run_file_is_refused_by_an_error_of_ours(content, overrides):
    fuzz.check_run(content, overrides)


@settings(max_examples=100)
@given(file=fuzz.prompt_files())
def test_a_broken_prompt_file_is_refused_by_an_error_of_ours(tmp_path_factory, file):
    fuzz.check_prompts(*file, tmp_path_factory.getbasetemp())


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total: " + "[" * 3000, "nested too deeply"),
        ("total: &x [*x]", "at most 100 levels"),
        (LAUGHS, "1000000 values; aliases"),
        ("total: " + "9" * 5000, "not YAML: Exceeds the limit"),
    ],
    ids=["deep", "itself", "laughs", "digits"],
)
def test_text_that_would_exhaust_the_reader_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        config.parse_text(text, "run")
