"""Sets whose diversity is known, the numbers of the TMPO release, and invariances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.evaluation import cosine_distance, cosine_distance_across, effective_modes, modes, vendi_score
from diffalign.evaluation.diversity import entropy_number

SETS = {  # features, cosine distance, Vendi score, effective modes
    "one": (torch.ones(1, 5), 0.0, 1.0, 1.0),
    "all equal": (torch.ones(6, 5), 0.0, 1.0, 1.0),
    "equal up to length": (torch.arange(1.0, 7.0)[:, None] * torch.ones(5), 0.0, 1.0, 1.0),
    "orthonormal": (torch.eye(6), 1.0, 6.0, 6.0),
    "orthogonal, more dimensions": (torch.eye(6, 40) * 3, 1.0, 6.0, 6.0),
    "two clusters": (torch.eye(2).repeat_interleave(4, 0), 16 * 2 / (8 * 7), 2.0, 2.0),
    "two opposite clusters": (torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), 2 * 8 / 12, 1.0, 2.0),  # one direction: one eigenvalue
    "three of four": (torch.eye(2)[[0, 0, 0, 1]], 6 / 12, math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), None),
    "zeros": (torch.zeros(4, 3), 0.0, 1.0, 1.0),
    "zeros and others": (torch.cat([torch.zeros(2, 3), torch.eye(3)[[0, 0]]]), 8 / 12, 2.0, 2.0),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_with_known_diversity(name):
    features, distance, vendi, number = SETS[name]
    assert cosine_distance(features).item() == pytest.approx(distance, abs=1e-6)
    assert vendi_score(features).item() == pytest.approx(vendi, abs=1e-6)
    # shares of modes give the same number as Vendi where clusters are orthogonal
    assert effective_modes(modes(features)).item() == pytest.approx(number if number is not None else vendi, abs=1e-6)


def test_cosine_distance_agrees_with_the_release(golden):
    for row in golden["diversity"]:
        features = torch.tensor(row["features"]).flatten(1)
        assert cosine_distance(features).item() == pytest.approx(row["cosine_diversity"], abs=2e-6), row["tag"]


def test_two_samples_by_hand():
    # cos = 0.6; eigenvalues of [[1, .6], [.6, 1]] / 2 are 0.8 and 0.2
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert cosine_distance(features).item() == pytest.approx(0.4)
    assert vendi_score(features).item() == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))


def test_several_sets_at_once_are_each_alone():
    features = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cosine_distance(features), torch.stack([cosine_distance(rows) for rows in features]))
    assert torch.allclose(vendi_score(features), torch.stack([vendi_score(rows) for rows in features]))


@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 1000))
def test_bounds_and_invariances(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, size, generator=generator)
    order = torch.randperm(count, generator=generator)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    lengths = torch.rand(count, 1, generator=generator) + 0.1
    distance, vendi = cosine_distance(features), vendi_score(features)
    assert 1 - 1e-9 <= vendi <= min(count, size) + 1e-6
    assert -1e-9 <= distance <= count / (count - 1) + 1e-9
    for other in (features[order], features.double() @ rotation, features * lengths):
        assert cosine_distance(other).item() == pytest.approx(distance.item(), abs=1e-5)
        assert vendi_score(other).item() == pytest.approx(vendi.item(), rel=1e-5)
    doubled = torch.cat([features, features])
    assert vendi_score(doubled).item() == pytest.approx(vendi.item(), rel=1e-6), "copies add nothing"


def test_a_narrow_set_takes_the_small_matrix_and_gives_the_same():
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))  # 3 + 1 dimensions, 50 samples
    padded = torch.nn.functional.pad(features, (0, 60))  # 63 + 1 dimensions: the 50 x 50 matrix
    assert vendi_score(features).item() == pytest.approx(vendi_score(padded).item(), rel=1e-9)


def test_modes_hang_together_through_neighbours():
    angles = torch.tensor([0.0, 0.4, 0.8, 1.2, 3.0])  # neighbours have cos 0.92, the ends of the chain 0.36
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert modes(features, 0.9).tolist() == [0, 0, 0, 0, 4]
    assert modes(features, 0.95).tolist() == [0, 1, 2, 3, 4]
    assert modes(features.flip(0), 0.9).tolist() == [0, 1, 1, 1, 1]


def test_effective_modes_of_shares():
    assert effective_modes(torch.tensor([7, 7, 3, 3])).item() == pytest.approx(2.0)
    assert effective_modes(torch.tensor([0] * 999 + [1])).item() == pytest.approx(1.0, abs=0.01)
    assert entropy_number(torch.tensor([0.5, 0.5, 0.0])).item() == pytest.approx(2.0)


def test_across_prompts_only_other_prompts_count():
    alike = torch.eye(4).repeat(3, 1, 1)  # each prompt gives the same four pictures
    assert cosine_distance(alike).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert cosine_distance_across(alike).item() == pytest.approx(0.75)
    same = torch.eye(3)[:, None].expand(3, 4, 3)  # each prompt gives one picture of its own
    assert cosine_distance(same).tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert cosine_distance_across(same).item() == pytest.approx(1.0)
    assert cosine_distance_across(same[:1]).item() == 0.0


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="features must be finite"):
        vendi_score(torch.tensor([[1.0, float("nan")]]))
