"""Draws are a function of (seed, step, name, prompt id, node id), and of nothing else."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.core import Streams

IDS = st.integers(0, 2**40)


@given(IDS, IDS, IDS, IDS)
def test_the_same_address_gives_the_same_noise(seed, step, prompt, node):
    noise = Streams(seed, step).normal((2, 3), "rollout", prompt, node)
    assert noise.shape == (2, 3)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, Streams(seed, step).normal((2, 3), "rollout", prompt, node))


@pytest.mark.parametrize(
    ("seed", "step", "name", "prompt", "node"),
    [(1, 1, "a", 1, 11), (0, 2, "a", 1, 11), (0, 1, "b", 1, 11), (0, 1, "a", 2, 11), (0, 1, "a", 1, 12), (0, 1, "a", 11, 1)],
)
def test_every_part_of_the_address_matters(seed, step, name, prompt, node):
    here = Streams(0, 1).normal((8,), "a", 1, 11)
    there = Streams(seed, step).normal((8,), name, prompt, node)
    assert not (here == there).any()


def test_parts_of_the_address_are_not_run_together():
    assert not torch.equal(Streams(1, 23).normal((4,), "a", 0, 0), Streams(12, 3).normal((4,), "a", 0, 0))
    assert not torch.equal(Streams(0).normal((4,), "a", 1, 23), Streams(0).normal((4,), "a", 12, 3))


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5))
def test_rows_are_drawn_alone(addresses):
    streams = Streams(7, 3)
    together = streams.normals((2,), "rollout", *zip(*addresses, strict=True))
    alone = torch.stack([streams.normal((2,), "rollout", prompt, node) for prompt, node in addresses])
    assert torch.equal(together, alone)


def test_no_rows_are_an_empty_tensor():
    assert Streams(0).normals((2, 3), "rollout", [], []).shape == (0, 2, 3)


def test_unequal_numbers_of_prompts_and_nodes_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        Streams(0).normals((2,), "rollout", [0, 1], [0])


def test_global_generators_are_left_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    Streams(0).normal((4,), "rollout", 0, 0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(1)
    first = Streams(0).normal((4,), "rollout", 0, 0)
    torch.manual_seed(2)
    assert torch.equal(Streams(0).normal((4,), "rollout", 0, 0), first)


def test_draws_of_many_nodes_are_standard_normal():
    noise = Streams(5).normals((2,), "rollout", [0] * 10_000, list(range(10_000))).double()
    n = len(noise)
    # five standard errors of the mean, the variance, the fourth moment (3, variance 96) and the correlation
    assert noise.mean(dim=0).abs().max() < 5 / math.sqrt(n)
    assert (noise.var(dim=0) - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert (noise.pow(4).mean(dim=0) - 3).abs().max() < 5 * math.sqrt(96 / n)
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < 5 / math.sqrt(n)
    assert (noise[1:, 0] * noise[:-1, 0]).mean().abs() < 5 / math.sqrt(n)  # neighbouring nodes


def test_draws_do_not_change_between_versions():
    """A run of an older version can be resumed only while these numbers stay."""
    expected = torch.tensor([-1.438881754875183, -0.7145610451698303, -1.0901662111282349])
    torch.testing.assert_close(Streams(0).normal((3,), "rollout", 1, 2), expected)
