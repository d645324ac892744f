"""`level_weights`: what a baseline takes from the gradient of an edge whose own leaves it contains, and that the weights give it back."""

from itertools import product

import attrs
import pytest
import torch
from tiny import assert_same, batch_of, gradient, pair

from diffalign.objectives import FlowGRPO, GroupForwardKL, Ratio, SoftmaxTB
from diffalign.samplers import Branching

FOREST = Branching((1, 3, 3, 1), (0.0, 0.7, 0.5, 0.0), roots=3)
SMALL = Branching((2, 2, 1), (0.7, 0.5, 0.0), roots=2)
SHARED = Branching((1, 3, 1), (0.7, 0.5, 0.0), roots=3)
CENTERS = ("group", "root", "none")


def paths_of(objective, batch):
    """The paths that an objective sees in its one micro-batch."""
    seen, inner = [], objective._replay
    objective._replay = lambda batch, update, rows, loss_of: inner(
        batch, update, rows, lambda paths: (seen.append(paths), loss_of(paths))[1]
    )
    (phase,) = objective.phases()
    list(phase.losses(batch, 0))
    (paths,) = seen
    return paths


def below(paths):
    """[E, K] whether a leaf lies below an edge."""
    return (paths.batch.trajectories.paths[None] == paths.edges.child[:, None, None]).any(dim=2)


@pytest.mark.parametrize(("center", "upper", "lower"), [("group", 27 / 24, 27 / 26), ("root", 9 / 6, 9 / 8), ("none", 1.0, 1.0)])
def test_the_weights_of_three_roots_of_three_by_three(center, upper, lower):
    policy, reference = pair()
    batch = batch_of(policy, FOREST)
    paths = paths_of(SoftmaxTB(policy, reference, center=center), batch)
    first = batch.trajectories.level[paths.edges.child] == 2
    torch.testing.assert_close(paths.level_weights(center), torch.where(first, upper, lower))


@pytest.mark.parametrize("center", CENTERS)
def test_a_centred_gradient_times_the_weight_is_the_uncentred_one_in_expectation(center):
    """Exactly, over all signs of the noises of a forest of two roots of two by two, for a reward that mixes all noises of a path.

    The score of an edge, d log p / d mean, is its noise. E[noise_e sum_i (f_i - mean f)] over the leaves i below e must be (1 - n / K)
    times E[noise_e sum_i f_i], and so the same once it is weighted.
    """
    policy, reference = pair()
    batch = batch_of(policy, SMALL)
    objective = SoftmaxTB(policy, reference, center=center)
    paths = paths_of(objective, batch)
    one = batch.trajectories.group == 0
    inside = below(paths).double()
    own = inside[:, one].any(dim=1).nonzero().squeeze(1)
    assert len(own) == 12
    root = batch.trajectories.roots.double()
    centred = uncentred = torch.zeros(len(own), dtype=torch.float64)
    for signs in product((-1.0, 1.0), repeat=len(own)):
        noise = torch.zeros(len(inside), dtype=torch.float64)
        noise[own] = torch.tensor(signs, dtype=torch.float64)
        total = noise @ inside
        values = root + total + 0.5 * total**2 + (noise * torch.arange(len(noise))) @ inside * total
        for_edge = noise[own] / 2 ** len(own)
        centred = centred + for_edge * (inside[own] @ objective._centered(values, paths))
        uncentred = uncentred + for_edge * (inside[own] @ values)
    assert (uncentred.abs() > 0.1).all()
    torch.testing.assert_close(paths.level_weights(center)[own].double() * centred, uncentred, rtol=1e-6, atol=0)
    assert torch.allclose(centred, uncentred) is (center == "none")


def by_edge(objective, paths):
    """What each edge adds to the gradient of an objective: [E, parameters]."""
    leaf = paths.log_prob.detach().requires_grad_()
    (slope,) = torch.autograd.grad(objective._loss(attrs.evolve(paths, log_prob=leaf)).value, leaf)
    parameters = list(objective.policy.trainable_parameters().values())
    rows = [torch.autograd.grad(paths.log_prob[edge], parameters, retain_graph=True) for edge in range(len(slope))]
    return torch.stack([value * torch.cat([part.flatten() for part in row]) for value, row in zip(slope, rows, strict=True)])


@pytest.mark.parametrize(
    ("kind", "options", "center"),
    [
        *((SoftmaxTB, {"center": center}, center) for center in CENTERS),
        (SoftmaxTB, {"center": "none", "ratio": Ratio(centered=True)}, "none"),  # what that subtracts has no gradient
        (SoftmaxTB, {"loss": "squared"}, "group"),
        (GroupForwardKL, {}, "group"),
        (FlowGRPO, {"kl": 0.0, "standardize": False}, "group"),
    ],
    ids=str,
)
def test_an_objective_weighs_by_the_baseline_that_it_takes(kind, options, center):
    policy, reference = pair()
    given = () if kind is FlowGRPO else (reference,)
    batch = batch_of(policy, FOREST)
    plain = kind(policy, *given, **options)
    paths = paths_of(plain, batch)
    parts = by_edge(plain, paths)
    assert_same(parts.sum(dim=0), gradient(plain, batch))
    got = gradient(kind(policy, *given, level_weights=True, **options), batch)
    by_center = {name: paths.level_weights(name).double() @ parts for name in CENTERS}
    assert_same(got, by_center[center], tolerance=1e-6)
    assert [name for name, expected in by_center.items() if torch.allclose(got, expected, rtol=1e-3)] == [center]


@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL])
def test_the_constraint_to_the_reference_is_not_weighed(kind):
    """Each path has its own constraint, without a baseline, so nothing has been taken from the gradient of its edges."""
    policy, reference = pair()
    batch = batch_of(policy, FOREST)
    plain, weighed = (
        gradient(kind(policy, reference, reference_weight=1e3, level_weights=level_weights), batch)
        - gradient(kind(policy, reference, level_weights=level_weights), batch)
        for level_weights in (False, True)
    )
    assert_same(weighed, plain, tolerance=1e-9)


def test_an_edge_that_all_samples_of_a_root_share_moves_nothing_and_is_not_infinite():
    policy, reference = pair()
    batch = batch_of(policy, SHARED)
    objective = SoftmaxTB(policy, reference, center="root", level_weights=True)
    assert gradient(objective, batch).isfinite().all()
    paths = paths_of(SoftmaxTB(policy, reference, center="root"), batch)
    shared = batch.trajectories.level[paths.edges.child] == 1
    torch.testing.assert_close(paths.level_weights("root"), torch.where(shared, 1.0, 3 / 2))
