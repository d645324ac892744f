"""Before the first update, replay reproduces the rollout, or the run stops with the level at which it does not, and with a guess."""

import functools
import re

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, ROOT, UNRECORDED, ContractError, FlowSDE, Guided, PolicyAround, Progress, Streams, check_first_step
from diffalign.objectives import FlowGRPO
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, ChainSampler, DeterministicSampler, TreeSampler
from diffalign.testing import BrokenReplay, GivenPlan, TinyPolicy, channel_reward
from diffalign.testing.strategies import branchings

TREE = TreeSampler(5, GivenPlan(Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))))
PROMPTS = [Prompt("a red cube"), Prompt("two blue stars")]


def sample(policy, sampler=TREE):
    with torch.no_grad():
        return sampler.sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(0))


@pytest.mark.parametrize("kernel", [CPS(), FlowSDE()])
@given(data=st.data())
def test_an_honest_policy_keeps_it_to_the_bit(kernel, data):
    branching = data.draw(branchings(first=1))
    rows = data.draw(st.sampled_from([None, 1, 3]))
    policy = TinyPolicy((2, 2), kernel=kernel)
    forest = sample(policy, TreeSampler(len(branching.children), GivenPlan(branching), rows))
    assert check_first_step(policy, forest).deviation == 0.0


def test_a_forest_without_noise_has_nothing_to_compare():
    policy = TinyPolicy()
    forest = sample(policy, DeterministicSampler(3, samples=1))
    rows = policy.counter.rows
    found = check_first_step(policy, forest)
    assert (found.deviation, found.metrics()) == (None, {})
    assert policy.counter.rows == rows


@pytest.mark.parametrize(
    ("step", "limit", "rows"),
    [(0, None, 2 + 6 + 6), (1, None, 6), (2, None, 6), (3, None, 2), (0, 1, 1), (0, 5, 5), (0, 1000, 14), (3, 1, 1), (4, 4, 4)],
)
def test_the_first_step_repeats_all_calls_and_each_further_one_a_call_in_turn(step, limit, rows):
    policy = TinyPolicy()
    forest = sample(policy)
    before = policy.counter.rows
    found = check_first_step(policy, forest, step, limit)
    assert found.rows == rows
    assert policy.counter.rows - before == rows + (step == 0) * (1 if rows > 1 and limit != 1 else 2)  # and on rounding


def test_later_only_every_fifth_step_repeats_a_call_and_all_have_their_turn():
    policy = TinyPolicy()
    forest = sample(policy)
    assert [check_first_step(policy, forest, step).rows for step in (5, 10, 15, 20, 25, 30)] == 2 * [6, 2, 6]  # calls of 2, 6 and 6 rows
    loop = AlignmentLoop(FlowGRPO(policy), TREE, channel_reward, Prompts(PROMPTS), prompts_per_step=2)
    told = [loop.step(PROMPTS, Progress(step, 31)).metrics for step in range(31)]
    assert [step for step, metrics in enumerate(told) if "contract/deviation" in metrics] == [0, 1, 2, 3, 4, 5, 10, 15, 20, 25, 30]


def test_calls_are_numbered_as_they_were_made():
    calls = []

    class Watched(PolicyAround):
        def velocity(self, latents, sigma, condition):
            calls.append(latents)
            return self.policy.velocity(latents, sigma, condition)

        def fork(self, *, trainable=False, pristine=False):
            raise AssertionError

    policy = Watched(TinyPolicy())
    forest = sample(policy, attrs.evolve(TREE, rows=4))
    assert len(calls) == 1 + 1 + 2 + 2 + 3
    for number in set(forest.call.tolist()) - {UNRECORDED}:
        parents = forest.parent[forest.call == number].unique()
        assert torch.equal(forest.latents[parents], calls[number])
    assert (forest.call[forest.noise_level == 0] == UNRECORDED).all()
    assert (forest.call[forest.noise_level > 0] != UNRECORDED).all()
    assert (forest.call[forest.parent == ROOT] == UNRECORDED).all()


