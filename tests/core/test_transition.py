"""Kernels against closed forms: Gaussian data, where velocity, mean and variance are known, and the release's numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from diffalign.core import CPS, Euler, FlowSDE, Gaussian, TransitionKernel

STEPS = st.tuples(st.floats(0.05, 0.95), st.floats(0.0, 0.95)).map(lambda pair: (pair[0], pair[0] * pair[1]))
ETAS = st.floats(0.05, 1.0)
NOISY = [CPS(), FlowSDE()]
DENSITIES = ["squared", "mean", "sum"]


def tensors(*numbers):
    return [torch.tensor([number], dtype=torch.float64) for number in numbers]


def step(kernel, latents, velocity, sigma, sigma_next, eta):
    """One row."""
    one = kernel.step(latents[None], velocity[None], *tensors(sigma, sigma_next, eta))
    return one.mean[0], one.std[0]


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class GaussianData:
    """x_0 ~ N(m, c^2): the marginal at sigma is N((1 - sigma) m, V), and the velocity is linear in x."""

    def __init__(self, m, c):
        self.m, self.c = m, c

    def variance(self, sigma):
        return (1 - sigma) ** 2 * self.c**2 + sigma**2

    def slope(self, sigma):
        """d v / d x = (sigma - (1 - sigma) c^2) / V."""
        return (sigma - (1 - sigma) * self.c**2) / self.variance(sigma)

    def velocity(self, x, sigma):
        return -self.m + self.slope(sigma) * (x - (1 - sigma) * self.m)

    def moved(self, kernel, sigma, sigma_next, eta):
        """Mean and variance after one step from the exact marginal: both follow from two points, for everything is linear."""
        x = torch.tensor([(1 - sigma) * self.m, (1 - sigma) * self.m + 1], dtype=torch.float64)
        mean, std = step(kernel, x, self.velocity(x, sigma), sigma, sigma_next, eta)
        return float(mean[0]), float((mean[1] - mean[0]) ** 2 * self.variance(sigma) + std**2)


@pytest.mark.parametrize("density", DENSITIES)
def test_log_prob_is_the_density_of_torch_under_its_convention(density):
    mean, value, std = random((4, 2, 3)), random((4, 2, 3), 1), torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    got = Gaussian(mean, std, density).log_prob(value)
    total = Normal(mean, std[:, None, None]).log_prob(value).sum(dim=(1, 2))
    expected = {"sum": total, "mean": total / 6, "squared": -(value - mean).square().mean(dim=(1, 2))}[density]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert got.dtype == torch.float64


def test_log_prob_of_float32_latents_is_summed_in_float64():
    value, mean = random((2, 65_536)).float(), random((2, 65_536), 1).float()
    got = Gaussian(mean, torch.tensor([0.5, 0.5]), "squared").log_prob(value)
    expected = -(value - mean).square().double().sum(dim=1) / 65_536
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)  # a float32 sum is off by 1e-7


@pytest.mark.parametrize("density", DENSITIES)
def test_gradients_of_log_prob_are_exact(density):
    mean, value = random((3, 2)).requires_grad_(), random((3, 2), 1)
    std = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda mean: Gaussian(mean, std, density).log_prob(value), mean)


def test_samples_are_the_mean_plus_scaled_noise():
    gaussian = Gaussian(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 0.5]), "sum")
    assert gaussian.sample(torch.tensor([[9.0, 9.0], [2.0, -2.0]])).tolist() == [[1.0, 2.0], [4.0, 3.0]]


def test_a_kernel_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        TransitionKernel()


@given(STEPS)
def test_euler_follows_the_velocity_without_noise(sigmas):
    sigma, sigma_next = sigmas
    x, v = random((2, 3)), random((2, 3), 1)
    mean, std = step(Euler(), x, v, sigma, sigma_next, 0.0)
    torch.testing.assert_close(mean, x + (sigma_next - sigma) * v, rtol=1e-12, atol=1e-12)
    assert std == 0


def test_euler_refuses_noise():
    with pytest.raises(ValueError, match=r"every eta must be 0; got 0.7. Use CPS or FlowSDE"):
        Euler().step(torch.zeros(2, 1), torch.zeros(2, 1), *(torch.tensor([a, b]) for a, b in [(1.0, 1.0), (0.5, 0.5), (0.0, 0.7)]))


@pytest.mark.parametrize("kernel", [*NOISY, FlowSDE(sigma_max=0.9)])
@given(sigmas=STEPS)
def test_without_noise_every_kernel_is_euler(kernel, sigmas):
    x, v = random((2, 3)), random((2, 3), 1)
    mean, std = step(kernel, x, v, *sigmas, 0.0)
    expected, _ = step(Euler(), x, v, *sigmas, 0.0)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    assert std == 0


@given(STEPS, ETAS)
def test_cps_mixes_the_predicted_data_and_the_predicted_noise(sigmas, eta):
    sigma, sigma_next = sigmas
    x, v = random((2, 3)), random((2, 3), 1)
    mean, std = step(CPS(), x, v, sigma, sigma_next, eta)
    fresh = sigma_next * math.sin(math.pi * eta / 2)
    expected = (1 - sigma_next) * (x - sigma * v) + math.sqrt(max(sigma_next**2 - fresh**2, 0)) * (x + (1 - sigma) * v)
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-8)  # the root loses digits where it cancels
    torch.testing.assert_close(std, torch.tensor(fresh, dtype=torch.float64))


@given(st.floats(0.05, 1.0), ETAS)
def test_the_last_cps_step_returns_the_predicted_data(sigma, eta):
    x, v = random((2, 3)), random((2, 3), 1)
    mean, std = step(CPS(), x, v, sigma, 0.0, eta)
    torch.testing.assert_close(mean, x - sigma * v)
    assert std == 0


@given(STEPS, ETAS)
def test_flow_sde_is_the_euler_maruyama_step_of_its_equation(sigmas, eta):
    sigma, sigma_next = sigmas
    x, v = random((2, 3)), random((2, 3), 1)
    mean, std = step(FlowSDE(), x, v, sigma, sigma_next, eta)
    diffusion = eta**2 * sigma / (1 - sigma)
    score = -(x + (1 - sigma) * v) / sigma  # minus the predicted noise over sigma
    expected = x + (v - diffusion / 2 * score) * (sigma_next - sigma)
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(std, torch.tensor(math.sqrt(diffusion * (sigma - sigma_next)), dtype=torch.float64))


def test_flow_sde_refuses_its_singular_step_and_only_that():
    x = torch.ones(2, 1)
    sigma, sigma_next = torch.tensor([1.0, 0.8]), torch.tensor([0.8, 0.6])
    with pytest.raises(ValueError, match=r"singular at sigma = 1.*FlowSDE\(sigma_max=...\)"):
        FlowSDE().step(x, x, sigma, sigma_next, torch.tensor([0.7, 0.0]))
    allowed = FlowSDE().step(x, x, sigma, sigma_next, torch.tensor([0.0, 0.7]))
    assert allowed.mean.isfinite().all()
    assert (allowed.std > 0).tolist() == [False, True]


def test_sigma_max_stands_for_larger_sigmas_in_the_noise_alone():
    x, v = random((2,)), random((2,), 1)
    capped_mean, capped_std = step(FlowSDE(sigma_max=0.9), x, v, 1.0, 0.9, 0.7)
    noise = 0.7 * math.sqrt(0.9 / 0.1)
    torch.testing.assert_close(capped_std, torch.tensor(noise * math.sqrt(0.1), dtype=torch.float64))
    torch.testing.assert_close(capped_mean, x * (1 - noise**2 * 0.1 / 2) - 0.1 * v)  # drift noise^2 / (2 sigma) with the true sigma 1
    below = step(FlowSDE(sigma_max=0.9), x, v, 0.8, 0.7, 0.7)
    for got, expected in zip(below, step(FlowSDE(), x, v, 0.8, 0.7, 0.7), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5])
def test_sigma_max_lies_between_0_and_1(bad):
    with pytest.raises(ValueError, match="sigma_max"):
        FlowSDE(sigma_max=bad)


@pytest.mark.parametrize("kernel", NOISY)
@given(sigmas=STEPS, eta=ETAS, m=st.floats(-3, 3), c=st.floats(0.0, 2.0))
def test_kernels_preserve_the_mean_of_gaussian_data_exactly(kernel, sigmas, eta, m, c):
    mean, _ = GaussianData(m, c).moved(kernel, *sigmas, eta)
    assert mean == pytest.approx((1 - sigmas[1]) * m, rel=1e-10, abs=1e-10)


@given(sigmas=STEPS, eta=ETAS)
def test_cps_preserves_the_variance_of_point_data_exactly(sigmas, eta):
    _, variance = GaussianData(1.5, 0.0).moved(CPS(), *sigmas, eta)
    assert variance == pytest.approx(sigmas[1] ** 2, rel=1e-9, abs=1e-12)


@given(sigmas=STEPS, eta=st.floats(0.3, 1.0), c=st.floats(0.5, 2.0))
def test_cps_loses_variance_of_spread_data(sigmas, eta, c):
    sigma, sigma_next = sigmas
    sigma_next = max(sigma_next, 0.3 * sigma)  # near 0 no noise is exchanged, and the loss of the kernel itself vanishes
    data = GaussianData(0.0, c)
    _, noisy = data.moved(CPS(), sigma, sigma_next, eta)
    _, flow = data.moved(CPS(), sigma, sigma_next, 0.0)
    assert noisy != pytest.approx(flow, rel=1e-6)


@given(sigma=st.floats(0.1, 0.9), eta=ETAS, c=st.floats(0.0, 2.0))
def test_cps_in_place_has_the_variance_error_of_the_closed_form(sigma, eta, c):
    data = GaussianData(0.7, c)
    _, variance = data.moved(CPS(), sigma, sigma, eta)
    a, b = (1 - sigma) ** 2 * c**2, sigma**2
    error = -a * b * (1 - math.cos(math.pi * eta / 2)) ** 2 / (a + b)
    assert variance - data.variance(sigma) == pytest.approx(error, rel=1e-6, abs=1e-12)


def sde_error(sigma, eta, c):
    """(a^2 V - (c^2 + 1)), the variance error of one FlowSDE step over its squared length."""
    noise = eta**2 * sigma / (1 - sigma)
    data = GaussianData(0.0, c)
    a = noise / (2 * sigma) + (1 + noise * (1 - sigma) / (2 * sigma)) * data.slope(sigma)
    return a**2 * data.variance(sigma) - (c**2 + 1)


@given(sigmas=STEPS, eta=ETAS, c=st.floats(0.0, 2.0))
def test_flow_sde_has_a_variance_error_of_second_order_in_the_step(sigmas, eta, c):
    sigma, sigma_next = sigmas
    data = GaussianData(0.7, c)
    _, variance = data.moved(FlowSDE(), sigma, sigma_next, eta)
    error = sde_error(sigma, eta, c) * (sigma_next - sigma) ** 2
    assert variance - data.variance(sigma_next) == pytest.approx(error, rel=1e-8, abs=1e-10)


def test_the_variance_error_of_flow_sde_in_numbers():
    assert sde_error(0.6, 0.7, 0.5) == pytest.approx(0.6314, abs=5e-5)
    assert sde_error(0.6, 0.7, 1.0) == pytest.approx(-1.3807, abs=5e-5)


@pytest.mark.parametrize("kernel", [CPS("squared"), FlowSDE("squared"), CPS("sum"), FlowSDE("sum"), CPS("mean")])
def test_log_prob_at_a_sample_is_that_of_its_noise(kernel):
    noise = random((5, 3), 2)
    columns = [torch.full((5,), number, dtype=torch.float64) for number in (0.8, 0.6, 0.7)]
    gaussian = kernel.step(random((5, 3)), random((5, 3), 1), *columns)
    log_prob, std = gaussian.log_prob(gaussian.sample(noise)), gaussian.std
    if kernel.density == "squared":
        expected = -std.square() * noise.square().mean(dim=1)
    else:
        expected = Normal(0.0, 1.0).log_prob(noise).sum(dim=1) - 3 * std.log()
        expected = expected / 3 if kernel.density == "mean" else expected
    torch.testing.assert_close(log_prob, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", [Euler(), *NOISY])
def test_gradients_of_the_mean_are_exact(kernel):
    eta = 0.0 if isinstance(kernel, Euler) else 0.7
    latents, velocity = random((2, 2)).requires_grad_(), random((2, 2), 1).requires_grad_()
    columns = [torch.full((2,), number, dtype=torch.float64) for number in (0.8, 0.6, eta)]
    assert torch.autograd.gradcheck(lambda x, v: kernel.step(x, v, *columns).mean, (latents, velocity))


@pytest.mark.parametrize("kernel", NOISY)
def test_rows_do_not_see_each_other(kernel):
    x, v = random((3, 2)), random((3, 2), 1)
    sigma, sigma_next, eta = (torch.tensor(row, dtype=torch.float64) for row in ([0.9, 0.5, 0.3], [0.7, 0.4, 0.1], [0.7, 0.0, 1.0]))
    together = kernel.step(x, v, sigma, sigma_next, eta)
    for row in range(3):
        mean, std = step(kernel, x[row], v[row], float(sigma[row]), float(sigma_next[row]), float(eta[row]))
        assert torch.equal(together.mean[row], mean)
        assert torch.equal(together.std[row], std)


KERNELS = {"cps": CPS("squared"), "sde": FlowSDE("mean"), "deterministic": Euler()}


def test_steps_agree_with_the_release(golden):
    for row in golden["flow_sde_step"]:
        latents, velocity, mean, sample = (torch.tensor(row[key]) for key in ("latents", "model_output", "mean", "prev_sample"))
        columns = [torch.full((len(latents),), row[key] or 0.0) for key in ("sigma", "sigma_next", "eta")]
        got = KERNELS[row["sde_type"]].step(latents, velocity, *columns)
        torch.testing.assert_close(got.mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.std, torch.full((len(latents),), row["std"]), rtol=1e-6, atol=0)
        if row["noise"] is not None:
            torch.testing.assert_close(got.sample(torch.tensor(row["noise"])), sample, rtol=1e-6, atol=1e-6)
            log_prob = torch.tensor(row["log_prob"], dtype=torch.float64)
            torch.testing.assert_close(got.log_prob(sample), log_prob, rtol=1e-6, atol=1e-6)


LIMITED = FlowSDE("mean", std_floor=0.01, deviation_limit=10.0)
"""With the release's clamps, which ours has off by default."""


