"""What the studies measure, on inputs whose values are known."""

import numpy as np
import pytest
import torch

from benchmarks.study import ground, shapeworld, tmpo
from benchmarks.subjects.surrogate_order import pairs_ordered
from diffalign import Prompt
from diffalign.shapeworld import parse
from diffalign.shapeworld.render import draw


def drawn(caption, *seeds):
    return torch.stack([torch.from_numpy(draw(parse(Prompt(caption)), np.random.default_rng(seed))) for seed in seeds])


def test_a_surrogate_orders_pairs_within_groups_alone():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1])
    assert pairs_ordered(torch.tensor([3.0, 1.0, 2.0, -9.0]), rewards, group) == 1.0
    assert pairs_ordered(torch.tensor([1.5, 1.0, 2.0, 9.0]), rewards, group) == 0.5
    with pytest.raises(ValueError, match="two different rewards"):
        pairs_ordered(rewards, torch.ones(4), group)


def test_a_longer_run_of_a_seed_counts_once():
    row = {"step": 150, "reward": 0.9, "even": 0.9, "modes": 4.0, "distance": 1.8, "from tilt": 0.1, "nats": 1.0}
    runs = [
        {"task": "even", "arm": "softmax-tb", "rate": 1e-4, "seed": seed, "steps": steps, "rows": [row]}
        for seed, steps in ((0, 600), (0, 6000), (1, 600))
    ]
    assert "  150 n=2 " in tmpo.table(runs, search=False)
    assert tmpo.table(runs, search=True) == ""


def test_fields_count_where_shapes_stand():
    one = drawn("one red circle", 0)
    assert float(shapeworld.fields(one.repeat(5, 1, 1, 1))) == pytest.approx(1.0)
    assert 4 < float(shapeworld.fields(drawn("one red circle", *range(24)))) <= 16


def test_the_ground_of_a_drawn_picture_is_smooth():
    images = drawn("two yellow circles", 0, 1)
    torch.manual_seed(0)
    assert ground.roughness(images) == pytest.approx(0.0, abs=1e-6)
    assert ground.roughness(images + 0.01 * torch.randn(2, 1, 64, 64)) > 0.01
