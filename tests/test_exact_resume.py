"""A run that was stopped and resumed is the run that was not, bit for bit, whatever the objective carries from step to step."""

import os
import signal
from collections.abc import Mapping

import attrs
import pytest
import torch
from ring import ring_loop

from diffalign.core import (
    AlignmentLoop,
    Average,
    Cosine,
    FlowSDE,
    Hook,
    Interrupted,
    Loss,
    Objective,
    Phase,
    RewardError,
    RunningScale,
    TrajectorySampler,
)
from diffalign.objectives import DGPO, DiffusionNFT, FlowGRPO, SoftmaxTB, SurrogateReward, TrajectoryDistributionMatching
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.runs.checkpoints import Checkpoints, load, save
from diffalign.samplers import ChainSampler, DeterministicSampler, FixedPlan, TreeSampler
from diffalign.shapeworld.networks import pipeline
from diffalign.testing import TinyPolicy, channel_reward

TREE = TreeSampler(5, FixedPlan(splits=(1, 2)))
FEW = DeterministicSampler(4, samples=3)


@attrs.define(eq=False)
class Follower(Objective):
    """An extra policy that follows after each update, by a share that a counter of its own decides, and draws of torch's generator."""

    policy: TinyPolicy
    rows: int | None = None
    updates: int = 0

    def __attrs_post_init__(self):
        self.old = self.policy.fork()

    old: TinyPolicy = attrs.field(init=False)

    def phases(self):
        return (Phase({"policy": self.policy}, self._losses, 2),)

    def behavior(self):
        return self.old

    def policies(self) -> Mapping[str, TinyPolicy]:
        return {"policy": self.policy, "old": self.old}

    def after_update(self, role):
        self.updates += 1
        self.old.lerp_(self.policy, 1 / (1 + self.updates))

    def state(self):
        return {"updates": self.updates}

    def restore(self, state):
        self.updates = state["updates"]

    def _losses(self, batch, update):
        towards = torch.randn(())
        for parameter in self.policy.trainable_parameters().values():
            yield Loss(parameter.sub(towards).square().sum() + batch.rewards.sum() * parameter.sum())


def few_step(objective, **options):
    return lambda rows: (objective(TDMPolicy(TinyPolicy(), steps=4), rows=rows, **options), FEW)


BUILDERS = {
    "SoftmaxTB": lambda rows: (SoftmaxTB(TinyPolicy(), updates=2, rows=rows), attrs.evolve(TREE, rows=rows)),
    "FlowGRPO": lambda rows: (FlowGRPO(TinyPolicy(kernel=FlowSDE()), kl=0.1, rows=rows), ChainSampler(5, 4, rows=rows)),
    "DiffusionNFT": lambda rows: (DiffusionNFT(TinyPolicy(), kl=0.1, rows=rows), DeterministicSampler(5, 4, rows=rows)),
    "DGPO": lambda rows: (DGPO(TinyPolicy(), rows=rows), DeterministicSampler(5, 4, rows=rows)),
    "TDM": few_step(TrajectoryDistributionMatching),
    "TDM-R1": few_step(SurrogateReward, guidance=2.0),
    "Follower": lambda rows: (Follower(TinyPolicy(), rows), TREE),
}


class InterruptAfter(Hook):
    def __init__(self, steps):
        self.steps = steps

    def step(self, loop, report):
        if report.step + 1 == self.steps:
            os.kill(os.getpid(), signal.SIGTERM)


def build(name, folder, hooks=(), rows=None, reward=channel_reward):
    torch.manual_seed(0)
    objective, sampler = BUILDERS[name](rows)
    checkpoints = Checkpoints(folder, every=3)
    loop = AlignmentLoop(
        objective,
        sampler,
        reward,
        Prompts(["a", "b", "c"]),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)},
        lr_factor=Cosine(1.0, 0.1),
        average=Average(0.5),
        folder=folder,
        hooks=[*hooks, checkpoints],
    )
    return loop, checkpoints


def tensors(loop):
    return {f"{role}.{name}": p for role, policy in loop.policies().items() for name, p in policy.named_parameters()}


def whole_and_resumed(name, tmp_path, rows=None):
    whole, _ = build(name, tmp_path / "whole")
    whole.run(4)
    first, _ = build(name, tmp_path / "parts", [InterruptAfter(2)])
    with pytest.raises(Interrupted, match="SIGTERM"):
        first.run(4)
    second, checkpoints = build(name, tmp_path / "parts", rows=rows)
    torch.manual_seed(99)
    start = checkpoints.restore(second)
    assert start == 2
    second.run(4, start)
    return whole, second


