"""Forests of a few prompts each are put together as if all prompts had been sampled at once."""

import attrs
import pytest
import torch

from diffalign import Prompt
from diffalign.core import ROOT, Streams, TrajectoryBatch
from diffalign.core.joining import join
from diffalign.core.rollout import pieces
from diffalign.samplers import Branching, roll_out
from diffalign.testing import TinyPolicy

PROMPTS = [Prompt(text) for text in ("a red cube", "two blue stars", "a red cube", "four green disks", "a grey cone")]
BRANCHINGS = {
    "tree": Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0)),
    "roots": Branching((1, 2, 1), (0.5, 0.7, 0.0), roots=3),
    "chains": Branching((1, 1, 1, 1), (0.0, 0.7, 0.0, 0.0), roots=4),
    "deterministic": Branching((1, 1, 1), (0.0, 0.0, 0.0), roots=2),
}
INDICES = ("level", "parent", "prompt", "noise_level", "leaves", "paths", "group", "stochastic", "roots")


def sampled(policy, condition, branching, **options):
    with torch.no_grad():
        return roll_out(policy, condition, branching, Streams(3, 7), **options)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("branching", BRANCHINGS.values(), ids=BRANCHINGS)
def test_pieces_give_the_forest_of_all_node_for_node(branching, size, keep_all):
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    condition = policy.encode(PROMPTS)
    whole = sampled(policy, condition, branching, keep_all=keep_all)
    parts = [sampled(policy, piece, branching, keep_all=keep_all) for piece in pieces(condition, size)]
    assert len(parts) == -(-len(PROMPTS) // size)
    joined = join(condition, parts)
    assert joined.condition is condition
    assert all(torch.equal(getattr(joined, name), getattr(whole, name)) for name in INDICES)
    for name in ("sigmas", "latents", "log_prob", "mean", "samples"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_a_graph_that_a_sampler_has_kept_stays():
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        whole = sampled(policy, condition, BRANCHINGS["tree"], keep_graph=True)
        joined = join(condition, [sampled(policy, piece, BRANCHINGS["tree"], keep_graph=True) for piece in pieces(condition, 2)])
    parameters = list(policy.trainable_parameters().values())
    weight = torch.arange(whole.mean.numel()).reshape(whole.mean.shape).double()
    one, other = (torch.autograd.grad((weight * forest.mean).sum(), parameters) for forest in (whole, joined))
    assert all(float(gradient.norm()) > 1e-6 for gradient in one)
    for mine, its in zip(one, other, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


def test_forests_in_another_order_stand_one_after_the_other():
    """Depth first: root, left, leaf, right, leaf."""
    policy = TinyPolicy(dtype=torch.float64)
    condition = policy.encode(PROMPTS[:2])
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    values = torch.arange(30, dtype=torch.float64).reshape(2, 5, 3)
    noise = torch.tensor([0.0, 0.7, 0.0, 0.7, 0.0])

    def forest(index):
        return TrajectoryBatch(
            condition=condition.select(torch.tensor([index])),
            sigmas=sigmas,
            latents=values[index],
            level=torch.tensor([0, 1, 2, 1, 2]),
            parent=torch.tensor([ROOT, 0, 1, 0, 3]),
            prompt=torch.zeros(5, dtype=torch.long),
            noise_level=noise,
            log_prob=torch.zeros(5, dtype=torch.float64),
            mean=values[index][noise > 0],
        )

    joined = join(condition, [forest(0), forest(1)])
    assert joined.parent.tolist() == [ROOT, 0, 1, 0, 3, ROOT, 5, 6, 5, 8]
    assert joined.prompt.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(joined.mean, joined.latents[joined.stochastic])
    assert torch.equal(joined.samples, values[:, [2, 4]].flatten(0, 1))


def test_one_piece_is_taken_as_it_is():
    policy = TinyPolicy()
    condition = policy.encode(PROMPTS)
    assert [piece is condition for piece in pieces(condition, None)] == [True]
    assert [piece is condition for piece in pieces(condition, 5)] == [True]
    forest = sampled(policy, condition, BRANCHINGS["tree"])
    assert join(condition, [forest]) is forest


def test_different_grids_are_refused():
    policy = TinyPolicy()
    condition = policy.encode(PROMPTS[:2])
    first, second = (sampled(policy, piece, BRANCHINGS["chains"]) for piece in pieces(condition, 1))
    with pytest.raises(ValueError, match="must have the same sigmas"):
        join(condition, [first, attrs.evolve(second, sigmas=second.sigmas * 0.9)])
