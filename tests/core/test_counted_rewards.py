"""Which samples count in the reward of a step: those to which a reward with a weight applies, and no others."""

import pytest
import torch
from loops import Phased, build, phase
from meeting import Meeting

from diffalign.core import Aggregation, Partial, Progress, Raw, RunningScale, StandardizedParts, StandardizedSum
from diffalign.evaluation.reactions import Tempered
from diffalign.objectives import FlowGRPO
from diffalign.prompts import Mixture, Prompts, Source
from diffalign.samplers import ChainSampler
from diffalign.testing import TinyPolicy

TEXTS = Prompts(["faces", "hands"], shuffle=False)
CHAINS = ChainSampler(4, samples=4)


def faces(images, prompts):
    return Partial(5 + 10 * images.mean((1, 2, 3)), torch.tensor([prompt == "faces" for prompt in prompts]))


def bright(images, prompts):
    return images.mean((1, 2, 3))


class Own(Aggregation):
    """An aggregation of a user's, which names no weights."""

    def __call__(self, parts, group):
        return Raw()(parts, group)


def step(objective, prompts=TEXTS, **options):
    loop = build(objective, prompts=prompts, sampler=CHAINS, **options)
    return loop.step(loop.prompts.draw(0, 2), Progress(0, 4))


def learned(rewards, aggregation):
    """The weights after a step whose advantages are divided by the deviation of the batch, and its report."""
    objective = FlowGRPO(TinyPolicy(), kl=0.0, deviation="batch")
    report = step(objective, rewards=rewards, aggregation=aggregation)
    return torch.cat([value.detach().flatten() for value in objective.policy.parameters()]), report


@pytest.mark.parametrize(
    "make",
    [
        Raw,
        lambda weights: RunningScale(weights),
        StandardizedParts,
        StandardizedSum,
        lambda weights: Tempered(Raw(weights), 0.5),
        lambda weights: type("Weighing", (Own,), {"weights": weights, "__call__": lambda _, *given: Raw(weights)(*given)})(),
    ],
    ids=["raw", "running", "parts", "sum", "tempered", "a user's"],
)
@pytest.mark.parametrize("weights", [{"faces": 1.0}, {"faces": 1.0, "bright": 0.0}], ids=["none", "zero"])
def test_a_reward_that_is_only_logged_changes_nothing(make, weights):
    alone, expected = learned({"faces": faces}, make({"faces": 1.0}))
    beside, report = learned({"faces": faces, "bright": bright}, make(weights))
    assert torch.equal(beside, alone)
    assert report.batch.deviation == expected.batch.deviation > 0
    assert torch.equal(report.batch.scored, expected.batch.scored)
    assert 0 < int(report.batch.scored.sum()) < len(report.batch.scored)
    logged = report.metrics["reward/bright"]
    assert logged == pytest.approx(float(report.batch.parts["bright"].mean()))
    names = ("reward", "reward/faces", "reward/group_std", "advantage/std")
    assert {name: report.metrics[name] for name in names} == {name: expected.metrics[name] for name in names}


@pytest.mark.parametrize(
    "aggregation", [Raw(), Own(), Raw({"bright": -1.0}), Raw({"faces": 0.0})], ids=["none", "a user's", "below 0", "zero"]
)
def test_where_no_weights_are_given_or_all_are_zero_every_sample_counts(aggregation):
    _, report = learned({"faces": faces, "bright": bright}, aggregation)
    assert report.batch.complete
    assert bool(report.batch.scored.all())
    weights = dict.fromkeys(report.batch.parts, 1.0) if aggregation.weights is None else aggregation.weights
    raw = Raw(weights)(report.batch.parts, report.batch.trajectories.group)
    assert report.metrics["reward"] == pytest.approx(float(raw.mean()), abs=1e-7)


