"""Samples in another order: the same forest, drawn alike."""

import numpy as np
import torch
from hypothesis import given

from diffalign.core import Edges, Streams, replay_log_prob
from diffalign.testing import TinyPolicy
from diffalign.testing.sample_order import AlikeStreams, turned
from diffalign.testing.strategies import forests


def of_each_prompt(forest, values):
    return [values[forest.group == prompt] for prompt in range(len(forest.condition))]


@given(forests(comparable=True))
def test_a_turned_forest_has_the_samples_of_each_prompt_in_reverse(forest):
    other = turned(forest)
    assert torch.equal(other.group, forest.group)
    policy, edges, others = TinyPolicy((2,), dtype=torch.float64), Edges.of(forest), Edges.of(other)
    for name, values, reverse in (
        ("latents", forest.samples, other.samples),
        ("roots", forest.latents[forest.roots], other.latents[other.roots]),
        ("drawn", forest.path_sum(forest.log_prob), other.path_sum(other.log_prob)),
        (
            "replayed",
            forest.path_sum(on_nodes(forest, edges, replay_log_prob(policy, forest, edges))),
            other.path_sum(on_nodes(other, others, replay_log_prob(policy, other, others))),
        ),
        ("means", path_means(forest), path_means(other)),
    ):
        for one, turn in zip(of_each_prompt(forest, values), of_each_prompt(other, reverse), strict=True):
            torch.testing.assert_close(turn.flip(0), one, rtol=1e-9, atol=1e-9, msg=name)


def on_nodes(forest, edges, values):
    return values.new_zeros(len(forest.latents)).index_copy(0, edges.child, values)


def path_means(forest):
    """Sum of the first coordinates of the means on each path."""
    first = forest.mean[:, 0]
    return forest.path_sum(first.new_zeros(len(forest.latents)).index_copy(0, forest.stochastic, first))


@given(forests())
def test_turned_twice_it_is_itself(forest):
    again = turned(turned(forest))
    for name in ("latents", "level", "parent", "prompt", "noise_level", "log_prob", "mean", "call"):
        assert torch.equal(getattr(again, name), getattr(forest, name)), name


def test_alike_draws_depend_on_name_and_prompt_alone():
    streams = AlikeStreams(3, 5)
    noise = streams.normal((2, 3), "a", 7, 0)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, streams.normal((2, 3), "a", 7, 9))
    assert len(noise.unique()) == 1
    assert not torch.equal(noise, streams.normal((2, 3), "b", 7, 0))
    assert not torch.equal(noise, streams.normal((2, 3), "a", 8, 0))
    assert np.ptp(streams.generator("a", 7).random((4, 2))) == 0
    assert (
        streams.generator("a", 7, 1).choice(9, 4, replace=False).tolist()
        == streams.generator("a", 7, 2).choice(9, 4, replace=False).tolist()
    )
    assert streams.generator("a", 7).choice(1000) == Streams(3, 5).generator("a", 7).choice(1000), "else as in a run"
