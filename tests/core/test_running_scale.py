"""Rewards in units of their running spread within groups."""

import pytest
import torch

from diffalign.core import RunningScale, SingleProcess

GROUP = torch.tensor([0, 0, 1, 1])


def test_the_scale_is_the_running_spread_within_groups():
    scale = RunningScale(decay=0.5)
    first = torch.tensor([0.0, 2.0, 10.0, 10.0])  # variance within groups: 1, 0
    scale.observe({"a": first}, GROUP, SingleProcess())
    assert scale.scale("a") == pytest.approx(0.5**0.5)
    torch.testing.assert_close(scale({"a": first}, GROUP), first / 0.5**0.5)
    scale.observe({"a": 2 * first}, GROUP, SingleProcess())
    assert scale.scale("a") == pytest.approx(((0.25 * 0.5 + 0.5 * 2.0) / 0.75) ** 0.5)  # bias-corrected weights 1/3 and 2/3


def test_a_lone_failure_is_not_blown_up():
    """One failure among 27 gives a z-score of -5; here it stays one reward away from the others."""
    scale = RunningScale()
    scale.observe({"a": torch.tensor([0.0, 1.0] * 27)}, torch.arange(2).repeat_interleave(27), SingleProcess())
    scores = torch.ones(27)
    scores[0] = 0.0
    assert float(scale({"a": scores}, torch.zeros(27, dtype=torch.long)).diff().abs().max()) == pytest.approx(2.0, rel=0.01)


def test_a_constant_reward_contributes_nothing_but_a_constant_and_weights_choose():
    scale = RunningScale(weights={"a": 2.0})
    parts = {"a": torch.tensor([0.0, 2.0, 0.0, 2.0]), "b": torch.full((4,), 7.0)}
    scale.observe(parts, GROUP, SingleProcess())
    torch.testing.assert_close(scale(parts, GROUP), 2.0 * parts["a"])
    assert scale.scale("b") == 1e-4


def test_what_was_not_observed_has_no_scale():
    with pytest.raises(ValueError, match="has not observed the reward 'a'"):
        RunningScale()({"a": torch.zeros(4)}, GROUP)


def test_its_state_goes_through_a_checkpoint():
    one, other = RunningScale(), RunningScale()
    for values in torch.randn(3, 4, generator=torch.Generator().manual_seed(0)):
        one.observe({"a": values}, GROUP, SingleProcess())
    other.restore(one.state())
    one.observe({"a": torch.arange(4.0)}, GROUP, SingleProcess())
    other.observe({"a": torch.arange(4.0)}, GROUP, SingleProcess())
    assert one.scale("a") == other.scale("a")


def test_the_processes_of_a_run_share_one_scale():
    class Two(SingleProcess):
        def sum(self, values):
            return 2 * values

    one, other = RunningScale(), RunningScale()
    one.observe({"a": torch.arange(4.0)}, GROUP, SingleProcess())
    other.observe({"a": torch.arange(4.0)}, GROUP, Two())
    assert one.scale("a") == other.scale("a")


def test_the_loop_observes_every_step_once():
    from ring import ring_loop

    scale = RunningScale()
    loop = ring_loop()
    loop.aggregation = scale
    loop.run(3)
    weight = scale.state()["weights"][next(iter(scale.state()["weights"]))]
    assert weight == pytest.approx(1 - 0.95**3)


def test_a_prompt_that_a_reward_cannot_use_is_refused_before_the_policy_is_built():
    from diffalign.config import parse_text
    from diffalign.core import ConfigError

    run = parse_text(
        "policy: {class_path: GaussianMixturePolicy, init_args: {means: [[0.0, 0.0], [1.0, 1.0]], scale: 0.3}}\n"
        "objective: {class_path: SoftmaxTB}\nsampler: {class_path: TreeSampler}\n"
        "rewards: {class_path: OCR}\nprompts: {class_path: Prompts, init_args: {prompts: [a cat without a text]}}\n"
    )
    with pytest.raises(ConfigError, match="a cat without a text"):
        run.build()
