"""Gradients that pass through float16: they do not vanish, and where they overflow an update is repeated."""

import attrs
import pytest
import torch
from half_base import HalfBase, WholeBase
from loops import PROMPTS, TREE, Phased, build, same, sgd, weights
from meeting import Meeting

from diffalign.core import Loss, NonFiniteError, Phase, Progress
from diffalign.core.loss_scale import scales_of
from diffalign.core.unessential import say_once
from diffalign.objectives import FlowGRPO
from diffalign.testing import TinyPolicy


class Weighed(Phased):
    """The sum of all velocities, times a factor; counts how often its losses are asked for, and keeps that count as its state."""

    def __init__(self, policy, factor, repeats=1):
        super().__init__(policy, Phase({"policy": policy}, self._losses, repeats))
        self.factor, self.counted, self.asked = factor, 0, 0

    def _losses(self, batch, update):
        self.asked += 1
        self.counted += 1
        forest = batch.trajectories
        for row in torch.arange(len(forest.latents)).split(4):
            condition = forest.condition.select(forest.prompt[row])
            value = self.factor * self.policy.velocity(forest.latents[row], forest.sigmas[forest.level[row]], condition).sum()
            yield Loss(value, {"value": (value, torch.tensor(1))})

    def state(self):
        return {"counted": self.counted}

    def restore(self, state):
        self.counted = state["counted"]


def stepped(objective, **options):
    """A step at rate 0; gives the gradient, and the metrics."""
    loop = build(objective, optimizers=sgd(0.0), max_grad_norm=None, **options)
    metrics = loop.step(PROMPTS.draw(0, 2), Progress(0, 1)).metrics
    return torch.cat([parameter.grad.flatten().double() for parameter in objective.policy.trainable_parameters().values()]), metrics


def cosine(one, other):
    return float(one @ other / (one.norm() * other.norm()).clamp(min=1e-300))


@pytest.mark.parametrize(("factor", "tries"), [(1e-9, 1), (1e-7, 1), (1.0, 2), (100.0, 3), (1000.0, 4), (1e4, 5)])
def test_the_gradient_through_a_base_in_float16_is_that_in_float32(factor, tries):
    """From velocities whose gradients are below the smallest number of float16 to those that overflow at the first scales."""
    half, whole = Weighed(HalfBase(), factor), Weighed(WholeBase(), factor)
    (found, metrics), (expected, known) = stepped(half), stepped(whole)
    assert cosine(found, expected) > 0.9999
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.01)
    for name in ("value", "grad_norm/policy"):  # of the unscaled loss, and of one pass
        assert metrics[name] == pytest.approx(known[name], rel=0.01)
    assert (half.asked, whole.asked) == (tries, 1)
    assert half.counted == 1
    assert metrics["loss_scale/policy"] == 2.0 ** (20 - 4 * tries)
    assert "loss_scale/policy" not in known


def test_an_update_that_overflows_is_repeated_alone():
    """Scales are powers of two, so the same update at another one has the same gradient, but for what vanishes."""
    objective, known = Weighed(HalfBase(), 1e-3, repeats=2), Weighed(HalfBase(), 1e-3, repeats=2)
    build(known, optimizers=sgd(0.1)).advance(2)
    objective.policy.overflows = 1
    build(objective, optimizers=sgd(0.1)).advance(2)
    assert (objective.asked, known.asked) == (5, 4)
    assert objective.counted == known.counted == 4
    for name, value in weights(known.policy).items():
        torch.testing.assert_close(weights(objective.policy)[name], value, rtol=1e-3, atol=1e-7)


def test_that_updates_are_repeated_is_said_once_and_never_where_none_is(capsys):
    say_once.cache_clear()
    stepped(Weighed(HalfBase(), 1e-7))
    assert capsys.readouterr().err == ""
    build(Weighed(HalfBase(), 100.0), optimizers=sgd(1e-9)).advance(2)  # each of two steps twice
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("role 'policy': a gradient overflowed in float16, so the update is repeated at a smaller scale")


def test_the_scale_is_the_same_in_all_processes_and_the_first_says_it(capsys):
    objectives = [Weighed(HalfBase(), 1e-3) for _ in range(2)]
    objectives[1].policy.overflows = 1
    found = {}
    say_once.cache_clear()

    def work(devices):
        loop = build(objectives[devices.rank], optimizers=sgd(0.1), devices=devices)
        found[devices.rank] = loop.step(PROMPTS.draw(0, 2), Progress(0, 1)).metrics["loss_scale/policy"]

    assert Meeting().run(work) == {0: None, 1: None}
    assert found == {0: 2.0**12, 1: 2.0**12}
    assert capsys.readouterr().err.count("a gradient overflowed in float16") == 1


def test_an_overflow_in_one_process_repeats_the_update_in_all():
    objectives = [Weighed(HalfBase(), 1e-3) for _ in range(2)]
    objectives[1].policy.overflows = 1

    def work(devices):
        build(objectives[devices.rank], optimizers=sgd(0.1), devices=devices).advance(1)

    assert Meeting().run(work) == {0: None, 1: None}
    assert [objective.asked for objective in objectives] == [2, 2]
    assert same(*(weights(objective.policy) for objective in objectives))
    assert not same(weights(objectives[0].policy), weights(HalfBase()))


def test_what_is_not_finite_at_any_scale_is_refused_and_nothing_moves():
    objective = Weighed(HalfBase(), 1.0)
    objective.policy.overflows = 1000
    before = weights(objective.policy)
    with pytest.raises(
        NonFiniteError, match=r"^role 'policy', step 0: gradient of 'network.lora_A.weight' is not finite\. The velocities at"
    ):
        build(objective).advance(1)
    assert objective.asked == 5
    assert same(weights(objective.policy), before)
    assert all(parameter.grad is None for parameter in objective.policy.parameters())


@pytest.mark.parametrize("updates", [1, 2])
def test_a_graph_that_the_rollout_kept_is_replaced_by_a_replay(updates):
    trained = []
    for keeps in (False, True):
        policy = HalfBase()
        loop = build(FlowGRPO(policy, updates=updates), sampler=attrs.evolve(TREE, keep_graph=keeps), optimizers=sgd(0.1))
        policy.overflows = 1
        report = loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
        assert not report.batch.trajectories.mean.requires_grad
        trained.append(weights(policy))
    assert same(*trained)
    assert not same(trained[0], weights(HalfBase()))


def test_losses_are_scaled_only_where_it_helps():
    halves = TinyPolicy(dtype=torch.float16)
    for policy in (WholeBase(), TinyPolicy(dtype=torch.bfloat16), halves):
        assert scales_of({"policy": policy}) == (1.0,)
    assert scales_of({"one": TinyPolicy(), "two": HalfBase()}) == (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
    assert scales_of({"one": halves, "two": HalfBase()}) == (1.0,)
    assert scales_of({}) == (1.0,)
