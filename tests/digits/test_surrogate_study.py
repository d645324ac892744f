"""How good a surrogate is, and how noisy its pull."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.__main__ import main
from benchmarks.study import probe, surrogate
from diffalign.policies import TDMPolicy


@pytest.fixture(scope="module")
def student(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("rest") / "student"
    TDMPolicy(base.fork(trainable=True), steps=4).save(str(folder))
    return folder


def options(student, **changes):
    small = (f"policy.path={student}", "policy.policy.device=cpu", "prompts_per_step=2", "sampler.samples=12")
    given = {"set": small, "groups": 4, "samples": 16, "batches": 3, **changes}
    return surrogate.Options("digits_tdm_r1", **given)


def test_surrogates_of_more_samples_agree_more_and_order_pairs_rightly(student):
    few, many = (options(student, steps=steps).measured(0) for steps in (1, 10))
    assert all(more > less + 0.1 for less, more in zip(few["agreement"], many["agreement"], strict=True))
    assert many["pairs"] > 0.6
    assert 0 < many["signal"] <= 1


def test_the_pull_is_the_reward_terms_alone_and_moves_nothing(student):
    loop = probe.run_of("digits_tdm_r1", [f"--{change}" for change in options(student).set], 0)
    objective = probe.learned(loop, 2, False)
    products = surrogate.pulls(loop, objective, 2, 3)
    assert products.shape == (3, 3)
    assert float(products.diagonal().min()) > 0
    assert float(products.diagonal().max()) > 2, "no gradient is clipped to a length of 1"
    before = load_file(student / "student.safetensors")
    assert all(torch.equal(tensor.detach(), before[name]) for name, tensor in objective.policy.policy.own_parameters().items())
    named = objective.policies()
    named["surrogate"].load_state_dict(named["teacher"].state_dict())  # a surrogate that says what the base says
    assert float(surrogate.pulls(loop, objective, 2, 3).abs().max()) == 0.0


def test_the_study_keeps_what_it_has_measured(student, tmp_path, monkeypatch, capsys):
    file = tmp_path / "surrogate.json"
    size = ["--steps", "1", "--groups", "2", "--samples", "4", "--batches", "3", "--seeds", "2", "--json", str(file)]
    words = ["study", "surrogate", "digits_tdm_r1", *size, "--set", *options(student).set]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert [entry["seed"] for entry in json.loads(file.read_text())["runs"]] == [0, 1]
    monkeypatch.setattr(surrogate, "learned", None)  # nothing is made twice
    assert main(words) == 0
    assert capsys.readouterr().out == first
