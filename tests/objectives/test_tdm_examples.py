"""The few-step examples and the benchmark, shortened, and the run files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from benchmarks.cost import tdm_r1_step
from diffalign import config

ROOT = Path(__file__).parents[2]


def loaded(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main_of(file, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [file.name, *map(str, arguments)])
    loaded(file).main()


@pytest.mark.parametrize("name", ["shapeworld_tdm", "shapeworld_tdm_r1", "shapeworld_tdm_r1_gpu"])
def test_run_files_are_complete(name):
    run = config.parse(ROOT / "examples" / f"{name}.yaml")
    assert config.parse_text(run.yaml()).yaml() == run.yaml()
    assert (
        config.parse(name, ["--objective.fake_target=ExactTarget", "--objective.plan={class_path: InOrder, init_args: {}}"]).tree["total"]
        == run.tree["total"]
    )


def test_a_component_that_does_not_exist_is_refused_with_those_that_do():
    from diffalign.core import ConfigError

    with pytest.raises(ConfigError, match=r"objective.fake_target must be .*FakeTarget; got 'Exat'.*ExactTarget"):
        config.parse("shapeworld_tdm", ["--objective.fake_target=Exat"])


def test_the_ring_in_a_few_steps(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ring", loaded(ROOT / "examples/ring.py"))  # as its folder gives it; the tests have a ring too
    arguments = ["--pretrain", 5, "--distil", 2, "--reinforce", 2, "--out", tmp_path / "ring.png", "--json", tmp_path / "ring.json"]
    main_of(ROOT / "examples/ring_tdm_r1.py", monkeypatch, *arguments)
    assert (tmp_path / "ring.png").stat().st_size > 1000
    table = json.loads((tmp_path / "ring.json").read_text())
    assert list(table) == ["base, 40 steps", "base, 4 steps", "TDM, 4 steps", "TDM-R1, 4 steps"]
    assert "of processor time" in capsys.readouterr().out


def test_the_benchmark_counts_rows_and_finds_one_backbone(tmp_path, capsys):
    tdm_r1_step.main(prompts=1, samples=2, json=tmp_path / "step.json")
    numbers = json.loads((tmp_path / "step.json").read_text())
    samples = 2
    assert numbers["rows"] == {
        "policy/rollout": 4 * samples,  # the student
        "policy/update": 2 * samples,  # the fake and the surrogate take the stored states
        "fake/update": 2 * samples + 2 * samples,
        "surrogate/update": 2 * samples + 2 * 2 * samples,  # its own loss; its guided prediction for the generator
        "old_surrogate/update": 2 * samples,
        # anchor of the surrogate, anchor of the fake, guided prediction, reference
        "teacher/update": (2 + 2 + 2 * 2 + 2) * samples,
    }
    sizes = numbers["bytes"]
    shared = sizes.pop("frozen backbone, shared by all")
    assert set(sizes) == {"generator", "fake", "surrogate", "old_surrogate", "teacher"}
    assert len(set(sizes.values())) == 1
    assert sum(sizes.values()) < shared
    assert "frozen backbone" in capsys.readouterr().out
