"""The probe of the reward's direction, and the study of four steps, shortened."""

import json

import attrs
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.__main__ import main
from benchmarks.study import few, probe
from diffalign.core import Progress, Prompt, ScoredBatch, Streams
from diffalign.digits import DigitsPolicy
from diffalign.objectives import DGPO, DirectReinforcement, SurrogateReward
from diffalign.policies import TDMPolicy
from diffalign.samplers import DeterministicSampler


@pytest.fixture(scope="module")
def student(tmp_path_factory, base):
    """The base in four steps, as a student that has learned nothing yet."""
    folder = tmp_path_factory.mktemp("four") / "student"
    TDMPolicy(base.fork(trainable=True), steps=4).save(str(folder))
    return folder


def small(student):
    return [f"--policy.path={student}", "--policy.policy.device=cpu", "--prompts_per_step=2", "--sampler.samples=12"]


def test_the_judges_gradient_ascends_at_every_stage(student):
    found = probe.probe("digits_tdm_r1", small(student), [Prompt("a digit")], 0, 12, 12, 0.3, 0, judge=(0, 2, 4, 6, 8))
    assert [entry.stage for entry in found] == [0, 1, 2, 3]
    assert all(entry.ascent > 3 * entry.error > 0 for entry in found)


def test_a_surrogate_that_has_learned_ascends_and_the_student_rests(student):
    fast = (*small(student), "--optimizers.surrogate.lr=1e-3")
    found = probe.probe("digits_tdm_r1", fast, [Prompt("a digit")], 12, 16, 16, 0.15, 0)
    assert sum(entry.ascent for entry in found) > 4 * sum(entry.error**2 for entry in found) ** 0.5
    loop = probe.run_of("digits_tdm_r1", small(student), 0)
    before = load_file(student / "student.safetensors")
    objective = probe.learned(loop, 1, shuffle=True)
    assert all(torch.equal(tensor.detach(), before[name]) for name, tensor in objective.policy.policy.own_parameters().items())
    named = objective.policies()
    pairs = zip(named["surrogate"].parameters(), named["teacher"].parameters(), strict=True)
    assert any(not torch.equal(mine, other) for mine, other in pairs)


def test_shuffled_rewards_stay_in_their_groups(base):
    policy = base.fork()
    with torch.no_grad():
        forest = DeterministicSampler(1, samples=20).sample(policy, policy.encode([Prompt("a digit")] * 2), Progress(0, 1), Streams(0))
    rewards = torch.arange(40.0)
    batch = ScoredBatch(forest, rewards, {"r": rewards}, 2, Progress(0, 1), Streams(0))
    other = probe.shuffled(batch).rewards
    assert not torch.equal(other, rewards)
    assert [sorted(other[forest.group == group].tolist()) for group in range(2)] == [list(range(20)), list(range(20, 40))]


def test_the_probe_keeps_what_it_has_measured(student, tmp_path, monkeypatch, capsys):
    file = tmp_path / "probe.json"
    words = ["digits_tdm_r1", "--judge", "0", "--groups", "2", "--samples", "4", "--seeds", "2", "--json", str(file), "--set"]
    words = ["study", "probe", *words, *(change.lstrip("-") for change in small(student))]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert len(json.loads(file.read_text())) == 2
    assert "2 seeds" in first
    monkeypatch.setattr(probe, "probe", None)  # nothing is made twice
    assert main(words) == 0
    assert capsys.readouterr().out == first


def test_every_arm_is_what_its_name_says(student):
    kinds = {}
    for arm in few.ARMS:
        fixed = [*small(student), "--evaluation=null", "--hooks=[]"]
        kinds[arm] = few.config.parse("digits_tdm_r1", [*fixed, *few.ARMS[arm]]).build().objective
    assert isinstance(kinds["TDM and direct RL"], DirectReinforcement)
    assert isinstance(kinds["DGPO alone"], DGPO)
    plain, control = kinds["TDM-R1"], kinds["no reward term"]
    assert isinstance(plain, SurrogateReward)
    assert (plain.mix, control.mix) == (attrs.evolve(control.mix, reward=plain.mix.reward), attrs.evolve(plain.mix, reward=0.0))
    shared = kinds["shared noise, stages of a step"]
    assert (shared.reward_noise, shared.shared, shared.stages_by) == ("group", "group", "step")
    assert (plain.reward_noise, plain.shared, plain.stages_by) == ("sample", "sample", "prompt")


def test_the_study_shortened(student, tmp_path, monkeypatch, capsys):
    drawn = few.pictures

    def fewer(policy, steps, prompts, samples, seed):
        return drawn(policy, min(steps, 4), prompts, min(samples, 64), seed)

    monkeypatch.setattr(few, "pictures", fewer)
    file, arms = tmp_path / "study.json", ["TDM-R1", "no reward term", "TDM and direct RL"]
    size = ["--steps", "2", "--groups", "2", "--samples", "4", "--student", str(student.parent), "--json", str(file)]
    words = ["study", "few", "--seeds", "1", *size, "--set", "objective.plan.warmup=0", "--arms", *arms]
    assert main(words) == 0
    first = capsys.readouterr().out
    rows = {entry["arm"]: entry["row"] for entry in json.loads(file.read_text())["runs"]}
    assert list(rows) == [*few.BASES, few.STUDENT, *arms]
    distances = [rows[arm]["distance"] for arm in list(rows)[3:]]
    assert len(set(distances)) == len(distances)  # no arm is another one, nor the student
    assert "even above no reward term" in first.split("reported")[1]
    monkeypatch.setattr(few, "trained", None)  # nothing is done twice
    assert main(words) == 0
    assert capsys.readouterr().out in first


def test_a_missing_student_is_made(tmp_path):
    made = few.distilled(tmp_path / "run", steps=1)
    assert TDMPolicy.from_saved(DigitsPolicy.from_pretrained("digits", device="cpu"), str(made)).steps == 4
    stamp = (made / "student.json").stat().st_mtime_ns
    assert few.distilled(tmp_path / "run", steps=1) == made
    assert (made / "student.json").stat().st_mtime_ns == stamp
