"""What is kept of a run in which a step fails, whatever fails in it."""

import attrs
import pytest
import torch
from ring import ring_loop

from diffalign.cli import main
from diffalign.core import ContractError, Hook, Loss, NonFiniteError, SingleProcess
from diffalign.runs.checkpoints import Checkpoints, complete_checkpoints

DONE = 3
"""Steps done when something breaks."""


@attrs.define(eq=False)
class BreakAfter(Hook):
    """Breaks a part of the loop after a step, so that the next step fails there."""

    break_: object

    def step(self, loop, report):
        if report.step + 1 == DONE:
            self.break_(loop)


class NoPrompts:
    def draw(self, step, count):
        raise KeyError("no such prompt")


class NoSampler:
    def sample(self, *told):
        raise IndexError("a fault of one's own")


def infinite_loss(loop):
    (phase,) = loop._update.phases

    def losses(batch, update):
        for loss in phase.losses(batch, update):
            yield Loss(loss.value * float("inf"))

    loop._update.phases = (attrs.evolve(phase, losses=losses),)


BROKEN = {
    "prompts": (lambda loop: setattr(loop, "prompts", NoPrompts()), KeyError),
    "sampler": (lambda loop: setattr(loop, "sampler", NoSampler()), IndexError),
    "loss": (infinite_loss, NonFiniteError),
}


def kept(folder):
    return [path.name for path in complete_checkpoints(folder)]


@pytest.mark.parametrize("part", BROKEN)
def test_the_last_finished_step_is_kept_and_goes_on_as_if_nothing_had_been(part, tmp_path):
    break_, error = BROKEN[part]
    with pytest.raises(error):
        ring_loop(tmp_path, [BreakAfter(break_), Checkpoints(tmp_path, every=100)]).run(5)
    assert kept(tmp_path) == ["step-000003"]
    whole, resumed = ring_loop(), ring_loop()
    whole.run(5)
    resumed.run(5, start=Checkpoints(tmp_path).restore(resumed))
    pairs = zip(resumed.objective.policy.parameters(), whole.objective.policy.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_what_fails_while_weights_move_is_not_kept(tmp_path):
    class Half(torch.optim.SGD):
        taken = 0

        def step(self, closure=None):
            super().step(closure)
            Half.taken += 1
            if Half.taken > DONE:
                raise RuntimeError("half-way")

    loop = ring_loop(tmp_path, [Checkpoints(tmp_path, every=100)])
    loop.running["policy"] = Half(loop.objective.policy.trainable_parameters().values(), lr=0.1)
    with pytest.raises(RuntimeError, match="half-way"):
        loop.run(5)
    assert not loop.settled
    assert kept(tmp_path) == []


@pytest.mark.parametrize("first", [True, False])
def test_a_hook_that_fails_loses_nothing_of_its_step(first, tmp_path):
    def fail(loop):
        raise ZeroDivisionError

    both = [BreakAfter(fail), Checkpoints(tmp_path, every=100)]
    with pytest.raises(ZeroDivisionError):
        ring_loop(tmp_path, both if first else both[::-1]).run(5)
    assert kept(tmp_path) == ["step-000003"]


@attrs.frozen
class OneOfTwo(SingleProcess):
    size: int = 2

    def gather(self, values):
        return torch.cat([values, values])


@pytest.mark.parametrize(
    ("error", "all_have_it"), [(NonFiniteError("loss"), True), (ContractError("replay"), True), (KeyError("mine"), False)]
)
def test_of_several_processes_all_write_after_an_error_that_all_have(error, all_have_it, tmp_path):
    hook, loop = Checkpoints(tmp_path, every=100), ring_loop(tmp_path)
    loop.run(1)
    loop.devices = OneOfTwo()
    hook.start(loop, 0, 3)
    hook._note(loop, 1)
    hook.stop(loop, 1, error)
    assert bool(kept(tmp_path)) == all_have_it


RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1.0, 0.0], [1.0, 0.0]], scale: 0.3}}
objective: {class_path: SoftmaxTB, init_args: {beta: 2}}
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {class_path: FixedPlan, init_args: {splits: [1], branches: 2, eta: 0.5}}}}
rewards: JPEGCompressibility
prompts: {class_path: failing_parts.Failing, init_args: {prompts: [one]}}
prompts_per_step: 1
evaluation: null
total: 5
"""
PARTS = """
from diffalign.prompts import Prompts

class Failing(Prompts):
    def draw(self, step, count):
        if step == 3:
            raise KeyError("no such prompt")
        return super().draw(step, count)
"""


def test_the_command_says_how_the_run_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "failing_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError):  # a fault of one's own code keeps its traceback
        main(["train", "run.yaml", "--folder", "out"])
    said = capsys.readouterr().err
    assert "the run stopped; the last checkpoint is out/step-000003. Continue by: diffalign train run.yaml --resume" in said
