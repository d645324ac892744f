"""MS-SSIM against the numbers of pytorch-msssim 1.0.0 (weights scaled to add up to 1, as here) and against its definition."""

import sys

import pytest
import torch

from diffalign.evaluation import ms_ssim, ms_ssim_distance


def waves(side):
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    return torch.stack([0.5 + 0.5 * torch.sin(x / (3 + c)) * torch.cos(y / (5 + 2 * c)) for c in range(3)])[None].double()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda a: a.roll((2, -1), (2, 3)), 0.9105584012065591),
        (lambda a: a * 0.6, 0.874713255486221),
        (lambda a: 0.5 * a + 0.5 * a.roll(3, 3), 0.9206886822635516),
    ],
)
def test_five_scales_agree_with_another_implementation(other, expected):
    a = waves(192)
    assert ms_ssim(a, other(a)).item() == pytest.approx(expected, abs=1e-6)  # its window is float32


def test_small_pictures_have_as_many_scales_as_fit():
    a = waves(192)[..., :64, :64]
    assert ms_ssim(a, a * 0.6).item() == pytest.approx(0.8339512395600955, abs=1e-6)


@pytest.mark.parametrize("side", [1, 2, 5, 11, 30, 64, 200])
def test_a_picture_equals_itself_at_any_size(side):
    a = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(a, a).tolist() == pytest.approx([1.0, 1.0])


def test_flat_pictures_differ_by_luminance_alone():
    a, b = torch.full((1, 3, 8, 8), 0.2), torch.full((1, 3, 8, 8), 0.6)
    # one scale; (2 * .2 * .6 + c1) / (.04 + .36 + c1)
    assert ms_ssim(a, b).item() == pytest.approx((0.24 + 1e-4) / (0.4 + 1e-4))


def test_distance_of_sets():
    a = waves(64)[0].float()
    sets = torch.stack([torch.stack([a, a, a]), torch.stack([a, 1 - a, a.roll(5, 2)])])
    distances = ms_ssim_distance(sets)
    assert distances[0].item() == pytest.approx(0.0, abs=1e-9)
    pairs = [(0, 1), (0, 2), (1, 2)]
    by_hand = 1 - torch.stack([ms_ssim(sets[1, [i]], sets[1, [j]]) for i, j in pairs]).mean()
    assert distances[1].item() == pytest.approx(by_hand.item())
    assert ms_ssim_distance(sets[:, :1]).tolist() == [0.0, 0.0]


def compared(monkeypatch, count):
    """The pairs of a set that are compared, as sorted numbers."""
    pairs = []

    def seen(first, second):
        pairs.extend(sorted(pair) for pair in zip(first[:, 0, 0, 0].tolist(), second[:, 0, 0, 0].tolist(), strict=True))
        return first.new_zeros(len(first))

    monkeypatch.setattr(sys.modules["diffalign.evaluation.ms_ssim"], "ms_ssim", seen)
    ms_ssim_distance(torch.arange(float(count)).view(1, count, 1, 1, 1).expand(1, count, 3, 1, 1))
    return pairs


def test_sets_of_up_to_64_are_compared_in_all_pairs(monkeypatch):
    assert compared(monkeypatch, 64) == [[i, j] for i in range(64) for j in range(i + 1, 64)]


@pytest.mark.parametrize("count", [65, 66, 200, 1000, 3000])
def test_of_larger_sets_each_picture_is_compared_equally_often_and_no_pair_twice(monkeypatch, count):
    pairs = compared(monkeypatch, count)
    assert len(pairs) <= max(2016, count)
    assert len(pairs) > min(2016, count) * 0.9
    assert len(set(map(tuple, pairs))) == len(pairs)
    assert all(first != second for first, second in pairs)
    assert len(set(torch.tensor(pairs).long().flatten().bincount(minlength=count).tolist())) == 1


def test_the_pairs_of_a_large_set_have_the_mean_of_all_up_to_their_noise():
    noise = torch.Generator().manual_seed(0)
    pictures = torch.rand(1, 100, 3, 11, 11, generator=noise) ** torch.rand(1, 100, 1, 1, 1, generator=noise)
    every = 1 - torch.cat([ms_ssim(pictures[0, i].expand(99 - i, -1, -1, -1), pictures[0, i + 1 :]) for i in range(99)])
    error = every.std().item() / 2000**0.5
    assert ms_ssim_distance(pictures).item() == pytest.approx(every.mean().item(), abs=4 * error)


def test_large_pictures_are_made_small_first():
    large = torch.nn.functional.interpolate(waves(128), scale_factor=4, mode="bilinear").float()
    pair = torch.stack([large[0], large[0].roll(16, 2)])[None]
    small = torch.nn.functional.interpolate(pair[0], size=(256, 256), mode="bilinear", antialias=True)[None]
    assert ms_ssim_distance(pair).item() == pytest.approx(ms_ssim_distance(small).item())
