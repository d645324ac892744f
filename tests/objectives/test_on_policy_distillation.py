"""On-policy distillation: each prompt has its own teacher, the states are the student's, and the teachers' union is its fixed point."""

import attrs
import pytest
import torch
from tiny import PROMPTS, TREE, assert_same, batch_of, gradient, pair

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Progress, Streams
from diffalign.digits import DigitReward, DigitsPolicy
from diffalign.objectives import OnPolicyDistillation
from diffalign.prompts import Mixture, PromptFile, Prompts, Source
from diffalign.runs.checkpoints import save
from diffalign.samplers import Branching, ChainSampler, DeterministicSampler, FixedPlan, Midpoint, TreeSampler
from diffalign.testing import ConstantReward, TinyPolicy, check_objective

STEPS = Branching((1,) * 4, (0.0,) * 4, roots=3)


def with_prompts(batch, prompts):
    """The same batch, whose prompts say more."""
    condition = attrs.evolve(batch.trajectories.condition, prompts=tuple(prompts))
    return attrs.evolve(batch, trajectories=attrs.evolve(batch.trajectories, condition=condition))


def teachers_of(policy):
    one, other = policy.fork(), policy.fork()
    with torch.no_grad():
        for teacher, by in ((one, 0.2), (other, -0.3)):
            for name, parameter in teacher.named_parameters():
                if name.startswith("network.lora_"):
                    parameter.add_(by)
    return {"left": one, "right": other}


def sourced(names, key=None):
    return [Prompt(text, {} if key is None else {key: name}, None if key else name) for text, name in zip(PROMPTS, names, strict=True)]


@pytest.mark.parametrize("by", [None, "task"])
@pytest.mark.parametrize("branching", [STEPS, TREE], ids=["ends", "tree"])
def test_each_prompt_is_taught_by_its_teacher_on_the_students_states(by, branching):
    policy, _ = pair()
    teachers = teachers_of(policy)
    batch = with_prompts(batch_of(policy, branching, keep_all=True), sourced(["right", "left"], by))
    forest, expected = batch.trajectories, 0.0
    for leaf, path in enumerate(forest.paths.tolist()):
        prompt = int(forest.group[leaf])
        teacher = teachers["right" if prompt == 0 else "left"]
        for node in path[:-1]:
            here = slice(node, node + 1)
            state = (forest.latents[here], forest.sigmas[forest.level[here]], forest.condition.select(torch.tensor([prompt])))
            expected = expected + (policy.velocity(*state) - teacher.velocity(*state).detach()).square().mean() / len(forest.leaves)
    exact = torch.autograd.grad(expected, list(policy.trainable_parameters().values()))
    objective = OnPolicyDistillation(policy, teachers, by)
    assert_same(gradient(objective, batch), torch.cat([part.flatten() for part in exact]))
    assert_same(gradient(attrs.evolve(objective, rows=5), batch), gradient(objective, batch))


def test_the_union_of_its_teachers_is_the_fixed_point():
    policy, _ = pair()
    same = {name: policy.fork() for name in ("left", "right")}
    batch = with_prompts(batch_of(policy, STEPS, keep_all=True), sourced(["left", "right"]))
    assert float(gradient(OnPolicyDistillation(policy, same), batch).norm()) < 1e-12


def test_a_mixture_teaches_two_tasks_to_one_student():
    student = TinyPolicy((2, 2), dtype=torch.float64)
    teachers = teachers_of(student)
    sources = {name: Source(Prompts([f"{name} {i}" for i in range(4)])) for name in teachers}
    loop = AlignmentLoop(
        OnPolicyDistillation(student, teachers),
        DeterministicSampler(4, samples=2),
        ConstantReward(),
        Mixture(sources),
        prompts_per_step=4,
        optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=0.02)},
    )
    found = []
    for step in range(30):
        found.append(loop.step(loop.prompts.draw(step, 4), Progress(step, 30)).metrics)
    for name in teachers:  # opposite updates of one low-rank network, told apart by the prompt alone, so they cannot both be met
        assert found[0][f"distance/{name}"] > 0.01
    assert found[-1]["distance"] < 0.7 * found[0]["distance"]