@pytest.mark.parametrize("name", BUILDERS)
def test_a_resumed_run_is_the_whole_one(name, tmp_path):
    whole, resumed = whole_and_resumed(name, tmp_path)
    mine = tensors(resumed)
    for key, expected in tensors(whole).items():
        assert torch.equal(mine[key], expected), key
    for role, optimizer in whole.running.items():
        again = resumed.running[role].state_dict()["state"]
        for index, entries in optimizer.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(again[index][key])) for key, value in entries.items())
    assert resumed.reward == whole.reward


class FailsIn:
    """A reward that draws of torch's generator, and fails once, in the step of this number."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, images, prompts):
        noise = torch.rand(len(images))
        if self.calls == self.step:
            raise ConnectionError("503")
        self.calls += 1
        return channel_reward(images, prompts) + 0.01 * noise


@pytest.mark.parametrize("name", BUILDERS)
def test_a_run_whose_reward_failed_is_the_whole_one_when_it_goes_on(name, tmp_path):
    whole, _ = build(name, tmp_path / "whole", reward=FailsIn(None))
    whole.run(4)
    first, _ = build(name, tmp_path / "parts", reward=FailsIn(2))
    with pytest.raises(RewardError, match="images: 503"):
        first.run(4)
    resumed, checkpoints = build(name, tmp_path / "parts", reward=FailsIn(None))
    start = checkpoints.restore(resumed)
    assert start == 2, "no checkpoint was due: it was written because the reward failed"
    resumed.run(4, start)
    mine = tensors(resumed)
    assert all(torch.equal(mine[key], expected) for key, expected in tensors(whole).items())
    assert resumed.reward == whole.reward


@attrs.define
class Rotating(TrajectorySampler):
    """Draws less noise with every forest that it has drawn."""

    drawn: int = 0

    def sample(self, policy, condition, progress, streams):
        self.drawn += 1
        return ChainSampler(5, 4, eta=1 / self.drawn).sample(policy, condition, progress, streams)

    def state(self):
        return {"drawn": self.drawn}

    def restore(self, state):
        self.drawn = state["drawn"]


def test_what_a_sampler_drew_in_the_failed_step_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILDERS, "Rotating", lambda rows: (SoftmaxTB(TinyPolicy()), Rotating()))
    test_a_run_whose_reward_failed_is_the_whole_one_when_it_goes_on("Rotating", tmp_path)


def test_a_step_that_is_done_again_after_a_restore_is_observed_again(tmp_path):
    loop = ring_loop()
    loop.aggregation = RunningScale()
    loop.advance(2)
    save(loop, tmp_path / "step-000002", 2, "")
    loop.advance(3, 2)
    observed = loop.aggregation.state()
    expected = {key: parameter.detach().clone() for key, parameter in tensors(loop).items()}
    loop.advance(3, load(loop, tmp_path / "step-000002"))
    assert loop.aggregation.state() == observed
    assert all(torch.equal(parameter, expected[key]) for key, parameter in tensors(loop).items())


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "Follower"])
def test_another_row_budget_is_the_same_run(name, tmp_path):
    whole, resumed = whole_and_resumed(name, tmp_path, rows=3)
    mine = tensors(resumed)
    for key, expected in tensors(whole).items():
        torch.testing.assert_close(mine[key], expected, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_for_a_tiny_stable_diffusion_3(dtype, tmp_path):
    """Above a base in bfloat16, adapters have masters in float32 and multiply in bfloat16."""
    model = pipeline(layers=1, heads=1)
    model.set_progress_bar_config(disable=True)
    model.save_pretrained(tmp_path / "model")

    def loop(folder, hooks=()):
        torch.manual_seed(0)
        policy = FlowMatchingPolicy.from_pretrained(
            str(tmp_path / "model"), lora=LoRA(rank=2), max_sequence_length=16, device="cpu", dtype=dtype
        )
        layers = [module for module in policy.network.modules() if hasattr(module, "lora_variant")]
        assert layers
        assert all(bool(layer.lora_variant) == (dtype == "bfloat16") for layer in layers)
        tree = TreeSampler(4, FixedPlan(splits=(1,)))
        hooks = [*hooks, Checkpoints(folder, every=3)]
        return AlignmentLoop(SoftmaxTB(policy), tree, channel_reward, Prompts(["a red circle", "two"]), prompts_per_step=2, hooks=hooks)

    whole = loop(tmp_path / "whole")
    whole.run(4)
    with pytest.raises(Interrupted):
        loop(tmp_path / "parts", [InterruptAfter(2)]).run(4)
    resumed = loop(tmp_path / "parts")
    resumed.run(4, resumed.hooks[-1].restore(resumed))
    mine = tensors(resumed)
    moved = 0
    for key, expected in tensors(whole).items():
        assert torch.equal(mine[key], expected), key
        moved += "lora_B" in key and key.startswith("policy.") and bool((expected != 0).any())
    assert moved
    assert {parameter.dtype for parameter in resumed.objective.policy.trainable_parameters().values()} == {torch.float32}
