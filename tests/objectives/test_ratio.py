"""Importance ratios: unbiased under the old policy in every log-density convention, and bounded."""

import pytest
import torch
from tiny import assert_same, batch_of, gradient

from diffalign.core import CPS, FlowSDE, Gaussian
from diffalign.objectives import Ratio, RatioNorm, SoftmaxTB
from diffalign.testing import TinyPolicy


def step(kernel, velocity):
    """One step of 200,000 rows of 4 dimensions."""
    latents = torch.full((len(velocity), 4), 0.3, dtype=torch.float64)
    columns = [torch.full((len(velocity),), value, dtype=torch.float64) for value in (0.6, 0.4, 0.7)]
    return kernel.step(latents, velocity, *columns)


@pytest.mark.parametrize("kernel", [kernel(density) for kernel in (CPS, FlowSDE) for density in ("squared", "mean", "sum")], ids=repr)
def test_under_the_old_policy_the_normalised_log_ratio_has_mean_zero_and_one_scale(kernel):
    count = 200_000
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = step(kernel, torch.zeros(count, 4, dtype=torch.float64)), step(kernel, torch.full((count, 4), 0.4, dtype=torch.float64))
    sample = old.sample(noise)
    log_ratio = new.log_prob(sample) - old.log_prob(sample)
    assert abs(float(log_ratio.mean())) > 10 * float(log_ratio.std()) / count**0.5  # without the correction it is biased
    values = RatioNorm().normalized(log_ratio, old.mean, new)
    assert abs(float(values.mean())) < 5 * float(values.std()) / count**0.5
    torch.testing.assert_close(values, (noise * (new.mean - old.mean)).mean(dim=1), rtol=1e-6, atol=1e-9)  # whatever the convention


def test_weights_are_one_on_policy_and_stay_in_their_interval():
    mean = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = Gaussian(mean, torch.full((6,), 0.1, dtype=torch.float64), "mean")
    path_mean = lambda values: values.view(2, 3).mean(dim=0)  # noqa: E731
    assert torch.equal(RatioNorm().weights(torch.zeros(6), mean, same, path_mean), torch.ones(3, dtype=torch.float64))
    far = RatioNorm(0.1).weights(torch.tensor([9.0, -9.0, 0.0] * 2), mean, same, path_mean)
    torch.testing.assert_close(far, torch.tensor([1.1, 0.9, 1.0], dtype=torch.float64))


def test_a_ratio_is_what_its_options_say():
    log_ratio = torch.tensor([1.0, 3.0, -2.0, 40.0], dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 0, 1, 1])
    assert Ratio()(log_ratio, group, "mean", 10) is log_ratio
    assert Ratio(per_dimension=True)(log_ratio, group, "mean", 10) is log_ratio
    torch.testing.assert_close(Ratio(per_dimension=True)(log_ratio, group, "sum", 10), log_ratio / 10)
    centred = Ratio(centered=True, limit=10.0)(log_ratio, group, "mean", 10)
    torch.testing.assert_close(centred, torch.tensor([-1.0, 1.0, -10.0, 10.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(centred.sum(), log_ratio)
    assert gradient.tolist() == [1, 1, 0, 0]  # the mean has no gradient, the limit cuts it


def test_the_weights_multiply_the_surrogate():
    policy = TinyPolicy((2, 2), kernel=FlowSDE("mean"), dtype=torch.float64)
    reference = policy.fork()
    batch = batch_of(policy)
    plain, weighted = SoftmaxTB(policy, reference, updates=2), SoftmaxTB(policy, reference, updates=2, ratio_norm=RatioNorm(0.2))
    assert_same(gradient(weighted, batch, 0), gradient(plain, batch, 0))  # all ratios are 1
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.3
    one, other = gradient(weighted, batch, 1), gradient(plain, batch, 1)
    assert float((one - other).norm()) > 1e-3 * float(other.norm())
    split = SoftmaxTB(policy, reference, updates=2, ratio_norm=RatioNorm(0.2), rows=2)
    split._replay._known = weighted._replay._known
    assert_same(gradient(split, batch, 1), one)