def test_replayed_log_probs_and_their_gradients_agree_with_the_release(golden):
    left_out = []
    for row in golden["recompute_log_prob"]:
        if row["sigma_next"] == row["sigma"] or (row["sde_type"] == "cps" and row["sigma_next"] == 0):
            left_out.append((row["sde_type"], row["sigma"], row["sigma_next"]))
            continue
        latents, out, mean, gradient = (torch.tensor(row[key]) for key in ("latent_in", "latent_out", "mean", "grad_model_output"))
        velocity = torch.tensor(row["model_output"]).requires_grad_()
        columns = [torch.full((len(latents),), row[key]) for key in ("sigma", "sigma_next", "eta")]
        kernel = LIMITED if row["sde_type"] == "sde" else KERNELS[row["sde_type"]]
        got = kernel.step(latents, velocity, *columns)
        torch.testing.assert_close(got.mean.detach(), mean, rtol=1e-6, atol=1e-6)
        log_prob = got.log_prob(out)
        torch.testing.assert_close(log_prob, torch.tensor(row["log_prob"], dtype=torch.float64), rtol=1e-6, atol=1e-6)
        log_prob.sum().backward()
        # float32 cancels in out - mean: one ulp of the latents is this share of a deviation of one std
        cancelled = 1.2e-7 * float(out.abs().max()) / max(float(got.std.min()), 0.01)
        torch.testing.assert_close(velocity.grad, gradient, rtol=1e-5, atol=(1e-6 + cancelled) * float(gradient.abs().max()))
    # a step to the sigma it starts from is none, and a step to sigma 0 has no noise under CPS, so its log-density does not exist
    assert left_out == [("cps", 0.273, 0.0), ("cps", 0.75, 0.75), ("sde", 0.75, 0.75)]
