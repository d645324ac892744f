"""The examples of a policy and of an objective with a second network: contracts, run files, resume, and a step that fails half-way."""

import json
import sys
from pathlib import Path

import pytest
import torch

from diffalign import AlignmentLoop, config
from diffalign.cli import main
from diffalign.core import ConfigError, NonFiniteError
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward, check_objective, check_policy

PARTS = Path(__file__).parents[2] / "examples" / "parts"
RUN = """
policy: {class_path: halves.HalvesPolicy.from_pretrained, init_args: {path: weights}}
objective: SoftmaxTB
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {splits: [1], branches: 2}}}
rewards: to_the_right.to_the_right
prompts: {class_path: Prompts, init_args: {prompts: [left, right]}}
prompts_per_step: 2
total: 2
"""
REWARD = """
def to_the_right(images, prompts):
    return images[..., 8:].mean(dim=(1, 2, 3)) - images[..., :8].mean(dim=(1, 2, 3))
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PARTS))
    monkeypatch.chdir(tmp_path)


def test_the_policy_keeps_its_contract():
    from halves import HalvesPolicy

    findings = check_policy(HalvesPolicy())
    assert not [finding for finding in findings if finding.skipped]
    with pytest.raises(ValueError, match="HalvesPolicy reads left and right; got 'up'"):
        AlignmentLoop(SoftmaxTB(HalvesPolicy()), TreeSampler(4, FixedPlan((1,))), channel_reward, Prompts(["left", "up"]))


def test_the_policy_is_named_in_a_run_file_and_exported(tmp_path, capsys, monkeypatch):
    from halves import HalvesPolicy

    torch.manual_seed(0)
    HalvesPolicy().save("weights")
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "to_the_right.py").write_text(REWARD)
    monkeypatch.delitem(sys.modules, "to_the_right", raising=False)
    with pytest.raises(ConfigError, match="HalvesPolicy reads left and right; got 'up'"):
        config.parse("run.yaml", ["--prompts.prompts", "[left, up]"]).build()
    assert main(["train", "run.yaml", "--folder", "out"]) == 0
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2
    assert main(["export", "out", "--format", "merged", "--out", "moved"]) == 0
    capsys.readouterr()
    before, after = (HalvesPolicy.from_pretrained(folder).network.state_dict() for folder in ("weights", "moved"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def guided(folder=None, total=4, **options):
    from critic import CriticGuided

    adamw = {role: lambda parameters, lr=lr: torch.optim.AdamW(parameters, lr=lr) for role, lr in (("critic", 1e-2), ("policy", 1e-3))}
    loop = AlignmentLoop(
        CriticGuided(TinyPolicy((3,))),
        DeterministicSampler(4, 3),
        channel_reward,
        Prompts(["a", "b"]),
        optimizers=adamw,
        prompts_per_step=2,
    )
    if folder is not None:
        loop.run(total, folder=folder, **options)
    return loop


def weights(loop):
    return {f"{role}.{name}": p.detach().clone() for role, policy in loop.policies().items() for name, p in policy.named_parameters()}


def test_the_objective_with_a_critic_keeps_its_contract():
    from critic import CriticGuided

    findings = check_objective(CriticGuided)
    assert not [finding for finding in findings if finding.skipped]


def test_the_critic_has_its_optimizer_its_metrics_and_its_checkpoint(tmp_path):
    whole = guided("whole")
    guided("parts", total=2)
    resumed = guided("parts", resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert torch.equal(whole.objective.held.network[1].weight, whole.objective.critic.network[1].weight)
    names = {file.name for file in (tmp_path / "parts/step-000004").iterdir()}
    assert {"critic.safetensors", "critic.optimizer.pt", "held.safetensors", "policy.safetensors"} <= names
    assert "held.optimizer.pt" not in names
    steps = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["critic/error"] < steps[0]["critic/error"]
    assert "rows/critic/update" not in steps[0]


def test_a_policy_update_that_fails_takes_the_critic_back(monkeypatch):
    from critic import CriticGuided

    seen = []

    def failing(self, batch, update):
        seen.append(self.critic.network[1].weight.detach().clone())
        raise RuntimeError("not today")

    monkeypatch.setattr(CriticGuided, "losses", failing)
    loop = guided()
    before = weights(loop)
    with pytest.raises(RuntimeError, match="not today"):
        loop.advance(1)
    assert not torch.equal(seen[0], before["critic.network.1.weight"])  # it had moved
    for name, tensor in weights(loop).items():
        assert torch.equal(tensor, before[name]), name


def test_a_critic_that_is_not_finite_is_named():
    loop = guided()
    with torch.no_grad():
        loop.objective.critic.network[3].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"role 'critic', step 0: loss is nan\. The velocity of 'critic' is not finite at level 0"):
        loop.advance(1)