def test_the_deviation_is_in_lengths_of_what_the_velocity_contributes():
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    forest = sample(policy)
    edge = 4
    child = forest.stochastic[edge]
    parent = forest.parent[child]
    level = int(forest.level[parent])
    start, end, eta = forest.sigmas[level], forest.sigmas[level + 1], forest.noise_level[child]
    velocity = policy.velocity(forest.latents[parent][None], start[None], forest.condition.select(forest.prompt[parent][None]))
    angle = eta * torch.pi / 2
    per_velocity = float(-(1 - end) * start + end * angle.cos() * (1 - start))  # d mean / d velocity of CPS
    moved = 0.03 * per_velocity * velocity
    mean = forest.mean[edge] + moved[0]
    length = float(
        (per_velocity * velocity).detach().norm() + 1e-3 * (mean - moved[0]).detach().norm()
    )  # a thousandth of the mean, for velocities near 0
    with pytest.raises(ContractError, match=f"the velocity differs by {float(moved.detach().norm()) / length:.3g} of its length"):
        check_first_step(policy, attrs.evolve(forest, mean=forest.mean.index_add(0, torch.tensor([edge]), moved)))


@pytest.mark.parametrize("sampler", [TREE, ChainSampler(5, samples=3)])
def test_a_slip_of_one_sigma_index_is_found_and_its_level_named(sampler):
    policy = BrokenReplay(TinyPolicy(), "sigma", 5)
    forest = sample(policy, sampler)
    sigmas = policy.sigmas(5)
    with pytest.raises(
        ContractError, match=r"At level 1 .* one index off: the rollout's velocity is that of the sigma one before"
    ) as caught:
        check_first_step(policy, forest, rows=1)
    assert f"(sigma {sigmas[1]:.4g} -> {sigmas[2]:.4g})" in str(caught.value)


def test_moved_weights_are_found():
    policy = TinyPolicy()
    forest = sample(policy)
    with torch.no_grad():
        policy.network.lora_B.weight += 1e-2
    with pytest.raises(ContractError, match="other weights or a stale cache"):
        check_first_step(policy, forest, step=3)


def test_a_mean_that_is_not_a_number_is_found():
    policy = TinyPolicy()
    forest = sample(policy)
    with torch.no_grad():
        policy.network.lora_B.weight[0, 0] = float("nan")
    with pytest.raises(ContractError, match=r"differs by nan of its length.* It is not a number now"):
        check_first_step(policy, forest)


def test_stored_log_probs_of_another_noise_are_found_though_the_means_are_right():
    policy = TinyPolicy((4, 8, 8))
    forest = sample(policy)
    with pytest.raises(ContractError, match="another noise level"):
        check_first_step(policy, attrs.evolve(forest, log_prob=forest.log_prob * 1.001))


def test_log_probs_that_a_sampler_does_not_store_are_not_taken_for_a_velocity_or_a_noise_level():
    policy = TinyPolicy((4, 8, 8))
    forest = sample(policy)
    with pytest.raises(
        ContractError, match=r"though the means agree. The stored log-probabilities are not those of the stored means"
    ) as said:
        check_first_step(policy, attrs.evolve(forest, log_prob=forest.log_prob * 0))
    assert "velocity" not in str(said.value)
    assert "times the noise level" not in str(said.value)


@attrs.frozen
class Unnumbered:
    """A sampler that does not number its calls, and makes them of another size than one would guess."""

    rows: int | None = 1

    def sample(self, policy, condition, progress, streams):
        forest = attrs.evolve(TREE, rows=self.rows).sample(policy, condition, progress, streams)
        return attrs.evolve(forest, call=torch.full_like(forest.call, UNRECORDED))


class RoundedByShape(PolicyAround):
    """Rounds as half precision on a device does: by an amount that depends on the number of rows."""

    def __init__(self, policy, size):
        super().__init__(policy)
        self.size = size

    def velocity(self, latents, sigma, condition):
        exact = self.policy.velocity(latents, sigma, condition)
        noise = torch.randn(exact.shape[1:], generator=torch.Generator().manual_seed(len(latents))).to(exact)
        return exact + self.size * exact.abs().mean() * noise

    @property
    def precision(self):
        return torch.bfloat16

    def fork(self, *, trainable=False, pristine=False):
        return type(self)(self.policy.fork(trainable=trainable, pristine=pristine), self.size)


class Compiled(RoundedByShape):
    @property
    def reproducible(self):
        return False


@pytest.mark.parametrize("rows", [1, 3, None])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 3e-2])
@pytest.mark.parametrize(("kind", "sampler"), [(RoundedByShape, TREE), (RoundedByShape, Unnumbered()), (Compiled, TREE)])
def test_rounding_that_depends_on_the_batch_is_no_breach(kind, sampler, size, rows):
    policy = kind(TinyPolicy((4, 8, 8)), size)
    forest = sample(policy, attrs.evolve(sampler, rows=rows))
    for step in range(6):
        for limit in (None, 1, 2):
            check_first_step(policy, forest, step, limit)
    found = check_first_step(policy, forest)
    assert found.rounding > 0
    if kind is RoundedByShape and sampler is TREE:
        assert found.deviation == 0.0


