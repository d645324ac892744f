"""The few-step student: its grid, its step, its forks, and what it stores of its base."""

import json

import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, CheckpointError, Euler, Guided, Progress, ShiftedGrid, Streams
from diffalign.core.average import Average
from diffalign.objectives import TrajectoryDistributionMatching
from diffalign.policies import GaussianMixturePolicy, LoRA, StudentFiles, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, DeterministicSampler
from diffalign.testing import ConstantReward, TinyPolicy

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars")]


def student(**options):
    return TDMPolicy(TinyPolicy((2, 2)), **options)


def rolled(policy, samples=3, steps=4):
    with torch.no_grad():
        return DeterministicSampler(steps, samples=samples).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(5))


@pytest.mark.parametrize("steps", range(1, 9))
def test_one_to_eight_steps_on_its_own_grid(steps):
    policy = student(steps=steps, grid=ShiftedGrid(3.0))
    assert policy.sigmas(steps).tolist() == pytest.approx(ShiftedGrid(3.0)(steps).tolist())
    assert rolled(policy, steps=steps).samples.shape == (6, 2, 2)


@pytest.mark.parametrize("steps", [0, 9])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"TDMPolicy.steps must lie between 1 and 8; got {steps}"):
        student(steps=steps)


def test_by_default_the_grid_is_that_of_the_policy():
    assert torch.equal(student(steps=3).sigmas(3), TinyPolicy((2, 2)).sigmas(3))
    assert student(steps=2, grid=[0.9, 0.5, 0.0]).sigmas(2).tolist() == pytest.approx([0.9, 0.5, 0.0])


@pytest.mark.parametrize("grid", [[1.0, 0.5, 0.0], [1.0, 0.5, 0.6, 0.2, 0.0], [1.0, 0.7, 0.5, 0.2, 0.1], [1.2, 0.7, 0.5, 0.2, 0.0]])
def test_a_grid_that_does_not_fit_is_refused(grid):
    with pytest.raises(ValueError, match=r"TDMPolicy.grid must give 5 sigmas from at most 1 decreasing to 0; got \["):
        student(grid=grid)


def test_a_sampler_with_other_steps_is_refused():
    with pytest.raises(ValueError, match=r"this student has 4 steps on its own grid .*a sampler with 8 steps cannot use it"):
        rolled(student(), steps=8)


def test_noise_is_refused_unless_a_kernel_is_given_for_it():
    policy = student()
    sampler = ChainSampler(steps=4, samples=2, eta=0.7)
    with torch.no_grad():
        with pytest.raises(ValueError, match="Euler has no noise"):
            sampler.sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(5))
        noisy = student(kernel=CPS())
        assert len(sampler.sample(noisy, noisy.encode(PROMPTS), Progress(0, 1), Streams(5)).stochastic)


def test_a_stage_gives_the_next_state_bit_for_bit_and_the_clean_prediction():
    policy = student(grid=ShiftedGrid(3.0))
    forest = rolled(policy)
    condition = forest.condition.select(forest.group)
    for level in range(4):
        here, following = forest.latents[forest.paths[:, level]], forest.latents[forest.paths[:, level + 1]]
        got, clean = policy.stage(here, level, condition)
        assert torch.equal(got, following)
        sigma = policy.sigmas(4)[level].expand(len(here))
        torch.testing.assert_close(clean, policy.predict_clean(here, sigma, condition), rtol=1e-5, atol=1e-5)
        one, _ = policy.stage(here[:1], level, condition.select(torch.tensor([0])))
        torch.testing.assert_close(one, following[:1], rtol=1e-5, atol=1e-5)  # another batch shape
    torch.testing.assert_close(policy.stage(here, 3, condition)[1], following, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_next_state_are_those_of_the_clean_prediction_scaled():
    policy = TDMPolicy(TinyPolicy((2, 2), dtype=torch.float64), grid=[0.9, 0.6, 0.3, 0.1, 0.0])
    forest = rolled(policy)
    following, clean = policy.stage(forest.latents[:6], 1, forest.condition.select(forest.group))
    weights = list(policy.trainable_parameters().values())
    pull = torch.randn_like(clean)
    slow = torch.autograd.grad((following * pull).sum(), weights, retain_graph=True)
    fast = torch.autograd.grad((clean * pull).sum(), weights)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, (1 - 0.3 / 0.6) * b)


def test_forks_keep_the_grid_and_a_pristine_one_forgets_delta_and_tag():
    policy = student(steps=3, grid=[1.0, 0.8, 0.4, 0.0], tag=" in {steps} steps")
    twin, base = policy.fork(trainable=True), policy.fork(pristine=True)
    assert torch.equal(twin.sigmas(3), policy.sigmas(3))
    assert torch.equal(twin.policy.network.lora_B.weight, policy.policy.network.lora_B.weight)
    assert not base.policy.network.lora_B.weight.any()
    assert base.policy.network.body is policy.policy.network.body
    assert twin.base_digest() == policy.base_digest() == base.base_digest()
    assert twin.tag == policy.tag
    assert not base.tag
    assert len(twin.trainable_parameters()) == 2
    assert not base.trainable_parameters()


def test_the_tag_makes_the_number_of_steps_a_condition():
    policy = student(tag=" in {steps} steps")
    condition = policy.encode(PROMPTS)
    assert condition.prompts == tuple(PROMPTS)
    expected = policy.policy.encode([Prompt("a red cube in 4 steps"), Prompt("two blue stars in 4 steps")])
    assert torch.equal(condition.tensors["embedding"], expected.tensors["embedding"])
    assert torch.equal(student().encode(PROMPTS).tensors["embedding"], policy.policy.encode(PROMPTS).tensors["embedding"])