def test_a_source_whose_rewards_are_only_logged_is_like_one_without_any():
    policy = TinyPolicy()
    mixture = Mixture({"seen": Source(["a"], 1, ["faces"]), "held": Source(["b"], 1, ["bright"])})
    rewards = {"faces": bright, "bright": bright}
    report = step(Phased(policy, phase(policy=policy)), mixture, rewards=rewards, aggregation=Raw({"faces": 1.0}))
    metrics = report.metrics
    assert metrics["reward"] == metrics["reward/faces"] == metrics["source/seen/reward"]
    assert metrics["reward/group_std"] == metrics["reward/group_std/seen"]
    assert not {"source/held/reward", "reward/group_std/held"} & metrics.keys()
    assert metrics["reward/bright/held"] == metrics["reward/bright"]
    loop = build(Phased(policy, phase(policy=policy)), sampler=CHAINS, prompts=mixture, rewards=rewards, aggregation=Raw({"faces": 1.0}))
    alone = loop.step([prompt for prompt in mixture.prompts if prompt.source == "held"], Progress(0, 4))
    assert (alone.batch.deviation, loop.reward) == (0.0, None)
    assert not {"reward", "reward/group_std"} & alone.metrics.keys()
    assert "reward/bright" in alone.metrics


# --- single pictures of a group -----------------------------------------------------------------------------------------------


def every_second(score):
    """A reward that applies to every second picture, and says so."""
    return lambda images, prompts: Partial(score(images), torch.arange(len(images)) % 2 == 0)


def test_a_constant_reward_of_every_second_picture_is_its_own_mean():
    policy = TinyPolicy()
    mixture = Mixture({"one": Source(["a"], 1), "two": Source(["b"], 1)})
    metrics = step(
        Phased(policy, phase(policy=policy)), mixture, rewards={"half": every_second(lambda images: torch.ones(len(images)))}
    ).metrics
    assert (metrics["reward"], metrics["reward/half"], metrics["source/one/reward"], metrics["source/two/reward"]) == (1.0, 1.0, 1.0, 1.0)
    assert metrics["reward/group_std"] == metrics["reward/group_std/one"] == 0.0


def test_the_mean_and_the_deviation_are_those_of_the_pictures_with_a_score():
    policy = TinyPolicy()
    mixture = Mixture({"one": Source(["a"], 1), "two": Source(["b"], 1)})
    scores = every_second(lambda images: images.mean((1, 2, 3)))
    report = step(Phased(policy, phase(policy=policy)), mixture, rewards={"half": scores})
    first, second = report.batch.parts.partial("half").values.view(2, 4)[:, ::2]
    assert not torch.equal(first, second)
    spreads = [float(values.std(unbiased=False)) for values in (first, second)]
    assert report.metrics["reward"] == pytest.approx(float(torch.cat([first, second]).mean()), rel=1e-6)
    assert report.metrics["source/two/reward"] == pytest.approx(float(second.mean()), rel=1e-6)
    assert report.metrics["reward/group_std/one"] == pytest.approx(spreads[0], rel=1e-5)
    assert report.metrics["reward/group_std"] == pytest.approx(sum(spreads) / 2, rel=1e-5)


def test_processes_count_their_own_samples_and_agree():
    """One of the two has a prompt that is scored, the other none."""
    options = {"rewards": {"faces": faces, "bright": bright}, "aggregation": Raw({"faces": 1.0})}

    def work(devices):
        policy = TinyPolicy()
        report = step(Phased(policy, phase(policy=policy)), devices=devices, **options)
        return {**report.metrics, "deviation": report.batch.deviation}

    policy = TinyPolicy()
    whole = step(Phased(policy, phase(policy=policy)), **options)
    assert whole.metrics["reward"] == pytest.approx(whole.metrics["reward/faces"], rel=1e-6)
    found = Meeting().run(work)
    for name in ("reward", "reward/faces", "reward/bright", "reward/group_std"):
        assert found[0][name] == found[1][name] == pytest.approx(whole.metrics[name], rel=1e-5)
    assert found[0]["deviation"] == found[1]["deviation"] == pytest.approx(whole.batch.deviation, rel=1e-5)