def test_three_teachers_of_handwriting_become_one_student_on_a_mixture(tmp_path):
    """Each teacher reads prompts in its own way, and the student learns to read each kind as its teacher does.

    A student that reads all kinds alike, as the mean of its teachers, would keep two thirds of each distance.
    """
    student = DigitsPolicy.from_pretrained("digits", device="cpu").requires_grad_(False)
    student.network.prompt.requires_grad_(True)
    teachers = {}
    for seed, name in enumerate(("any", "set", "name")):
        teachers[name] = DigitsPolicy.from_pretrained("digits", device="cpu", trainable=False)
        reading = teachers[name].network.prompt[2].bias
        reading.add_(0.3 * torch.randn(len(reading), generator=torch.Generator().manual_seed(seed)))
    loop = AlignmentLoop(
        OnPolicyDistillation(student, teachers),
        DeterministicSampler(3, samples=1),
        {"asked": DigitReward()},
        Mixture({name: Source(PromptFile(f"digits/{name}")) for name in teachers}),
        prompts_per_step=9,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)},
    )
    reports = []
    for step in range(41):
        reports.append(loop.step(loop.prompts.draw(step, 9), Progress(step, 41)))
    for name in teachers:
        assert 0 < reports[-1].metrics[f"distance/{name}"] < 0.55 * reports[0].metrics[f"distance/{name}"]
        assert reports[0].ledger.rows[f"teacher_{name}/update"] == 3 * 3
    assert reports[0].ledger.rows["policy/update"] == 9 * 3
    save(loop, tmp_path / "step-000041", 41, "")
    assert {f"{role}.safetensors" for role in loop.policies()} <= {file.name for file in (tmp_path / "step-000041").iterdir()}


def test_what_cannot_be_taught_is_refused():
    policy, _ = pair()
    teachers = teachers_of(policy)
    with pytest.raises(ValueError, match="must name at least one teacher"):
        OnPolicyDistillation(policy, {})
    for name in ("", "two words", "a/b"):
        with pytest.raises(ValueError, match="a name must hold no blanks and no '/'"):
            OnPolicyDistillation(policy, {name: policy.fork()})
    with pytest.raises(ValueError, match=r"teachers\['a'\] must be frozen"):
        OnPolicyDistillation(policy, {"a": policy.fork(trainable=True)})
    objective = OnPolicyDistillation(policy, teachers)
    with pytest.raises(ValueError, match="the source of prompt 'two blue stars' must name a teacher, left, right; got 'up'"):
        gradient(objective, with_prompts(batch_of(policy, STEPS, keep_all=True), sourced(["left", "up"])))
    ends = DeterministicSampler(4, samples=2, solver=Midpoint())
    condition = policy.encode(sourced(["left", "right"]))
    with torch.no_grad():
        forest = ends.sample(policy, condition, Progress(0, 1), Streams(1))
    batch = attrs.evolve(batch_of(policy, STEPS), trajectories=forest, rewards=torch.zeros(4), parts={})
    with pytest.raises(ValueError, match="stores finished samples alone"):
        gradient(objective, batch)


@pytest.mark.parametrize(
    ("sampler", "stored"),
    [
        (DeterministicSampler(8, 2), 9),
        (ChainSampler(8, 2), 9),
        (ChainSampler(8, 2, window=(1, 3)), 5),
        (TreeSampler(8, FixedPlan((1, 3, 5), 2, 0.7)), 8),
        (TreeSampler(7, FixedPlan((1, 3, 5), 2, 0.7)), 8),
        (TreeSampler(8, FixedPlan((1, 2, 3), 2, 0.7)), 6),
    ],
    ids=str,
)
def test_every_step_is_taught_or_the_forest_is_refused(sampler, stored):
    """A forest stores roots, ends of stochastic edges and leaves, so a run of steps without noise is one edge whose states are gone."""
    policy, _ = pair()
    objective = OnPolicyDistillation(policy, {"one": policy.fork()})
    with torch.no_grad():
        forest = sampler.sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(1))
    scores = torch.zeros(len(forest.leaves))
    batch = attrs.evolve(batch_of(policy, STEPS), trajectories=forest, rewards=scores, parts={})
    steps, taught, velocity = len(forest.sigmas) - 1, set(), policy.velocity

    def heard(latents, sigma, condition):
        taught.update(sigma.tolist())
        return velocity(latents, sigma, condition)

    policy.velocity = heard
    if stored > steps:
        gradient(objective, batch)
        assert taught == set(forest.sigmas[:-1].tolist())
        return
    with pytest.raises(ValueError, match=rf"needs every level of a trajectory, .* stores {stored} of {steps + 1} levels of a path\. Take"):
        gradient(objective, batch)
    assert not taught


def test_it_keeps_the_contract_of_objectives():
    def make(policy):
        teacher = policy.fork()
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.05)
        return OnPolicyDistillation(policy, {"one": teacher})

    check_objective(make, {"learns": "it follows its teacher; rewards only watch"})
