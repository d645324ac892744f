"""Memory of an update by its rows: what is said of many rows is what they take, and gradients are counted once."""

import itertools
import re

import pytest
import torch
from test_planner import line
from tiny_pipelines import saved

from diffalign.core import AlignmentLoop
from diffalign.costs.activations import Activations
from diffalign.costs.capacity import Cluster, capacity
from diffalign.costs.live import LiveBytes
from diffalign.costs.operators import differentiate
from diffalign.costs.rows import Counted, Line
from diffalign.digits import DigitsPolicy
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward

TEXT = "a digit"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def loaded(name="sd3", **settings):
        given = {"resolution": 32, "max_sequence_length": 24, "device": "cpu", **settings}
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, name), **given)

    return loaded


@pytest.fixture(scope="module")
def digits():
    return DigitsPolicy.from_pretrained("digits")


def counted(policy):
    return Counted.of(policy, policy.encode(Prompts([TEXT]).draw(0, 1)))


@pytest.mark.parametrize(
    "settings",
    [{"lora": LoRA(rank=2)}, {"lora": LoRA(rank=512)}, {"lora": LoRA(rank=512), "checkpointing": True}, {"lora": None}],
    ids=["adapters", "large adapters", "computed again", "all weights"],
)
def test_the_memory_of_many_rows_is_what_they_take(settings, load):
    calls = counted(load(**settings))
    assert [calls.peak(rows) for rows in (1, 2, 13, 60)] == [calls.run(rows).peak for rows in (1, 2, 13, 60)]


def test_so_it_is_where_all_weights_are_trained_and_few_rows_are_small_beside_them(digits):
    calls = counted(digits)
    assert [calls.peak(rows) for rows in (1, 2, 13, 60, 1728)] == [calls.run(rows).peak for rows in (1, 2, 13, 60, 1728)]


def test_a_network_that_treats_rows_one_by_one_takes_about_as_much(load):
    calls = counted(load("z-image", max_sequence_length=None, lora=LoRA(rank=256)))
    assert not calls(2).forward.alike(calls(3).forward)
    for rows in (13, 60):
        assert calls.peak(rows) == pytest.approx(calls.run(rows).peak, rel=0.01)


def test_gradients_are_not_counted_twice(digits):
    """A forward and a backward pass with numbers, while the gradients of an earlier piece are there."""
    calls, weights = counted(digits), list(digits.trainable_parameters().values())
    gradients = sum(weight.numel() * weight.element_size() for weight in weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for rows in (2, 104, 1728):
        condition = digits.encode(Prompts([TEXT]).draw(0, 1)).select(torch.zeros(rows, dtype=torch.long))
        with LiveBytes() as live:
            digits.velocity(torch.randn(rows, *digits.latent_shape), torch.full((rows,), 0.5), condition).sum().backward()
        assert calls.peak(rows) == pytest.approx(live.peak, rel=0.02)
    for weight in weights:
        weight.grad = None
    assert calls.peak(2) < 0.2 * gradients


def test_the_count_leaves_no_gradient():
    weight = torch.ones(3, requires_grad=True)
    differentiate(weight * 2, [weight])
    assert weight.grad is None


def test_a_larger_rank_frees_no_memory(load):
    """Adapters of layers that see one vector a row: their gradients are larger than all that few rows keep."""
    fits, taken = [], []
    for rank in (2, 512, 2048):
        tree = TreeSampler(4, FixedPlan(splits=(1, 2)))
        loop = AlignmentLoop(SoftmaxTB(load(lora=LoRA(rank, targets="linear"))), tree, channel_reward, Prompts([TEXT]), prompts_per_step=4)
        activations = Activations.of(loop)
        said = line(capacity(loop, Cluster(memory=0.25, teraflops=1.0), activations), "row budget")
        fits.append(int(re.search(r"\((\d+) would\)", said)[1]))
        taken.append([activations.at(rows) for rows in (1, 2, 3, 13, 60, 1000)])
    assert fits == sorted(fits, reverse=True)
    assert all(less < more for one, other in itertools.pairwise(taken) for less, more in zip(one, other, strict=True))


def test_the_rows_that_fit_are_the_most_whose_memory_fits(digits):
    activations = Activations(per_row=0, size=None, counted=counted(digits), calls=2)
    for room in (700_000, 2_000_000, 30_000_000):
        fits = activations.fitting(room)
        assert activations.at(fits) <= room < activations.at(fits + 1)


def test_a_line_leads_through_two_counts():
    assert Line.through(2, 100, 3, 110) == Line(80, 10)
    assert [Line.through(3, 100, 32, 129).at(rows) for rows in (3, 32, 61)] == [100, 129, 158]
    assert Line.through(3, 100, 5, 121) == Line(67, 11)  # a half byte is rounded up
