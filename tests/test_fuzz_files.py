"""Broken files of users: a small share of what `python -m benchmarks break fuzz` tries."""

import json

import pytest
from hypothesis import given, settings

from benchmarks.breaking import fuzz, fuzz_cards, fuzz_lora, fuzz_prompts
from benchmarks.breaking.fault import FaultError
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


def test_prompt_files_mean_what_python_reads_in_them(tmp_path):
    outcomes = {fuzz_prompts.case(number, tmp_path) for number in range(600)}
    assert outcomes == {"as its writer meant it", "as Python reads it", "refused"}


def test_readmes_of_any_shape_give_the_licence_that_the_hub_sees_or_none(tmp_path):
    outcomes = [fuzz_cards.case(number, tmp_path) for number in range(60)]
    assert outcomes.count("the hub's licence") > 5


def test_broken_adapters_begin_where_plain_diffusers_does_or_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_lora, "FAMILIES", ("sd3",))
    outcomes = [fuzz_lora.case(number, tmp_path) for number in range(100)]
    assert sum(outcome.startswith("as plain diffusers") for outcome in outcomes) > 15


def test_a_reader_that_takes_another_scale_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_lora, "FAMILIES", ("sd3",))
    here = fuzz_lora.world("sd3")
    start = type(here).started
    monkeypatch.setattr(type(here), "started", lambda self, file: {name: 1.001 * change for name, change in start(self, file).items()})
    number = next(number for number in range(0, 700, 7) if fuzz_lora.made(number)[1].writer == "diffusers")
    with pytest.raises(FaultError, match="differs from plain diffusers"):
        fuzz_lora.case(number, tmp_path)


def test_alphas_that_plain_diffusers_leaves_over_are_multiplied_in_to_compare(tmp_path, monkeypatch):
    here, file, _ = fuzz_lora.made(4725)
    assert (here.name, file.writer) == ("flux2-klein", "layers under their authors' names")
    assert fuzz_lora.case(4725, tmp_path) == "as plain diffusers of the file with alphas multiplied in; it refuses this one"
    start = type(here).started
    monkeypatch.setattr(type(here), "started", lambda self, file: {name: 1.001 * change for name, change in start(self, file).items()})
    with pytest.raises(FaultError, match="no rule says what it means"):
        fuzz_lora.case(4725, tmp_path)


def test_the_program_counts_and_goes_on_from_its_record(tmp_path, capsys):
    file = tmp_path / "fuzz.json"
    assert fuzz.main(20, ("prompts", "files"), file) == 0
    first = file.read_bytes()
    assert fuzz.main(20, ("prompts", "files"), file) == 0
    assert file.read_bytes() == first
    counts = json.loads(first)["prompts"][0]["outcomes"]
    assert sum(counts.values()) == 20
    assert "faults: 0" in capsys.readouterr().out


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
