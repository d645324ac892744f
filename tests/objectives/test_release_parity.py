"""The losses of the TMPO release, by the public parts: the rows of its recorded inputs and outputs that are right."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import (
    ROOT,
    Condition,
    Edges,
    FlowSDE,
    Gaussian,
    Linear,
    Progress,
    ScoredBatch,
    StandardizedParts,
    Streams,
    TrajectoryBatch,
)
from diffalign.objectives import RatioNorm, SoftmaxTB
from diffalign.objectives.paths import Paths
from diffalign.objectives.ratio import shift_numbers
from diffalign.objectives.terms import reference_constraint
from diffalign.testing import TinyPolicy


def chains(means: torch.Tensor) -> TrajectoryBatch:
    """K chains of S stochastic steps whose old means are `means` [S, K, *]; node s * K + k is chain k at level s."""
    steps, count = means.shape[:2]
    levels = torch.arange(steps + 1).repeat_interleave(count)
    return TrajectoryBatch(
        condition=Condition((Prompt("a red cube"),), torch.tensor([0]), {}),
        sigmas=torch.linspace(1, 0, steps + 1),
        latents=torch.zeros(len(levels), *means.shape[2:]),
        level=levels,
        parent=torch.cat([torch.full((count,), ROOT), torch.arange(steps * count)]),
        prompt=torch.zeros(len(levels), dtype=torch.long),
        noise_level=(levels > 0).float(),
        log_prob=torch.zeros(len(levels), dtype=torch.float64),
        mean=means.flatten(0, 1),
    )


def paths_of(row) -> Paths:
    steps, count = row["num_sde_steps"], len(row["rewards"])
    split = [row["current_log_probs"]] if row["step_log_probs"] is None else row["step_log_probs"]
    before = [row["old_log_probs"]] if row["old_step_log_probs"] is None else row["old_step_log_probs"]
    if row["step_means"] is None:  # as the release: without step data its weights are 1
        now = old_means = torch.zeros(steps, count, 1)
    else:
        now, old_means = torch.tensor(row["step_means"]), torch.tensor(row["old_step_means"])
    forest = chains(old_means)
    std = torch.tensor(row["std_dev_ts"]) * torch.tensor(row["sqrt_dts"])
    log_prob = torch.tensor(split, dtype=torch.float64).flatten().requires_grad_()
    edges = Edges.of(forest)
    return Paths(
        batch=ScoredBatch(forest, torch.tensor(row["rewards"]), {}, 1, Progress(0, 1), Streams(0)),
        edges=edges,
        log_prob=log_prob,
        old=torch.tensor(before, dtype=torch.float64).flatten(),
        nats=torch.ones(len(log_prob), dtype=torch.float64),
        reference=torch.tensor(row["ref_log_probs"], dtype=torch.float64).repeat(steps) / steps,
        numbers=shift_numbers(forest, edges, Gaussian(now.flatten(0, 1), std.repeat_interleave(count), "mean")),
    )


@pytest.mark.parametrize("index", range(4))
def test_the_loss_and_its_gradient_agree_with_the_release(golden, index):
    row = golden["tmpo_loss"][index]
    paths = paths_of(row)
    policy = TinyPolicy((2, 2), kernel=FlowSDE("mean", sigma_max=0.9))
    objective = SoftmaxTB.release_compatible(policy, beta=row["beta"], clip=row["clip_range"], reference_weight=row["lambda_ref"])
    if row["step_means"] is None:  # the recorded weights are 1 because the release had no step data
        objective.ratio_norm = None
    objective._replay = lambda batch, update, rows, loss_of: iter([loss_of(paths)])
    (phase,) = objective.phases()
    (loss,) = phase.losses(paths.batch, 0)
    (gradient,) = torch.autograd.grad(loss.value, paths.log_prob)
    expected = torch.tensor(row["grad_current_log_probs"], dtype=torch.float64).repeat(row["num_sde_steps"])
    assert float(loss.value.detach()) == pytest.approx(row["loss"], rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=2e-7)
    metrics = {name: float(total.detach() / count) for name, (total, count) in loss.metrics.items()}
    assert metrics["softmax_tb"] == pytest.approx(row["metrics"]["loss_soft_tb"], rel=1e-6)
    if row["lambda_ref"]:
        assert metrics["reference_constraint"] == pytest.approx(row["metrics"]["loss_ref"], rel=1e-5)


def test_the_reference_constraint_agrees_with_the_release(golden):
    for row in golden["reference"]:
        current = torch.tensor(row["current_log_probs"], dtype=torch.float64, requires_grad=True)
        steps = torch.full_like(current, row["num_sde_steps"]).detach()
        loss = reference_constraint(current, torch.tensor(row["ref_log_probs"], dtype=torch.float64), steps).mean()
        (gradient,) = torch.autograd.grad(loss, current)
        assert float(loss.detach()) == pytest.approx(row["loss"], rel=1e-6)
        torch.testing.assert_close(gradient, torch.tensor(row["grad"], dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_ratio_norm_agrees_with_the_release_where_its_bias_has_the_units_of_the_log_density(golden):
    """Its bias, <(mu - mu_old)^2> / 2 n^2, is right for "mean"; with the "squared" ones of its CPS kernel it over-corrects."""
    compared = 0
    for row in golden["ratio_norm"]:
        noisy = [step for step, (scale, root) in enumerate(zip(row["std_dev_ts"], row["sqrt_dts"], strict=True)) if scale * root > 0]
        if not noisy:  # our forests have no stochastic edge without noise
            assert set(row["weights"]) == {1.0}
            continue
        now, old, mean, old_mean = (
            torch.tensor(row[key], dtype=torch.float64)[noisy]
            for key in ("current_step_log_probs", "old_step_log_probs", "current_step_means", "old_step_means")
        )
        std = torch.tensor([row["std_dev_ts"][step] * row["sqrt_dts"][step] for step in noisy], dtype=torch.float64)
        steps, count = now.shape
        transition = Gaussian(mean.flatten(0, 1), std.repeat_interleave(count), "mean")
        weights = RatioNorm(row["clip_range"]).weights(
            (now - old).flatten(), old_mean.flatten(0, 1), transition, lambda values, shape=(steps, count): values.view(shape).mean(dim=0)
        )
        torch.testing.assert_close(weights, torch.tensor(row["weights"], dtype=torch.float64), rtol=1e-6, atol=0)
        compared += 1
    assert compared == 3


def test_release_settings_are_those_of_the_shipped_configuration():
    objective = SoftmaxTB.release_compatible(TinyPolicy((2, 2), kernel=FlowSDE("mean", sigma_max=0.9)))
    assert (objective.measure, objective.center, objective.clip, objective.reference) == ("path", "none", 0.2, None)
    assert objective.beta == Linear(0.8, 2.0, 150)
    assert (objective.ratio.centered, objective.ratio.limit, objective.ratio_norm) == (True, 10.0, RatioNorm(0.2))
    assert StandardizedParts().floor == 1e-4
