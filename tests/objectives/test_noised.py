"""Samples with noise added again: what is drawn, and what the draws depend on."""

import attrs
import pytest
import torch
from chosen import PROMPTS, SAMPLES, batch_for

from diffalign.core import NonFiniteError
from diffalign.objectives.draws import GridDraws
from diffalign.objectives.noised import NoisedSamples, mean_square
from diffalign.objectives.noising import bridge_velocity, diffuse
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy

SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])


def drawn(shared, chosen=(0, 1, 2), levels=3, sigma_min=0.0, name="n", step=2, dtype=torch.float64):
    policy = TinyPolicy((2, 2), dtype=dtype)
    return NoisedSamples.draw(batch_for(policy, chosen=chosen, step=step), levels, sigma_min, shared, name, "Mine")


@SHARED
def test_a_unit_is_a_point_on_the_line_from_its_sample_to_its_noise(shared):
    samples = drawn(shared)
    assert (len(samples), samples.levels) == (3 * 4 * 3, 3)
    noised = samples.at(torch.arange(len(samples)))
    sigma = noised.sigma[:, None, None]
    clean = samples.batch.trajectories.samples[samples.sample]
    torch.testing.assert_close(noised.latents - sigma * noised.target, clean)
    noise = noised.latents + (1 - sigma) * noised.target
    torch.testing.assert_close(noise - clean, noised.target)
    assert abs(float(noise.mean())) < 0.3
    assert float(noise.std()) == pytest.approx(1.0, abs=0.2)
    assert [str(prompt) for prompt in noised.condition.prompts] == [prompt for prompt in PROMPTS for _ in range(12)]


@SHARED
def test_levels_are_distinct_steps_of_the_rollouts_grid(shared):
    samples = drawn(shared, levels=4, sigma_min=0.4)
    grid = samples.batch.trajectories.sigmas[:-1]
    allowed = set(grid[grid >= 0.4].tolist())
    for row in samples.sigma.tolist():
        assert len(set(row)) == 4
        assert set(row) <= allowed
    assert len({tuple(row) for row in samples.sigma.tolist()}) > 1


def test_shared_noise_is_that_of_the_prompt_and_own_noise_that_of_the_sample():
    for shared in (True, False):
        samples = drawn(shared)
        noised = samples.at(torch.arange(len(samples)))
        noise = noised.latents + (1 - noised.sigma[:, None, None]) * noised.target
        noise, sigma = noise.reshape(3, 4, 3, 2, 2), samples.sigma.reshape(3, 4, 3)
        equal = [torch.allclose(noise[prompt, 0], noise[prompt, other]) for prompt in range(3) for other in range(1, 4)]
        assert equal == [shared] * 9
        assert torch.equal(sigma, sigma[:, :1].expand_as(sigma)) == shared
        assert not torch.allclose(noise[0, 0], noise[1, 0])
        assert not torch.allclose(noise[0, 0, 0], noise[0, 0, 1])


@SHARED
def test_draws_do_not_depend_on_pieces_or_on_other_prompts(shared):
    samples = drawn(shared)
    whole = samples.at(torch.arange(len(samples)))
    for piece in torch.arange(len(samples)).split(5):
        part = samples.at(piece)
        assert torch.equal(part.latents, whole.latents[piece])
        assert torch.equal(part.target, whole.target[piece])
    alone = drawn(shared, chosen=[1])
    mine = slice(12, 24)
    assert torch.equal(alone.at(torch.arange(12)).latents, whole.latents[mine])
    assert torch.equal(drawn(shared, chosen=[2, 1]).at(torch.arange(12, 24)).target, whole.target[mine])


@SHARED
def test_names_and_steps_draw_anew(shared):
    whole = torch.arange(36)
    first = drawn(shared).at(whole)
    for other in (drawn(shared, name="m"), drawn(shared, step=3)):
        assert not torch.allclose(other.at(whole).target, first.target)


def test_half_precision_keeps_its_latents_and_an_exact_target():
    noised = drawn(False, dtype=torch.bfloat16).at(torch.arange(5))
    assert (noised.latents.dtype, noised.target.dtype) == (torch.bfloat16, torch.float32)


