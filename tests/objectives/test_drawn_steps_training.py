"""Few-step training with a number of steps that changes from step to step."""

import pytest
import torch
from few_step_cases import PROMPTS, flat, gradients, moved

from diffalign import AlignmentLoop
from diffalign.core import Hook, Progress, ScoredBatch, Streams, score
from diffalign.objectives import SurrogateReward, TrajectoryDistributionMatching
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.runs.checkpoints import Checkpoints
from diffalign.samplers import DrawnSteps
from diffalign.testing import TinyPolicy, channel_reward

OBJECTIVES = {
    "distillation": lambda policy: TrajectoryDistributionMatching(policy, guidance=2.0, fake_regularization=0.1),
    "TDM-R1": lambda policy: SurrogateReward(policy, guidance=2.0),
}


def student(**options):
    options = {"also": [1, 2], "tag": " in {steps} steps", **options}
    return moved(TDMPolicy(TinyPolicy((2, 2), dtype=torch.float64), steps=4, **options), 0.1)


def batch_of(policy, steps):
    streams = Streams(1, 2)
    with torch.no_grad():
        forest = DrawnSteps([steps], samples=4).sample(policy, policy.encode(PROMPTS), Progress(2, 10), streams)
    parts = score({"r": channel_reward}, policy.decode(forest.samples), [PROMPTS[i] for i in forest.group.tolist()])
    return ScoredBatch(forest, parts["r"], parts, len(PROMPTS), Progress(2, 10), streams)


def listen(policy, heard):
    """Note the prompt embeddings that the network is asked with."""
    velocity = policy.velocity

    def heeding(latents, sigma, condition):
        heard.append(condition.tensors["embedding"])
        return velocity(latents, sigma, condition)

    policy.velocity = heeding


def known(rows, table):
    """Whether every row is one of the table's."""
    return all(bool((row == table).all(dim=1).any()) for heard in rows for row in heard)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_fake_is_told_the_number_and_teacher_and_surrogate_are_not(name, steps):
    policy = student()
    objective = OBJECTIVES[name](policy)
    roles = {role: other for role, other in objective.policies().items() if role != "generator"}
    heard = {role: [] for role in roles}
    for role, other in roles.items():
        listen(other, heard[role])
    named = gradients(objective, batch_of(policy, steps))
    told = policy.at(steps).encode(PROMPTS).tensors["embedding"]
    plain = policy.policy.encode([*PROMPTS, ""]).tensors["embedding"]  # with the negative prompt
    assert heard["fake"]
    assert heard["teacher"]
    for role, rows in heard.items():
        assert known(rows, told if role == "fake" else plain), role
    for role, tensors in named.items():
        assert float(flat(tensors).norm()) > 1e-9, role
        assert flat(tensors).isfinite().all(), role


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_fake_of_a_student_of_one_number_reads_as_the_teacher_does(name):
    policy = student(also=())
    objective = OBJECTIVES[name](policy)
    heard = []
    listen(objective.policies()["fake"], heard)
    gradients(objective, batch_of(policy, 4))
    assert known(heard, policy.policy.encode(PROMPTS).tensors["embedding"])


class Seen(Hook):
    """Numbers of steps and gradient norms, step by step."""

    def __init__(self):
        self.steps, self.norms = [], []

    def step(self, loop, report):
        self.steps.append(len(report.batch.trajectories.sigmas) - 1)
        self.norms.append({name: value for name, value in report.metrics.items() if name.startswith("grad_norm/")})


def built(name, folder, *hooks):
    return AlignmentLoop(
        OBJECTIVES[name](student()),
        DrawnSteps([1, 2, 4], samples=3),
        channel_reward,
        Prompts(PROMPTS),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)},
        folder=folder,
        hooks=hooks,
        seed=1,
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_trains_under_every_number_and_goes_on_as_it_was(name, tmp_path):
    seen, again = Seen(), Seen()
    whole = built(name, tmp_path / "whole", seen)
    whole.run(8)
    assert set(seen.steps) == {1, 2, 4}
    for norms in seen.norms[1:]:
        assert all(0 < value < float("inf") for value in norms.values()), norms
    checkpoints = Checkpoints(tmp_path / "parts", every=4)
    built(name, tmp_path / "parts", checkpoints).run(4)
    resumed_checkpoints = Checkpoints(tmp_path / "parts", every=4)
    resumed = built(name, tmp_path / "parts", again, resumed_checkpoints)
    resumed.run(8, resumed_checkpoints.restore(resumed))
    assert again.steps == seen.steps[4:]
    mine, its = (flat(dict(loop.objective.policy.named_parameters())) for loop in (resumed, whole))
    assert torch.equal(mine, its)
