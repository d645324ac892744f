"""The numbers by which docs/migration.md takes other code's settings to ours."""

import re
from pathlib import Path

import pytest
import torch
from tiny_pipelines import saved

from diffalign import config
from diffalign.core import FlowSDE, ShiftedGrid
from diffalign.objectives.diffusion_nft import nft_loss
from diffalign.objectives.path_losses import gaussian_kl
from diffalign.policies import FlowMatchingPolicy

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
STEPS = 10


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """That of Stable Diffusion 3, shift 3."""
    policy = FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, "sd3"), resolution=32, device="cpu", max_sequence_length=24)
    assert policy.family.pipeline.scheduler.config.shift == 3.0
    return policy.sigmas(STEPS)


def divergences(grid, eta=0.7):
    """Of steps 1 to 8, off by 0.1 in velocity: by our kernel, (difference of means)^2 / (2 s^2) as flow_grpo has it, and |dt|."""
    sigma, after = grid[1 : STEPS - 1].double(), grid[2:STEPS].double()
    latents, off = torch.zeros(len(sigma), 4, dtype=torch.float64), torch.full((len(sigma), 4), 0.1, dtype=torch.float64)
    level = torch.full_like(sigma, eta)
    kernel = FlowSDE(density="mean")
    policy, reference = (kernel.step(latents, velocity, sigma, after, level) for velocity in (off, 0 * off))
    rate = eta * (sigma / (1 - sigma)).sqrt()
    return gaussian_kl(policy, reference), (policy.mean - reference.mean).square().mean(dim=1) / (2 * rate.square()), sigma - after


def test_the_kl_of_flow_grpo_is_weaker_by_the_length_of_a_step(grid):
    ours, theirs, length = divergences(grid)
    torch.testing.assert_close(ours / theirs, 1 / length, rtol=1e-9, atol=0)
    other, weaker, _ = divergences(ShiftedGrid(3.0)(STEPS))
    for ratio, sentence in (
        (ours / theirs, r"(\d+), (\d+) and (\d+) times at steps 1, 4 and 8\s+of 10 on the grid of Stable Diffusion 3"),
        (other / weaker, r"\((\d+), (\d+) and (\d+) times on `ShiftedGrid\(3.0\)`\)"),
    ):
        written = re.search(sentence, PAGE)
        assert written
        assert [round(float(ratio[step - 1])) for step in (1, 4, 8)] == [int(number) for number in written.groups()]


def test_the_number_to_write_instead_gives_the_same_sum(grid):
    written = re.search(r"`train.beta` / ([\d.]+) \(([\d.]+)\)", PAGE)
    assert written
    for levels, number in zip((grid, ShiftedGrid(3.0)(STEPS)), written.groups(), strict=True):
        ours, theirs, _ = divergences(levels)
        assert float(ours.sum() / theirs.sum()) == pytest.approx(float(number), abs=0.05)
    block = next(text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "FlowGRPO" in text)
    run = config.parse_text(block, "grpo").tree
    assert run["objective"].arguments["kl"] == pytest.approx(0.04 / float(written[1]), rel=0.02)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_loss_of_diffusion_nft_is_ours_times_a_constant(beta):
    clip_max, weight = 5.0, 1e-4
    kl, norm = re.search(rf"(\S+) and (?:`max_grad_norm` )?(\S+) for `beta`\s{beta:g}\b", PAGE).groups()
    assert (float(kl), float(norm)) == (pytest.approx(weight * beta / clip_max), pytest.approx(beta / clip_max))
    generator = torch.Generator().manual_seed(0)
    clean, noise, velocity, old, reference = torch.randn(5, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma, optimality = torch.linspace(0.1, 1, 6, dtype=torch.float64), torch.rand(6, generator=generator, dtype=torch.float64)
    t = sigma[:, None, None, None]
    noised = (1 - t) * clean + t * noise

    def distance(prediction):
        gap = noised - t * prediction - clean
        return (gap.square() / gap.abs().mean(dim=(1, 2, 3), keepdim=True)).mean(dim=(1, 2, 3))

    positive = distance((1 - beta) * old + beta * velocity)
    negative = distance((1 + beta) * old - beta * velocity)
    penalty = (velocity - reference).square().mean(dim=(1, 2, 3))
    released = clip_max * (optimality * positive + (1 - optimality) * negative) / beta + weight * penalty
    ours = nft_loss(velocity, old, noise - clean, sigma, optimality, beta, adaptive=True) + float(kl) * penalty
    torch.testing.assert_close(released, clip_max / beta * ours, rtol=1e-10, atol=0)
