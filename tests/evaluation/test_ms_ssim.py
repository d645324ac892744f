"""MS-SSIM against the numbers of pytorch-msssim 1.0.0 (weights scaled to add up to 1, as here) and against its definition."""

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


def test_large_pictures_are_made_small_first():
    large = torch.nn.functional.interpolate(waves(128), scale_factor=4, mode="bilinear").float()
    pair = torch.stack([large[0], large[0].roll(16, 2)])[None]
    small = torch.nn.functional.interpolate(pair[0], size=(256, 256), mode="bilinear", antialias=True)[None]
    assert ms_ssim_distance(pair).item() == pytest.approx(ms_ssim_distance(small).item())
