"""The flow of a Gaussian mixture, against the score of its density and against its own weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import Prompt
from diffalign.core import CPS, FlowSDE, Progress, Streams
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import DeterministicSampler

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
WEIGHTS = [0.2, 0.5, 0.3]


def mixture(scale=0.6, **options):
    return GaussianMixturePolicy(MEANS, scale, WEIGHTS, **options)


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64), mixture().encode([Prompt("any")] * count)


@given(st.floats(0.05, 1.0), st.floats(0.0, 1.5))
def test_one_gaussian_has_a_linear_velocity(sigma, c):
    m = MEANS[:1]
    x, condition = rows(4)
    slope = (sigma - (1 - sigma) * c**2) / ((1 - sigma) ** 2 * c**2 + sigma**2)
    got = GaussianMixturePolicy(m, c).velocity(x, torch.full((4,), sigma, dtype=torch.float64), condition)
    torch.testing.assert_close(got.detach(), -m + slope * (x - (1 - sigma) * m), rtol=1e-10, atol=1e-10)


@given(st.floats(0.05, 0.95), st.floats(0.1, 1.5))
def test_the_velocity_is_that_of_the_score_of_the_marginal(sigma, c):
    x, condition = rows(4)
    x.requires_grad_()
    variance = (1 - sigma) ** 2 * c**2 + sigma**2
    square = (x[:, None] - (1 - sigma) * MEANS).square().sum(dim=2)
    density = torch.tensor(WEIGHTS, dtype=torch.float64).log() - square / (2 * variance)
    (score,) = torch.autograd.grad(density.logsumexp(dim=1).sum(), x)
    # the predicted noise is -sigma score, and x_0 = (x - sigma noise) / (1 - sigma)
    noise = -sigma * score
    expected = noise - (x - sigma * noise) / (1 - sigma)
    got = mixture(c).velocity(x, torch.full((4,), sigma, dtype=torch.float64), condition)
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-8, atol=1e-8)


def test_from_pure_noise_the_mean_of_the_data_is_predicted():
    x, condition = rows(4)
    clean = mixture().predict_clean(x, torch.ones(4, dtype=torch.float64), condition)
    torch.testing.assert_close(clean.detach(), (torch.tensor(WEIGHTS, dtype=torch.float64) @ MEANS).expand(4, 2))


def test_gradients_of_the_velocity_are_exact():
    policy = mixture()
    x, condition = rows(3)
    sigma = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)

    def velocity(means, log_weights):
        return torch.func.functional_call(policy, {"means": means, "log_weights": log_weights}, (x, sigma, condition))

    policy.forward = policy.velocity
    assert torch.autograd.gradcheck(velocity, (policy.means, policy.log_weights))


def test_the_flow_reaches_every_component_with_its_weight():
    policy, count = mixture(scale=0.1), 1000
    with torch.no_grad():
        forest = DeterministicSampler(40, samples=count).sample(policy, policy.encode([Prompt("any")]), Progress(0, 1), Streams(4))
    distance, nearest = torch.cdist(forest.samples, MEANS).min(dim=1)
    shares = torch.bincount(nearest, minlength=3) / count
    for share, weight in zip(shares.tolist(), WEIGHTS, strict=True):
        assert share == pytest.approx(weight, abs=4 * math.sqrt(weight * (1 - weight) / count))
    assert (distance < 0.5).float().mean() > 0.99


def test_weights_are_normalised_and_equal_by_default():
    assert GaussianMixturePolicy([[0.0], [1.0]], 1.0, [2.0, 6.0]).log_weights.exp().tolist() == pytest.approx([0.25, 0.75])
    assert GaussianMixturePolicy([[0.0], [1.0]], 1.0).log_weights.exp().tolist() == pytest.approx([0.5, 0.5])


def test_the_constructor_copies_its_means():
    means = torch.zeros(2, 2)
    policy = GaussianMixturePolicy(means, 1.0)
    means += 1
    assert (policy.means == 0).all()


def test_all_prompts_are_alike_and_latents_are_points():
    policy = mixture(kernel=FlowSDE(), shift=3.0)
    condition = policy.encode([Prompt("a"), Prompt("b")])
    assert condition.ids.tolist() == [0, 1]
    assert policy.latent_shape == (2,)
    assert policy.prior(torch.ones(3, 2)).dtype == policy.sigmas(4).dtype == torch.float64
    assert policy.sigmas(2).tolist() == [1.0, 0.75, 0.0]
    assert policy.counter.rows == 0
    policy.velocity(*rows(4)[:1], torch.full((4,), 0.5, dtype=torch.float64), condition)
    assert (policy.counter.rows, policy.counter.calls) == (4, 1)
    assert isinstance(mixture().kernel, CPS)


def test_decode_maps_the_extent_to_the_unit_interval():
    images = mixture(extent=4.0).decode(torch.tensor([[-4.0, 4.0], [0.0, 2.0]]))
    assert images.shape == (2, 3, 1, 1)
    assert images[:, :, 0, 0].tolist() == [[0.0, 1.0, 0.0], [0.5, 0.75, 0.0]]


@pytest.mark.parametrize("trainable", [True, False])
def test_a_fork_is_equal_bit_for_bit_even_after_training_and_moves_alone(trainable):
    policy = mixture(shift=2.0)
    with torch.no_grad():
        policy.log_weights += torch.tensor([0.3, -0.2, 1.0])  # no longer normalised
        policy.means += 0.1
    twin = policy.fork(trainable=trainable)
    for name, parameter in policy.named_parameters():
        other = dict(twin.named_parameters())[name]
        assert torch.equal(parameter, other)
        assert parameter is not other
        assert other.requires_grad == trainable
        assert parameter.requires_grad
    assert torch.equal(twin.sigmas(5), policy.sigmas(5))
    before = twin.means.detach().clone()
    with torch.no_grad():
        policy.means += 1
    assert torch.equal(twin.means, before)


def test_a_mixture_has_no_delta_to_leave_out():
    with pytest.raises(ValueError, match=r"fork\(pristine=True\) needs LoRA adapters to leave out"):
        mixture().fork(pristine=True)
