"""The command of the benchmarks: what it lists, how options come from a signature, and what a record keeps."""

import json
import math
from pathlib import Path
from typing import Literal

import attrs
import pytest

from benchmarks.__main__ import main
from benchmarks.cost import exactness
from benchmarks.intervals import interval, shown
from benchmarks.options import called, parser_of
from benchmarks.programs import HERE, ROOMS, programs_of
from benchmarks.record import Record, write

PROGRAMS = [program for room in ROOMS for program in programs_of(room).values()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"{program.room}-{program.name}")
def test_every_program_is_imported_told_in_one_line_and_says_what_its_options_are(program):
    assert program.summary.endswith((".", "!", "?"))
    told = parser_of(program.main(), program.name, program.told).format_help()
    assert program.summary in told
    assert "Args:" not in told
    assert f"usage: {program.name}" in told


def test_the_list_has_every_program(capsys):
    assert main([]) == main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {program.name} " in listed for program in PROGRAMS)
    assert {"ring", "tmpo", "nats", "tdm_r1"} <= programs_of("study").keys()
    assert main(["study"]) == 0
    studies = capsys.readouterr().out
    assert "  tmpo " in studies
    assert "  overhead " not in studies


@pytest.mark.parametrize(("words", "known"), [(["stud"], "study"), (["study", "tmpoo"], "tmpo"), (["cost", "tmpo"], "overhead")])
def test_unknown_programs_are_refused_with_those_that_exist(words, known, capsys):
    assert main(words) == 2
    assert f"there is no {' '.join(words)!r}" in (told := capsys.readouterr().err)
    assert known in told


def test_no_program_writes_a_parser_of_its_own():
    named = [file for room in ROOMS.values() for file in (HERE / room).glob("*.py") if "argparse" in file.read_text()]
    assert not named


def program(
    place: Path,
    kinds: tuple[Literal["a, b", "c"], ...] = ("a, b", "c"),
    pair: tuple[int, int] = (1, 2),
    fast: bool = False,
    rate: float | None = None,
    changes: tuple[str, ...] = (),
):
    return place, kinds, pair, fast, rate, *changes


TOLD = """A program.

Args:
    place: where
    kinds: of things
    pair: of numbers
    fast: or not
    rate: per cent (%)
    changes: of changes
"""


@attrs.frozen
class Options:
    """What is asked for.

    Args:
        some_rows: at least one
    """

    some_rows: tuple[int, ...] = attrs.field(default=(1,), validator=attrs.validators.min_len(1))


def of_a_class(options: Options):
    return options


def given(function, *words):
    return called(function, parser_of(function, "program", TOLD), words)


def test_options_are_the_arguments_of_main():
    assert given(program, "there") == program(Path("there"))
    words = ["there", "--kinds", "c", "--pair", "3", "4", "--fast", "--rate", "1e-4"]
    assert given(program, *words) == (Path("there"), ("c",), (3, 4), True, 1e-4)
    assert given(program, "there", "--kinds") == (Path("there"), (), (1, 2), False, None)
    assert given(of_a_class, "--some-rows", "2", "3") == Options((2, 3))
    told = parser_of(program, "program", TOLD).format_help()
    assert "of things; of 'a, b', 'c' (default: all)" in told
    assert "of changes\n" in told, "no words by default, which is not all of them"
    assert "per cent (%)" in told


@pytest.mark.parametrize(
    ("function", "words", "told"),
    [
        (program, [], "place"),
        (program, ["there", "--kinds", "d"], "Expected a typing.Literal"),
        (program, ["there", "--pair", "1"], "expected 2 arguments"),
        (program, ["there", "--rate", "much"], "rate"),
        (program, ["there", "--unknown", "1"], "--unknown"),
        (of_a_class, ["--some-rows"], "Length of 'some_rows' must be"),
    ],
)
def test_other_words_are_refused(function, words, told, capsys):
    with pytest.raises(SystemExit) as left:
        given(function, *words)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_an_argument_without_help_is_an_error():
    def untold(seeds: int = 1) -> None: ...

    with pytest.raises(KeyError, match="seeds"):
        parser_of(untold, "program", TOLD)


def test_a_record_makes_no_run_twice(tmp_path):
    file, made = tmp_path / "record.json", []

    def study(seeds):
        record = Record(file, {"modes": (0, 2)})
        rows = record.content.setdefault("rows", [])
        for seed in range(seeds):
            record.run("runs", {"arm": "a", "seed": seed}, lambda seed=seed: made.append(seed) or {"reward": seed / 2})
            record.once(rows, seed, lambda seed=seed: 10 * seed)
        return record.content

    study(2)
    content = study(3)
    assert made == [0, 1, 2]
    assert content == json.loads(file.read_text())
    assert content["runs"][2] == {"arm": "a", "seed": 2, "reward": 1.0}
    assert content["rows"] == [0, 10, 20]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    with pytest.raises(IndexError):
        Record(file).once(content["rows"], 5, lambda: 50)


def test_a_run_that_ends_early_leaves_those_before_it(tmp_path):
    record = Record(tmp_path / "record.json")
    record.run("runs", {"seed": 0}, dict)
    with pytest.raises(ZeroDivisionError):
        record.run("runs", {"seed": 1}, lambda: {"reward": 1 / 0})
    assert Record(tmp_path / "record.json").content == {"runs": [{"seed": 0}]}


def test_a_record_of_other_settings_is_refused(tmp_path):
    Record(tmp_path / "record.json", {"total": 700}).save()
    with pytest.raises(SystemExit, match=r"record.json must be of total 10; it is of 700: give another --json file"):
        Record(tmp_path / "record.json", {"total": 10})


def test_a_file_is_whole_at_every_moment(tmp_path):
    write(tmp_path / "found.json", [1])
    with pytest.raises(TypeError):
        write(tmp_path / "found.json", [object()])
    assert json.loads((tmp_path / "found.json").read_text()) == [1]
    write(None, [1])


def test_intervals_are_those_of_student():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30 / math.sqrt(3)))
    assert interval([0.0] * 3 + [1.0] * 3)[1] == pytest.approx(2.78 * math.sqrt(0.3 / 6)), (
        "six values have the quantile of five, the wider one"
    )
    assert shown([0.5]) == "0.500"
    assert shown([1.0, 2.0, 3.0], 1) == "2.0 +- 2.5"


def test_the_cost_of_exactness_adds_up_on_a_short_run(tmp_path, capsys):
    exactness.main(steps=1, prompts=1, check_rows=2, device="cpu", json=tmp_path / "exactness.json")
    shares = json.loads((tmp_path / "exactness.json").read_text())["shares"]
    assert list(shares) == ["contract", "draws", "finite"]
    assert all(share > 0 for share in shares.values())
    assert sum(shares.values()) < 1
    assert "ms" in capsys.readouterr().out
