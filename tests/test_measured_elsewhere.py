"""`diffalign evaluate` and `compare` on other prompts than a run's own, and what `compare` prints."""

import json
from pathlib import Path

import pytest
from toy import TOY

from diffalign.cli import main

RUN = (
    TOY.replace("{class_path: Prompts, init_args: {prompts: [one, two]}}", "{path: own.txt}")
    + "total: 2\nevaluation: {prompts: held-out.txt, steps: 3, samples: 3}\n"
)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(RUN)
    for name, texts in (("own", "one\ntwo\n"), ("held-out", "three\nfour\nfive\n"), ("asked", "six\nseven\n")):
        (tmp_path / f"{name}.txt").write_text(texts)
    monkeypatch.chdir(tmp_path)


def trained(name, *keys):
    assert main(["train", "toy.yaml", "--folder", name, *keys]) == 0


def test_a_run_whose_prompt_files_are_gone_is_measured_on_others(capsys):
    trained("first")
    trained("second", "--seed", "1")
    assert main(["evaluate", "first", "--prompts", "asked.txt", "--out", "before"]) == 0
    assert main(["compare", "first", "second", "--prompts", "asked.txt", "--out", "compared-before"]) == 0
    for name in ("own.txt", "held-out.txt"):
        Path(name).unlink()
    assert main(["evaluate", "first"]) == 2
    assert "evaluation: prompts.path must be a readable UTF-8 file" in capsys.readouterr().err
    assert main(["evaluate", "first", "--prompts", "asked.txt", "--out", "after"]) == 0
    before, after = (json.loads(Path(folder, "evaluation.json").read_text()) for folder in ("before", "after"))
    assert before == after
    assert (after["samples"], after["steps"]) == (3, 3), "the settings are those of the run's own evaluation"
    assert main(["compare", "first", "second", "--prompts", "asked.txt", "--out", "compared-after"]) == 0
    assert Path("compared-before/compare.json").read_bytes() == Path("compared-after/compare.json").read_bytes()
    assert main(["evaluate", "first", "--prompts", "gone.txt"]) == 2
    assert "prompts.path must be a readable UTF-8 file; got 'gone.txt'" in capsys.readouterr().err


def test_a_mixture_whose_prompt_files_are_gone_is_measured_on_others(capsys):
    mixture = "{class_path: Mixture, init_args: {sources: {a: {prompts: {path: own.txt}, share: 2}, b: {prompts: [eight]}}}}"
    mixed = RUN.replace("prompts: {path: own.txt}", f"prompts: {mixture}").replace("prompts: held-out.txt", "prompts: {a: held-out.txt}")
    Path("toy.yaml").write_text(mixed)
    trained("first")
    trained("second", "--seed", "1")
    answers = []
    for place in ("before", "after"):
        assert main(["evaluate", "first", "--prompts", "asked.txt", "--out", place]) == 0
        assert main(["compare", "first", "second", "--prompts", "asked.txt", "--out", f"compared-{place}"]) == 0
        answers.append([Path(place, "evaluation.json").read_bytes(), Path(f"compared-{place}", "compare.json").read_bytes()])
        for name in ("own.txt", "held-out.txt"):
            Path(name).unlink(missing_ok=True)
    assert answers[0] == answers[1]
    capsys.readouterr()
    assert main(["evaluate", "first"]) == 2
    assert "prompts.path must be a readable UTF-8 file" in capsys.readouterr().err


def test_compare_prints_paired_differences_and_win_rates(capsys):
    for place, name in enumerate(("one", "two", "three")):
        trained(name, "--seed", str(place), "--optimizers", "0.3")
    capsys.readouterr()
    assert main(["compare", "one", "two", "three", "--out", "compared"]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("compared/compare.json").read_text())
    for name in ("two", "three"):
        assert f"one -> {name}, the same prompts and noise: change [95 % interval over prompts]\n" in out
    reward = "JPEGCompressibility"
    difference = found["differences"][f"reward {reward}"]["two"]
    assert f"  reward {reward}" in out
    assert f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]\n" in out
    assert f"reward {reward}, share of images with the higher one" in out
    assert len(found["win_rates"][reward]) == 3
    for rate in found["win_rates"][reward]:
        assert f"  {rate['run']} against {rate['against']}  {rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]\n" in out
    assert out.endswith("compared/compare.html\n")
