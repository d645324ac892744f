"""Guidance in the few-step objectives: the rule and the null of the policy's own family, and what a guided teacher is."""

import pytest
import torch
from few_step_cases import GRID, PROMPTS, assert_same_gradients, batch_of, flat, gradients, moved
from tiny_pipelines import saved

from diffalign import Prompt
from diffalign.core import Guided
from diffalign.objectives import SurrogateReward, TrajectoryDistributionMatching
from diffalign.objectives.few_step import (
    FixedTime,
    FrozenTeacher,
    InOrder,
    MovingReference,
    ShareMix,
    Snapshot,
    Squared,
    Unnormalized,
    WeightedMix,
)
from diffalign.objectives.few_step.matching import Predictor
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.testing import TinyPolicy

NULLS: list[str] = []


class Zeroed(TinyPolicy):
    """SDXL's way: a negative text is no prompt."""

    def encode_negative(self, text):
        NULLS.append(text)
        condition = self.encode([Prompt(text)])
        condition.tensors["embedding"].zero_()
        return condition


class Additive(Zeroed):
    """Z-Image's rule."""

    no_guidance = 0.0

    def guide(self, positive, negative, scale):
        return positive + scale * (positive - negative)


KINDS = pytest.mark.parametrize("kind", [TinyPolicy, Zeroed, Additive])
OBJECTIVES = pytest.mark.parametrize("objective", [TrajectoryDistributionMatching, SurrogateReward])


def student_of(kind):
    return moved(TDMPolicy(kind((2, 2), dtype=torch.float64, delta=0.0), grid=lambda steps: torch.tensor(GRID, dtype=torch.float64)))


def asked(policy, count=3):
    generator = torch.Generator().manual_seed(0)
    dtype = policy.sigmas(4).dtype
    latents = torch.randn(count, *policy.latent_shape, generator=generator).to(dtype)
    return latents, torch.linspace(0.9, 0.4, count, dtype=dtype), policy.encode(PROMPTS[:count])


def assert_guided_alike(policy, scale, negative):
    noised, tau, condition = asked(policy)
    tau_wide = tau.view(-1, *(1,) * (noised.ndim - 1))
    with torch.no_grad():
        plain, guided = Predictor(policy, scale, negative)(noised, tau, condition)
        assert torch.equal(plain, noised - tau_wide * policy.velocity(noised, tau, condition))
        assert torch.equal(guided, noised - tau_wide * Guided(policy, scale, negative).velocity(noised, tau, condition))
    assert not torch.allclose(guided, plain)


@KINDS
@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_a_predictor_guides_as_a_guided_policy_does(kind, scale):
    assert_guided_alike(kind((2, 2), dtype=torch.float64), scale, "blurry")


@pytest.mark.parametrize("name", ["sd3", "sdxl", "sana", "z-image"])
def test_a_predictor_guides_as_the_family_does(name, tmp_path_factory):
    lora = LoRA(rank=2)
    policy = FlowMatchingPolicy.from_pretrained(
        saved(tmp_path_factory, name), lora=lora, resolution=32, device="cpu", max_sequence_length=None if name == "sdxl" else 24
    )
    assert_guided_alike(policy, 3.0, "")


@KINDS
def test_a_predictor_without_guidance_evaluates_no_row_for_it(kind):
    policy = kind((2, 2), dtype=torch.float64)
    before = policy.counter.rows
    for scale in (None, policy.no_guidance):
        plain, guided = Predictor(policy, scale)(*asked(policy))
        assert guided is plain
    assert policy.counter.rows - before == 6


def test_scale_1_is_guidance_where_the_rule_counts_from_the_positive():
    assert_guided_alike(Additive((2, 2), dtype=torch.float64), 1.0, "")


@OBJECTIVES
def test_the_scales_of_an_objective_are_the_policys_own(objective):
    for kind in (TinyPolicy, Additive):
        student = student_of(kind)
        assert objective(student).guidance == student.no_guidance
        assert objective(student, guidance=student.no_guidance).guidance == student.no_guidance
        names = ["guidance"] + ["reward_guidance"] * (objective is SurrogateReward)
        for name in names:
            for wrong in (student.no_guidance - 0.5, float("nan")):
                with pytest.raises(ValueError, match=rf"{objective.__name__}.{name} must be at least {student.no_guidance:g}, .*; got"):
                    objective(student, **{name: wrong})


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", [Zeroed, Additive])
def test_the_scale_of_distillation_is_a_guided_teacher(kind, scale):
    student = student_of(kind)
    batch = batch_of(student)
    plain = student.fork(pristine=True)
    fakes = [moved(student.fork(pristine=True, trainable=True), 0.1) for _ in range(2)]
    options = {"distance": Squared(), "fake_regularization": 0.1}
    by_scale = TrajectoryDistributionMatching(student, plain, fakes[0], guidance=scale, **options)
    by_teacher = TrajectoryDistributionMatching(student, Guided(plain, scale), fakes[1], **options)
    assert_same_gradients(gradients(by_scale, batch), gradients(by_teacher, batch))


