"""The loop: what is refused before a weight moves."""

import functools
from unittest.mock import Mock

import attrs
import pytest
import torch
from loops import PROMPTS, TREE, Phased, build, phase, same, sgd, square, weights

from diffalign.core import ConfigError, Hook, Loss, Phase, Progress, Prompt, Reward, Streams, UpdateError
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, Midpoint
from diffalign.testing import BrokenReplay, TinyPolicy


@pytest.mark.parametrize("block", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_losses_that_yield_inside_a_block_are_refused_and_leave_no_trace(block):
    policy = TinyPolicy()
    before = weights(policy)

    def losses(batch, update):
        with block():
            yield Loss(square(policy))

    loop = build(Phased(policy, Phase({"policy": policy}, losses)))
    with pytest.raises(UpdateError, match="the losses of policy yielded inside no_grad or autocast"):
        loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert same(weights(policy), before)


def test_dropout_is_refused_while_it_is_on():
    policy = TinyPolicy()
    policy.network.body.append(torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"role 'policy': 'network.body.3' has dropout 0.1; replay could not be exact. Set it to 0."):
        build(SoftmaxTB(policy))
    policy.eval()
    build(SoftmaxTB(policy))
    policy.train()
    policy.network.body[3].p = 0.0
    build(SoftmaxTB(policy))


def test_a_role_without_trainable_weights_is_refused():
    with pytest.raises(ValueError, match="role 'policy' has nothing to train: no parameter requires grad"):
        build(SoftmaxTB(TinyPolicy().fork()))


def test_an_optimizer_for_no_role_is_refused():
    with pytest.raises(ValueError, match="optimizers has an entry 'critic'; the roles are policy, or 'default' for all"):
        build(SoftmaxTB(TinyPolicy()), optimizers={"critic": sgd(0.1), "policy": sgd(0.1)})


@pytest.mark.parametrize(
    "options", [{"prompts_per_step": 0}, {"max_grad_norm": 0.0}, {"chunk": 0}, {"check_rows": -1}], ids=lambda options: next(iter(options))
)
def test_numbers_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"'{next(iter(options))}' must be >"):
        build(SoftmaxTB(TinyPolicy()), **options)


@pytest.mark.parametrize(
    ("total", "start", "said"),
    [
        (2.5, 0, r"total must be a whole number of steps; got 2\.5\. Write it without a fraction\."),
        (3, 1.0, r"start must be a whole number of steps; got 1\.0\."),
        ("3", 0, r"total must be a whole number of steps; got '3'\."),
        (-1, 0, r"total must be at least 0 steps; got -1\. It counts all steps of the run"),
    ],
)
def test_numbers_that_count_no_steps_are_refused(total, start, said, tmp_path):
    loop = build(Phased(TinyPolicy()))
    for run in (loop.advance, loop.run, lambda *given: loop.run(*given, folder=tmp_path / "run")):
        with pytest.raises(ValueError, match=said):
            run(total, start)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("total", "start"), [(3, 4), (3, -1)])
def test_a_start_outside_the_run_is_refused(total, start):
    with pytest.raises(ValueError, match=rf"start must lie between 0 and total = {total}; got {start}"):
        build(SoftmaxTB(TinyPolicy())).run(total, start)


def test_a_slip_of_one_sigma_index_fails_before_a_weight_moves_and_names_the_level():
    policy = BrokenReplay(TinyPolicy(), "sigma", 5)
    before = weights(policy)
    with pytest.raises(RuntimeError, match=r"first-step contract: .* At level 1 \(sigma 0.8889 -> 0.75\)"):
        build(SoftmaxTB(policy), check_rows=1).run(1)
    assert same(weights(policy), before)
    build(SoftmaxTB(BrokenReplay(TinyPolicy(), "sigma", 5)), check_rows=0).run(1)  # switched off, the slip goes unnoticed


def test_the_behaviour_policy_rolls_out_and_is_held_to_the_contract():
    policy = TinyPolicy()
    old = policy.fork()

    class Delayed(Phased):
        def behavior(self):
            return old

        def policies(self):
            return {"policy": policy, "old": old}

    with torch.no_grad():
        policy.network.lora_B.weight += 1.0
    report = build(Delayed(policy, phase(policy=policy))).step(PROMPTS.draw(0, 2), Progress(0, 1))
    with torch.no_grad():
        expected = TREE.sample(old, old.encode(PROMPTS.draw(0, 2)), Progress(0, 1), Streams(0, 0))
    assert torch.equal(report.batch.trajectories.latents, expected.latents)
    assert report.metrics["contract/deviation"] < 1e-5


@pytest.mark.parametrize("solver", [None, Midpoint()], ids=["steps", "ends"])
def test_deterministic_samplers_have_no_contract_to_break_and_say_no_number(solver):
    policy = TinyPolicy()
    loop = build(Phased(policy, phase(policy=policy)), sampler=DeterministicSampler(3, samples=2, solver=solver))
    metrics = loop.step(PROMPTS.draw(0, 2), Progress(0, 1)).metrics
    assert not [name for name in metrics if name.startswith("contract/")]
    assert "rows/policy/contract" not in metrics


class TakesTooLittle(Hook):
    def start(self, loop):
        pass


class TakesMore(Hook):
    def step(self, loop, report, extra=None):
        pass


class Misspelt(Hook):
    def on_step(self, loop, report):
        pass


class Other(Hook):
    """Has a method of its own, for others."""

    def value(self):
        return 1


def test_hooks_that_cannot_be_called_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match=r"hooks\[1\]: TakesTooLittle.start is called with \(loop, step, total\); it takes \(loop\)"):
        build(SoftmaxTB(TinyPolicy()), hooks=[Hook(), TakesTooLittle()])
    with pytest.raises(ValueError, match=r"hooks\[0\]: Misspelt.on_step is never called; did you mean step\?"):
        build(SoftmaxTB(TinyPolicy()), hooks=[Misspelt()])
    build(SoftmaxTB(TinyPolicy()), hooks=[Hook(), TakesMore(), Other()])


class Static(Hook):
    @staticmethod
    def step(loop, report):
        pass


class OfTheClass(Hook):
    steps = 5

    @classmethod
    def step(cls, loop, report):
        pass


class OnTheInstance(Hook):
    def __init__(self):
        self.step = self._step

    def _step(self, loop, report):
        pass


class Named(Hook):
    """Only a number whose name is near."""

    steps = 5


class AnObject(Hook):
    step = functools.partial(print)


@pytest.mark.parametrize("make", [Static, OfTheClass, OnTheInstance, Named, AnObject, lambda: Mock(spec=Hook)])
def test_hooks_that_the_loop_can_call_are_taken(make):
    build(SoftmaxTB(TinyPolicy()), hooks=[make()])


@attrs.frozen
class Wish(Reward):
    """Needs a number in the metadata of every prompt."""

    def require(self, prompts):
        for prompt in prompts:
            if "ink" not in prompt.metadata:
                raise ConfigError(f"Wish needs 'ink' in the metadata of {str(prompt)!r}")

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


def test_what_a_reward_needs_of_prompts_is_asked_before_the_first_step():
    policy = TinyPolicy()
    told = [Prompt("a", {"ink": 1.0}), Prompt("b", {"ink": 0.5})]
    build(SoftmaxTB(policy), rewards=Wish(), prompts=Prompts(told))
    with pytest.raises(ConfigError, match="Wish needs 'ink' in the metadata of 'c'"):
        build(SoftmaxTB(policy), rewards=Wish(), prompts=Prompts([*told, Prompt("c")]))
