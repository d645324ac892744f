import json
import os
import signal

import pytest
import torch
from ring import ring_loop

from diffalign.checkpoint import Checkpoints, complete_checkpoints, read_manifest
from diffalign.core import Average, CheckpointError, Hook


def weights(loop):
    return [parameter.detach().clone() for parameter in loop.objective.policy.parameters()]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = ring_loop(average=Average(0.5))
    whole.run(6)
    first = ring_loop(tmp_path, [Checkpoints(tmp_path, every=3)], average=Average(0.5))
    first.run(3)
    second = ring_loop(tmp_path, [Checkpoints(tmp_path, every=3)], average=Average(0.5))
    start = second.hooks[0].restore(second)
    assert start == 3
    assert second.reward == first.reward
    second.run(6, start)
    for mine, other in zip(weights(second), weights(whole), strict=True):
        assert torch.equal(mine, other)
    averages = (loop.average.policy.parameters() for loop in (second, whole))
    assert all(torch.equal(mine, other) for mine, other in zip(*averages, strict=True))


def test_reference_is_the_one_of_the_first_start(tmp_path):
    first = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    reference = [parameter.clone() for parameter in first.objective.reference.parameters()]
    first.run(2)
    second = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    with torch.no_grad():
        second.objective.reference.means.add_(1.0)
    second.hooks[0].restore(second)
    assert all(torch.equal(mine, other) for mine, other in zip(second.objective.reference.parameters(), reference, strict=True))


def test_the_last_few_are_kept(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=1, keep=2)]).run(5)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000004", "step-000005"]


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, capsys):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(4)
    file = tmp_path / "step-000004" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="must have the content that its manifest names"):
        read_manifest(tmp_path / "step-000004")
    again = ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)])
    assert again.hooks[0].restore(again) == 2
    assert "skipping a damaged checkpoint" in capsys.readouterr().out


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=2)]).run(2)
    (tmp_path / "step-000002").rename(tmp_path / "step-000003.tmp")
    with pytest.raises(CheckpointError, match="there is none"):
        Checkpoints(tmp_path).restore(ring_loop())


def test_tensors_of_another_policy_are_refused(tmp_path):
    ring_loop(tmp_path, [Checkpoints(tmp_path, every=1)], average=Average()).run(1)
    manifest = json.loads((tmp_path / "step-000001" / "manifest.json").read_text())
    assert {"policy.safetensors", "reference.safetensors", "average.safetensors", "policy.optimizer.pt"} == set(manifest["files"])
    other = ring_loop()
    other.objective.policy.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match="1 names differ \\(first: 'extra'\\)"):
        Checkpoints(tmp_path).restore(other)


class InterruptAt(Hook):
    def __init__(self, step):
        self.at = step

    def step(self, loop, report):
        if report.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_writes_a_checkpoint(tmp_path):
    loop = ring_loop(tmp_path, [InterruptAt(1), Checkpoints(tmp_path, every=100)])
    with pytest.raises(KeyboardInterrupt):
        loop.run(10)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002"]


def test_an_error_writes_none(tmp_path):
    loop = ring_loop(tmp_path, [Checkpoints(tmp_path, every=100)])
    with torch.no_grad():
        loop.objective.policy.means.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="rollout: latents or log-prob are not finite at level"):
        loop.run(2)
    assert complete_checkpoints(tmp_path) == []
