"""Metrics of a step: what an objective may report, and the share of the samples that a reward applies to."""

import json

import pytest
import torch
from loops import PROMPTS, Phased, build, same, square, weights
from meeting import Meeting

from diffalign.core import Cosine, Loss, NonFiniteError, Partial, Phase, Progress
from diffalign.core.report import Metrics
from diffalign.prompts import Mixture, Source
from diffalign.testing import TinyPolicy, channel_reward

ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def reporting(policy, **metrics):
    """An objective whose loss has these metrics."""

    def losses(batch, update):
        yield Loss(square(policy), metrics)

    return Phased(policy, Phase({"policy": policy}, losses))


def stepped(objective, **options):
    return build(objective, **options).step(PROMPTS.draw(0, 2), Progress(0, 1)).metrics


# --- names


@pytest.mark.parametrize("name", ["reward", "step", "elapsed", "reward/mine", "grad_norm/policy", "rows/policy/update", "mfu/update"])
def test_a_metric_of_the_loop_is_refused_of_an_objective(name):
    policy = TinyPolicy()
    before = weights(policy)
    with pytest.raises(
        ValueError, match=f"reporting.<locals>.losses yielded a loss with the metric '{name}', a name of the loop's"
    ) as said:
        stepped(reporting(policy, **{name: (99 * ONE, ONE)}))
    assert "To the loop belong step, elapsed, reward, " in str(said.value)
    assert f"such as 'mine/{name}'" in str(said.value)
    assert same(weights(policy), before)
    assert stepped(reporting(policy, **{f"mine/{name}": (99 * ONE, ONE)}))[f"mine/{name}"] == 99.0


class Watching:
    """A meter of one number."""

    def read(self, ledger, trained, size):
        return {"mfu/rollout": (1.0, 2.0)}


def half(images, prompts):
    return Partial(torch.ones(len(images)), torch.arange(len(images)) % 2 == 0)


def test_every_name_that_a_run_writes_is_one_of_the_loop(tmp_path):
    """An objective without metrics: all names of the record are refused, so that none can be overwritten."""
    sources = {"one": Source(["a red cube"]), "two": Source(["two blue stars"])}
    options = {"prompts": Mixture(sources), "rewards": {"half": half, "even": channel_reward}, "meter": Watching()}
    build(reporting(TinyPolicy()), lr_factor=Cosine(1.0, 0.5), **options).run(2, folder=tmp_path)
    names = {name for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert {"step", "lr_factor", "reward/half/one", "applies/half/one", "grad_norm/policy", "mfu/rollout"} <= names
    for name in names:
        with pytest.raises(ValueError, match="a name of the loop's own"):
            Metrics().take(Loss(ZERO, {name: (ZERO, ONE)}), "mine")


# --- numbers


@pytest.mark.parametrize(("total", "count"), [(float("nan"), 1), (float("inf"), 1), (0.0, float("nan"))])
def test_a_metric_that_is_not_finite_is_an_error(total, count):
    policy = TinyPolicy()
    before = weights(policy)
    bad = "inf" if total == float("inf") else "nan"
    place = r"^role 'policy', step 0: the metric 'mine' of reporting\.<locals>\.losses must be a finite \(sum, count\)"
    with pytest.raises(NonFiniteError, match=f"{place}, and one of them is {bad}. The velocities at") as said:
        stepped(reporting(policy, fine=(ONE, 1), mine=(total * ONE, count)))
    assert said.value.evidence is not None
    assert same(weights(policy), before)


def test_the_loss_is_named_before_its_metric():
    policy = TinyPolicy()

    def losses(batch, update):
        loss = square(policy) * float("nan")
        yield Loss(loss, {"mine": (loss.detach(), 1)})

    with pytest.raises(NonFiniteError, match="step 0: loss is nan"):
        stepped(Phased(policy, Phase({"policy": policy}, losses)))


def test_a_mean_over_nothing_is_zero():
    assert stepped(reporting(TinyPolicy(), mine=(ZERO, ZERO)))["mine"] == 0.0


# --- shares of the samples with a score


def blind(images, prompts):
    return Partial(torch.ones(len(images)), torch.zeros(len(images), dtype=torch.bool))


def test_the_share_that_a_reward_applies_to_is_told_where_it_is_below_one():
    metrics = stepped(reporting(TinyPolicy()), rewards={"half": half, "even": channel_reward, "blind": blind})
    assert {name: value for name, value in metrics.items() if name.startswith("applies/")} == {"applies/half": 0.5, "applies/blind": 0.0}


def test_the_share_is_told_of_each_source():
    sources = {"one": Source(["a red cube"], rewards=["half", "even"]), "two": Source(["two blue stars"], rewards=["even"])}
    loop = build(reporting(TinyPolicy()), prompts=Mixture(sources), rewards={"half": half, "even": channel_reward})
    metrics = loop.step(loop.prompts.draw(0, 2), Progress(0, 1)).metrics
    assert {name: value for name, value in metrics.items() if name.startswith("applies/")} == {"applies/half/one": 0.5}


def test_the_share_is_that_of_all_processes():
    """One process has a score for every sample, and another for half of its own: 3 of 4."""

    def shared(devices):
        metrics = Metrics()
        scores = [torch.ones(2), Partial(torch.ones(2), torch.tensor([True, False]))]
        metrics._cover("applies/mine", scores[devices.rank], 2)
        metrics._cover("applies/every", torch.ones(2), 2)
        return metrics.means(devices)

    for found in Meeting().run(shared).values():
        assert found["applies/mine"] == 0.75
        assert "applies/every" not in found
