import math

import pytest
import torch

from diffalign.evaluation import Interval, bootstrap, paired_change, win_rate


def test_the_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = [interval.low <= 0.5 <= interval.high for interval in (bootstrap(torch.rand(30, generator=generator)) for _ in range(200))]
    assert 0.91 <= sum(hits) / 200 <= 0.99  # 95 % +- 3 standard errors of 1.5 %, and a little less for a percentile interval


def test_the_width_is_that_of_a_normal_interval():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    interval = bootstrap(values)
    assert interval.mean == pytest.approx(values.double().mean().item())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(50), rel=0.08)


def test_samples_of_a_prompt_are_no_units_of_their_own():
    by_prompt = torch.randn(10, generator=torch.Generator().manual_seed(0))
    copies = by_prompt[:, None].expand(10, 100)
    assert bootstrap(copies).high == pytest.approx(bootstrap(by_prompt).high)


def test_one_prompt_has_no_interval():
    interval = bootstrap(torch.tensor([[1.0, 3.0]]))
    assert interval == Interval(2.0)
    assert str(interval) == "2.000"
    assert interval.plain() == {"mean": 2.0, "low": None, "high": None}


def test_the_same_values_give_the_same_interval():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values) == bootstrap(values)


def test_paired_change_by_hand():
    before, after = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    assert paired_change(before, after) == Interval(1.0, 1.0, 1.0)  # changes of the prompts: 1 and 1
    change = paired_change(torch.zeros(2), torch.tensor([0.0, 2.0]))
    # means of two draws are 0, 1 or 2; stretched by sqrt(2) about 1
    assert (change.low, change.high) == (pytest.approx(1 - math.sqrt(2)), pytest.approx(1 + math.sqrt(2)))
    assert change.signed() == "+1.000 [-0.414, +2.414]"


def test_pairing_takes_out_what_prompts_have_in_common():
    before = 10 * torch.rand(30, generator=torch.Generator().manual_seed(0))
    change = paired_change(before, before + 0.1)
    assert change.low == pytest.approx(0.1, abs=1e-5)
    assert bootstrap(before).high - bootstrap(before).low > 1


def test_win_rate_counts_ties_half():
    mine, other = torch.tensor([[1.0, 1.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    assert win_rate(mine, other).mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert win_rate(mine, mine).mean == 0.5
    table, zeros = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]), torch.zeros(3, 2)
    assert win_rate(table, zeros, counts=torch.tensor([[True, True], [False, False], [False, True]])) == win_rate(
        torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0])
    )
    assert win_rate(table, zeros, counts=torch.ones(3, 2, dtype=torch.bool)) == win_rate(table, zeros)
    rare = win_rate(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert rare.low == 0.0
    assert rare.high <= 1.0


def test_what_cannot_be_paired_or_averaged_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        paired_change(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="finite values"):
        bootstrap(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap(torch.zeros(0))