def test_a_fault_as_small_as_rounding_is_found_where_a_call_can_be_repeated():
    policy = RoundedByShape(TinyPolicy((4, 8, 8)), 1e-2)
    numbered, unnumbered = sample(policy), sample(policy, Unnumbered(rows=None))
    policy.size *= 1.2  # a fifth of what another number of rows changes
    for call in range(3):
        with pytest.raises(ContractError, match=r"calls with another number of rows by 0\.0"):
            check_first_step(policy, numbered, step=call + 1)
        check_first_step(policy, unnumbered, step=call + 1)  # nobody can tell it from rounding there


def test_rounding_is_measured_in_the_unit_of_the_log_density():
    errors = []
    for density in ("mean", "sum"):
        policy = RoundedByShape(TinyPolicy((4, 8, 8), kernel=CPS(density)), 1e-2)
        errors.append(check_first_step(policy, sample(policy)).rounding)
    assert errors[1] == pytest.approx(256 * errors[0], rel=1e-6)


def test_rows_that_are_mixed_are_no_rounding():
    class Mixed(PolicyAround):
        def velocity(self, latents, sigma, condition):
            velocity = self.policy.velocity(latents, sigma, condition)
            return velocity - velocity.mean(dim=0, keepdim=True)

        def fork(self, *, trainable=False, pristine=False):
            raise AssertionError

    policy = Mixed(TinyPolicy((4, 8, 8)))
    with pytest.raises(ContractError, match="rows that are mixed"):
        check_first_step(policy, sample(policy, Unnumbered()))


FAULTS = {
    "sigma": "one index off",
    "adapter": "other weights",
    "condition": "stale cache|a cache of another call",
    "cache": "stale cache: the velocity does not change with the latents|a cache of another call",
    "guidance": r"another guidance: the rollout's scale is 3, the replay's 3\.15",
    "dropout": "dropout",
    "type": "two equal calls|changed type",
    "noise level": r"another noise level: the kernel gives the rollout's means at 1 times",
}


@functools.cache
def honest_rollout(kernel, steps, rows, guided):
    """A policy and a rollout of it that keeps the contract, which every fault is planted into."""
    policy = TinyPolicy((4, 8, 8), kernel=kernel, shift=3.0)
    policy = Guided(policy, 3.0) if guided else policy
    forest = sample(policy, ChainSampler(steps, samples=3, rows=rows))
    check_first_step(policy, forest)
    return policy, forest


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kernel", [CPS("mean"), FlowSDE("mean"), CPS("sum")], ids=repr)
@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("rows", [1, None])
def test_a_planted_fault_is_found_at_every_level_and_named(fault, kernel, steps, rows):
    """All stochastic levels, the last ones included: each call is checked alone."""
    inner, honest = honest_rollout(kernel, steps, rows, fault == "guidance")
    calls = len(set(honest.call.tolist()) - {UNRECORDED})
    wrong = BrokenReplay(inner, fault, calls=0, steps=steps)
    if fault == "cache":
        wrong = BrokenReplay(inner, fault, calls=1, steps=steps)
        wrong.velocity(
            honest.latents[: rows or 6], honest.sigmas[:1].expand(rows or 6), honest.condition.select(torch.zeros(rows or 6).long())
        )
    named = 0
    some = sorted({1, 2, calls // 2, calls - 1, calls})
    for call in some:
        try:
            check_first_step(wrong, honest, step=call if call < 5 else 5 * (call - 4))  # the step whose turn it is
        except ContractError as error:
            named += bool(re.search(FAULTS[fault], str(error)))
        else:
            same_row = rows == 1 and fault == "condition"
            assert same_row, f"call {call} of {calls} passed"
    assert named == len(some) or (rows == 1 and fault in ("condition", "cache"))


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7])
def test_the_first_step_of_a_process_is_checked_wherever_a_run_goes_on(start):
    class Astray(TinyPolicy):
        def velocity(self, latents, sigma, condition):
            return super().velocity(latents, sigma, condition) * (1 + torch.rand(1).item())

    loop = AlignmentLoop(FlowGRPO(Astray()), TREE, channel_reward, Prompts(PROMPTS), prompts_per_step=2)
    with pytest.raises(ContractError):
        loop.advance(start + 1, start)
