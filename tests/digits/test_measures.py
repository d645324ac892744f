"""Measures against numbers computed by hand."""

import math

import pytest
import torch
from handwritten import real

from diffalign.digits import ClassReward, class_shares, distance_to_real, effective_classes, kl, split, tilt


def shares(**given):
    found = torch.zeros(10, dtype=torch.float64)
    for name, value in given.items():
        found[int(name[1:])] = value
    return found


def test_shares_count_what_is_surely_a_digit():
    images = torch.cat([real([7, 2]), real([7]), torch.zeros(1, 3, 64, 64)])
    assert class_shares(images).tolist() == pytest.approx(shares(d7=0.5, d2=0.25).tolist())
    with pytest.raises(ValueError, match="at least one image"):
        class_shares(images[:0])


def test_effective_classes():
    assert effective_classes(torch.full((10,), 0.1)) == pytest.approx(10)
    assert effective_classes(shares(d3=0.2)) == pytest.approx(1)
    assert effective_classes(shares(d0=0.5, d2=0.25, d4=0.25)) == pytest.approx(2**1.5)  # entropy 1.5 bits
    assert effective_classes(shares(d0=0.1, d2=0.1, d3=0.8), (0, 2, 4, 6, 8)) == pytest.approx(2)  # the 3 does not count
    assert effective_classes(shares(d3=0.8), (0, 2, 4, 6, 8)) == 0
    with pytest.raises(ValueError, match="shares must be 10 numbers of at least 0"):
        effective_classes(torch.full((10,), -0.1))
    with pytest.raises(ValueError, match="whole numbers from 0 to 9"):
        effective_classes(torch.full((10,), 0.1), (12,))


def test_distance_is_zero_of_the_real_and_known_of_others():
    train, held_out = split()
    assert distance_to_real(train.images[:5]) == pytest.approx(0, abs=2e-3)  # cdist rounds
    assert 1.5 < distance_to_real(held_out.images) < 2.5
    black = train.latents.flatten(1) + 1  # from the empty picture, -1 everywhere
    assert distance_to_real(torch.zeros(2, 3, 16, 16)) == pytest.approx(float(black.norm(dim=1).min()), rel=1e-4)
    with pytest.raises(ValueError, match="at least one image"):
        distance_to_real(train.images[:0])


def test_tilt():
    p0 = shares(d0=1, d1=2, d2=1)
    target = tilt(p0, ClassReward((0, 2)).values(), math.log(4.0))
    assert target.tolist() == pytest.approx(shares(d0=0.4, d1=0.2, d2=0.4).tolist())  # 4, 2, 4 of 10
    assert tilt(p0, torch.zeros(10), 20.0).tolist() == pytest.approx((p0 / 4).tolist())
    sharp = tilt(p0, ClassReward((0, 2), {0: 0.2}).values(), 20.0)
    assert float(sharp[0] / sharp[2]) == pytest.approx(math.exp(4))
    assert float(tilt(p0, torch.full((10,), 1.0), 5000.0).sum()) == pytest.approx(1)  # nothing overflows
    for odd in (torch.zeros(10), torch.full((9,), 0.1), torch.full((10,), float("nan"))):
        with pytest.raises(ValueError, match="p0"):
            tilt(odd, torch.zeros(10), 1.0)
    with pytest.raises(ValueError, match="a reward of each digit"):
        tilt(p0, torch.zeros(3), 1.0)


def test_kl():
    half = shares(d0=0.5, d1=0.5)
    assert kl(half, half) == pytest.approx(0, abs=0.01)  # the floors of eight digits that were never drawn
    assert kl(half, half, floor=1e-9) == pytest.approx(0, abs=1e-7)
    assert kl(half, shares(d0=0.25, d1=0.75), 1e-9) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert kl(shares(d0=3), shares(d0=2, d1=2), 1e-9) == pytest.approx(math.log(2), abs=1e-7)  # of any sum
    missing = kl(half, shares(d0=1.0))  # 0.5 ln(0.5 / s0) + 0.5 ln(0.5 / s1), s = (1, 0.001, ...) / 1.009
    assert missing == pytest.approx(0.5 * math.log(0.5 * 1.009) + 0.5 * math.log(0.5 * 1009), rel=1e-9)
    for arguments in ((torch.zeros(10), half), (half, torch.zeros(10)), (half, half, 0.0), (half, half, 0.1)):
        with pytest.raises(ValueError, match="kl needs a floor"):
            kl(*arguments)