def units_and_noise(samples):
    """All units, their clean samples in the target's type, and the noise that they were given."""
    noised = samples.at(torch.arange(len(samples)))
    clean = samples.batch.trajectories.samples[samples.sample].to(noised.target.dtype)
    name = f"{samples.name}/noise"
    ids = samples.batch.trajectories.group[samples.sample].tolist()
    places = samples.place[samples.sample] * 2**32 + torch.arange(len(samples)) % samples.levels
    return noised, clean, samples.batch.streams.normals(clean.shape[1:], name, ids, places.tolist()).to(clean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_the_rollout_ends_at_0_units_lie_on_the_line_bit_for_bit(dtype):
    noised, clean, noise = units_and_noise(drawn(False, levels=6, dtype=dtype))
    wide = noised.sigma[:, None, None].to(clean.dtype)
    assert torch.equal(noised.latents, ((1 - wide) * clean + wide * noise).to(dtype))
    assert torch.equal(noised.target, noise - clean)


@pytest.mark.parametrize("end", [0.0283, 0.15])
def test_where_the_rollout_ends_above_0_its_samples_have_noise_already(end):
    samples = drawn(False, levels=6)
    grid = samples.batch.trajectories.sigmas
    short = attrs.evolve(samples.batch.trajectories, sigmas=torch.cat([grid[:-1], grid.new_tensor([end])]))
    noised, state, noise = units_and_noise(attrs.evolve(samples, batch=attrs.evolve(samples.batch, trajectories=short)))
    sigma, s = noised.sigma.double(), noised.sigma.double().new_tensor(end).expand(len(samples))
    torch.testing.assert_close(noised.latents, diffuse(state, s, sigma, noise))
    torch.testing.assert_close(noised.target, bridge_velocity(state, s, sigma, noise))
    kept = ((1 - sigma) / (1 - end))[:, None, None]
    added = (noised.latents - kept * state) / noise
    wide = sigma[:, None, None]
    torch.testing.assert_close(added.square() + (kept * end).square(), wide.square().expand_as(added))  # the old noise and the new
    # by the score of x_sigma given x_s, whose mean is that of the samples' law: v = -(x_sigma + sigma score) / (1 - sigma)
    torch.testing.assert_close((1 - wide) * noised.target, -(noised.latents - wide * noise / added))


def test_a_level_below_the_end_of_the_rollout_is_refused():
    samples = drawn(False)
    lifted = attrs.evolve(samples.batch.trajectories, sigmas=samples.batch.trajectories.sigmas * 0.1 + 0.9)
    with pytest.raises(ValueError, match="noise can be added only upwards"):
        attrs.evolve(samples, batch=attrs.evolve(samples.batch, trajectories=lifted)).at(torch.arange(len(samples)))


def test_more_levels_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"Mine.levels must be at most the number of noise levels of the rollout from sigma_min 0.9 on, 2"):
        drawn(True, sigma_min=0.9)
    assert len(SAMPLES.children) == 6


def test_every_grid_of_a_run_needs_as_many_levels():
    outline = DeterministicSampler(4, samples=2).outline(TinyPolicy())
    high = len(outline.sigmas[:-1])
    draws = GridDraws(high, 0.0, shared=False)
    draws.require(attrs.evolve(outline, others=(outline.sigmas,)), "Mine")
    short = attrs.evolve(outline, others=(outline.sigmas, outline.sigmas[1:]))
    with pytest.raises(ValueError, match=rf"Mine.levels must be at most .* from sigma_min 0 on, {high - 1}; got {high}"):
        draws.require(short, "Mine")


def test_what_is_not_finite_is_named_by_level_and_prompt():
    samples = drawn(True)
    values = torch.zeros(36)
    samples.require_finite(values, torch.arange(36), "policy")
    values[13] = float("nan")
    sigma = samples.sigma[13 // 3, 13 % 3].item()
    with pytest.raises(
        NonFiniteError, match=rf"velocity of the policy is not finite at sigma {sigma:.4g}, prompt 'two blue stars'. Nothing"
    ):
        samples.require_finite(values, torch.arange(36), "policy")


def test_mean_square_is_a_mean_over_the_latent():
    values = torch.tensor([[[1.0, 2.0], [2.0, 4.0]]])
    assert mean_square(values).tolist() == [6.25]
    assert mean_square(values).dtype == torch.float64