def terms_of(objective, batch):
    """Metrics of the generator's losses, as means."""
    generator = next(phase for phase in objective.phases() if "generator" in phase.trains)
    sums: dict[str, float] = {}
    for loss in generator.losses(batch, 0):
        for name, (total, count) in loss.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(total) / float(count)
    return sums


@pytest.mark.parametrize(
    ("kind", "scale", "guided"), [(Zeroed, 1.0, False), (Zeroed, 2.0, True), (Additive, 0.0, False), (Additive, 1.0, True)]
)
def test_the_term_guidance_is_there_where_there_is_guidance(kind, scale, guided):
    student = student_of(kind)
    terms = terms_of(SurrogateReward(student, guidance=scale, plan=InOrder(), mix=ShareMix()), batch_of(student))
    assert ("generator/guidance" in terms) is guided
    assert not guided or terms["generator/guidance"] > 1e-3


def test_the_null_is_encoded_once_a_call_and_not_for_every_piece():
    student = student_of(Zeroed)
    batch = batch_of(student)
    for objective, nulls in (
        (TrajectoryDistributionMatching(student, guidance=2.0, negative="bad", rows=1), 1),
        (SurrogateReward(student, guidance=2.0, reward_guidance=2.0, negative="bad", rows=1, plan=InOrder()), 2),
    ):
        NULLS.clear()
        terms_of(objective, batch)
        assert ["bad"] * nulls == NULLS


RULES = pytest.mark.parametrize("rule", [FrozenTeacher(), MovingReference(), Snapshot()], ids=repr)


@RULES
def test_an_untouched_surrogate_pulls_nowhere_beside_a_guided_teacher(rule):
    student = student_of(TinyPolicy)
    objective = SurrogateReward(student, Guided(student.fork(pristine=True), 3.0), reference=rule, baseline=rule, plan=InOrder())
    batch = batch_of(student)
    phases = {next(iter(phase.trains)): phase for phase in objective.phases()}
    (surrogate,) = phases["surrogate"].losses(batch, 0)
    assert float(surrogate.metrics["surrogate/gap"][0]) == 0.0
    assert float(surrogate.metrics["surrogate/preference"][0]) == 0.0
    terms = terms_of(objective, batch)
    assert terms["generator/reward"] == 0.0
    assert terms["generator/kl"] > 1e-3  # the guided teacher is where the student is to go


def test_a_guided_teacher_moves_surrogate_and_fake_as_a_plain_one_does():
    student = student_of(TinyPolicy)
    batch = batch_of(student)
    plain = student.fork(pristine=True)
    options = {"surrogate_regularization": 0.5, "fake_regularization": 0.5, "runaway": 1e-4}
    found = []
    for teacher in (plain, Guided(plain, 3.0)):
        objective = SurrogateReward(student, teacher, **options)
        moved(objective.surrogate, -0.05)
        moved(objective.fake, 0.1)
        found.append(gradients(objective, batch))
    for role in ("surrogate", "fake"):
        assert_same_gradients({role: found[1][role]}, {role: found[0][role]}, tolerance=0)
    assert not torch.allclose(flat(found[1]["generator"]), flat(found[0]["generator"]))


def test_a_guided_teacher_is_kl_plus_guidance_of_a_plain_one():
    student = student_of(TinyPolicy)
    batch = batch_of(student)
    plain = student.fork(pristine=True)
    options = {"mix": WeightedMix(1.0, 1.0, 1.0), "times": FixedTime(0.95), "distance": Squared(), "normalizer": Unnormalized()}
    found = []
    for teacher, scale in ((plain, 3.0), (Guided(plain, 3.0), None)):
        objective = SurrogateReward(student, teacher, guidance=scale, **options)
        moved(objective.surrogate, -0.05)
        found.append(terms_of(objective, batch))
    assert found[0]["generator/reward"] == found[1]["generator/reward"] > 0
    # an untouched fake is the unguided teacher: without it, the pull of the guided one is the term "guidance"
    assert found[0]["generator/kl"] == 0
    assert found[1]["generator/kl"] == pytest.approx(found[0]["generator/guidance"], rel=1e-12)


def test_the_weights_inside_a_guided_teacher_are_kept_once():
    student = student_of(TinyPolicy)
    objective = SurrogateReward(student, Guided(student.fork(pristine=True), 3.0))
    assert set(objective.policies()) == {"generator", "fake", "surrogate", "old_surrogate", "teacher"}