def test_guidance_and_rows_are_those_of_the_policy_inside():
    policy = student()
    guided = Guided(policy, 3.0)
    rolled(guided)
    assert policy.policy.counter.rows == policy.counter.rows == 2 * 4 * 6


def moved(policy):
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.5
    return policy


def test_a_saved_student_comes_back_with_grid_steps_and_weights(tmp_path):
    policy = moved(student(steps=3, grid=[1.0, 0.8, 0.4, 0.0], tag=" in {steps} steps"))
    policy.save(str(tmp_path))
    about = json.loads((tmp_path / "student.json").read_text())
    assert about["steps"] == 3
    assert about["base"] == policy.base_digest()
    again = TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path), steps=3)
    assert torch.equal(again.sigmas(3), policy.sigmas(3))
    assert again.tag == policy.tag
    assert torch.equal(rolled(again, steps=3).samples, rolled(policy, steps=3).samples)
    noisy = TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path), kernel=CPS())
    assert (noisy.kernel, again.kernel) == (CPS(), Euler())


def test_a_student_of_another_number_of_steps_or_another_base_is_refused(tmp_path):
    student().save(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"the student must have steps = 8, as asked; it was made with 4"):
        TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path), steps=8)
    other = TinyPolicy((2, 2), seed=1)
    digests = rf"made from the base {student().base_digest()[:12]}; this policy's base is {TDMPolicy(other).base_digest()[:12]}"
    with pytest.raises(CheckpointError, match=digests):
        TDMPolicy.from_saved(other, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"must hold a student"):
        TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path / "nowhere"))


def test_tensors_of_another_shape_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    student().save(str(tmp_path))
    file = tmp_path / "student.safetensors"
    tensors = load_file(file)
    tensors["network.lora_B.weight"] = torch.zeros(4, 7)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"first: 'network.lora_B.weight' has shape \(4, 7\), the policy's \(4, 2\)"):
        TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path))


def test_adapters_of_another_scale_are_refused_although_their_tensors_fit(load, tmp_path):
    policy = moved(TDMPolicy(load("sd3", lora=LoRA(rank=2, alpha=4)), steps=2))
    policy.save(str(tmp_path))
    again = TDMPolicy.from_saved(load("sd3", lora=LoRA(rank=2, alpha=4)), str(tmp_path))
    assert torch.equal(rolled(again, steps=2).samples, rolled(policy, steps=2).samples)
    other = load("sd3", lora=LoRA(rank=2))
    before = {name: tensor.clone() for name, tensor in other.own_parameters().items()}
    with pytest.raises(CheckpointError, match=r"alpha / rank = 2; those of the policy are by 16. .* LoRA.rank 2 and LoRA.alpha 4\."):
        TDMPolicy.from_saved(other, str(tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in other.own_parameters().items())
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()  # then nothing says it
    TDMPolicy.from_saved(other, str(tmp_path))


def test_the_base_of_a_policy_that_trains_everything_is_the_one_it_started_from():
    policy = TDMPolicy(GaussianMixturePolicy([[0.0, 1.0]], 0.5))
    before = policy.base_digest()
    moved(policy)
    assert policy.base_digest() == policy.fork().base_digest() == before
    assert TDMPolicy(policy.policy).base_digest() != before


def test_a_run_ends_with_the_files_of_its_averaged_student(tmp_path):
    policy = student()
    loop = AlignmentLoop(
        TrajectoryDistributionMatching(policy, fake=moved(policy.fork(pristine=True, trainable=True))),
        DeterministicSampler(4, samples=2),
        ConstantReward(),
        Prompts(PROMPTS),
        prompts_per_step=2,
        average=Average(0.5),
        hooks=[StudentFiles()],
        folder=tmp_path,
    )
    loop.run(2)
    saved = TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path / "student"))
    assert torch.equal(rolled(saved).samples, rolled(loop.evaluation_policy()).samples)
    assert not torch.equal(rolled(saved).samples, rolled(policy).samples)


def test_what_is_written_at_the_end_is_tried_before_the_first_step(tmp_path, monkeypatch):
    policy = student()
    options = {"hooks": [StudentFiles()], "folder": tmp_path, "prompts_per_step": 2}
    loop = AlignmentLoop(
        TrajectoryDistributionMatching(policy), DeterministicSampler(4, samples=2), ConstantReward(), Prompts(PROMPTS), **options
    )
    before = {name: tensor.clone() for name, tensor in policy.own_parameters().items()}

    def full(self, *_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TDMPolicy, "write", full)
        with pytest.raises(OSError, match="no space left"):
            loop.run(2)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.own_parameters().items())
    loop.run(1)
    assert sorted(file.name for file in tmp_path.glob("student*")) == ["student"]


def test_a_run_without_a_student_has_no_student_files():
    policy = TinyPolicy((2, 2))
    objective = TrajectoryDistributionMatching(policy)
    loop = AlignmentLoop(objective, DeterministicSampler(4, samples=1), ConstantReward(), Prompts(PROMPTS), hooks=[StudentFiles()])
    with pytest.raises(ValueError, match="StudentFiles needs a run whose policy is a TDMPolicy; got a TinyPolicy"):
        loop.run(1)
