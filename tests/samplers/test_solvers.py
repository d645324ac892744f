"""Solvers: their order, their evaluations, equality with diffusers' rules, and what a rollout by them is."""

import itertools
import math

import attrs
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Progress, Streams, shifted_sigmas
from diffalign.costs.forecast import forecast
from diffalign.objectives import DGPO, SoftmaxTB, TrajectoryDistributionMatching
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import AdamsBashforth, DeterministicSampler, DPMSolver, Heun, Midpoint
from diffalign.testing import TinyPolicy, channel_reward, check_sampler

SOLVERS = [Heun(), Midpoint(), AdamsBashforth(), DPMSolver()]
EACH = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
MIXTURE = GaussianMixturePolicy(torch.tensor([[-2.0, 0.0], [1.5, 1.0], [0.0, -1.0]], dtype=torch.float64), 0.8)
NOISE = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.no_grad()
def field(states, sigma):
    return MIXTURE.velocity(states, sigma.expand(len(states)), MIXTURE.encode([Prompt("a")] * len(states)))


def grid(steps):
    return shifted_sigmas(steps, 1.0).double()


def smooth(states, sigma):
    return torch.sin(3 * sigma) * states + sigma**2


def end(rule, steps):
    """End of a smooth field from level 0.9 to 0.1."""
    return float(rule.solve(smooth, torch.ones(1, dtype=torch.float64), torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)))


EXACT = end(Midpoint(), 2000)


@EACH
def test_it_is_of_second_order_where_the_euler_step_is_of_first(solver):
    """One Euler step among many costs the square of its width, so first and last steps of first order do not lower the order."""

    errors = [abs(end(solver, steps) - EXACT) for steps in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.3)


@EACH
def test_ten_evaluations_end_nearer_than_twenty_of_euler(solver):
    def euler(steps):
        states, sigmas = NOISE, grid(steps)
        for sigma, following in itertools.pairwise(sigmas):
            states = states + (following - sigma) * field(states, sigma)
        return states

    exact = Midpoint().solve(field, NOISE, grid(400))
    steps = next(steps for steps in (10, 5) if sum(solver.evaluations(steps)) <= 10)
    assert float((solver.solve(field, NOISE, grid(steps)) - exact).norm()) < float((euler(20) - exact).norm())


def test_heun_is_that_of_diffusers():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(8)
    states = NOISE
    for timestep in scheduler.timesteps:
        states = scheduler.step(field(states, timestep.double() / 1000), timestep, states).prev_sample
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]]).double()
    torch.testing.assert_close(Heun().solve(field, NOISE, sigmas), states.double(), atol=1e-4, rtol=0)
    assert sum(Heun().evaluations(8)) == len(scheduler.timesteps) == 15


@pytest.mark.parametrize("begin", [1.0, 0.96])
def test_dpm_solver_is_that_of_diffusers(begin):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(10)
    sigmas = grid(10) * begin
    scheduler.sigmas = sigmas
    scheduler.timesteps = sigmas[:-1] * 1000
    states = NOISE
    for place, sigma in enumerate(sigmas[:-1]):
        states = scheduler.step(field(states, sigma), scheduler.timesteps[place], states).prev_sample
    found = DPMSolver().solve(field, NOISE, sigmas)
    torch.testing.assert_close(found, states, atol=1e-4, rtol=0)
    assert float((found - Midpoint().solve(field, NOISE, sigmas)).abs().max()) > 1e-3  # the rules can be told apart


@EACH
def test_a_rollout_counts_its_evaluations_and_does_not_depend_on_rows(solver):
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    sampler = DeterministicSampler(5, samples=3, solver=solver)
    condition = policy.encode([Prompt("a"), Prompt("b")])
    before = policy.counter.rows
    with torch.no_grad():
        forest = sampler.sample(policy, condition, Progress(0, 1), Streams(1))
        assert policy.counter.rows - before == 2 * sampler.branching().rollout_rows == 6 * sum(solver.evaluations(5))
        chunked = attrs.evolve(sampler, rows=2).sample(policy, condition, Progress(0, 1), Streams(1))
        plain = DeterministicSampler(5, samples=3).sample(policy, condition, Progress(0, 1), Streams(1))
    torch.testing.assert_close(chunked.samples, forest.samples, atol=1e-12, rtol=0)
    assert len(forest.latents) == len(forest.leaves) == 6
    assert torch.equal(forest.group, plain.group)
    gap = float((forest.samples - plain.samples).abs().max())
    assert 1e-6 < gap < 0.5  # from the same noise


@EACH
def test_samplers_keep_their_contract_which_has_no_edge_to_check(solver):
    findings = {finding.name: finding.skipped for finding in check_sampler(DeterministicSampler(4, samples=3, solver=solver))}
    assert sum(bool(reason) for reason in findings.values()) >= 3


def test_a_forecast_counts_them_and_objectives_over_steps_refuse_them():
    sampler = DeterministicSampler(5, samples=3, solver=Heun())

    def loop(objective, policy):
        return AlignmentLoop(objective(policy), sampler, channel_reward, Prompts(["a", "b"]), prompts_per_step=2)

    text = forecast(loop(lambda policy: DGPO(policy, levels=2), TinyPolicy()), 10)
    assert "27 network rows a prompt, 54 a step in 9 calls" in text
    loop(lambda policy: DGPO(policy, levels=2), TinyPolicy()).run(1)
    with pytest.raises(ValueError, match="needs stochastic steps"):
        loop(SoftmaxTB, TinyPolicy())
    with pytest.raises(ValueError, match="solver must be None for a few-step student"):
        loop(TrajectoryDistributionMatching, TDMPolicy(TinyPolicy((2, 2)), steps=5))
