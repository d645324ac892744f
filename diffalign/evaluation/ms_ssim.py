"""Multi-scale structural similarity of two images."""

import torch
from torch import Tensor
from torch.nn import functional as F

_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW, _SIGMA = 11, 1.5
_LIMIT = 256
"""Largest side in pixels; larger images are scaled down first, because the measure is about layout and its cost grows with the pixels."""
_ALL_PAIRS = 64
"""Largest set of which all pairs are compared, 2016. Of a larger one about as many are, because 1000 images have 499500."""
_PAIRS = 32
"""Number of pairs that are computed at once; 496 pairs of 64 x 64 take 1.2 s instead of 8.6, with the same result."""


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """MS-SSIM of pairs of images, in [0, 1]; 1 if they are equal.

        l_M^w_M prod_j cs_j^w_j,   l = (2 m_1 m_2 + c_1) / (m_1^2 + m_2^2 + c_1),   cs = (2 s_12 + c_2) / (s_1^2 + s_2^2 + c_2)

    with means m, variances and covariance s under a Gaussian window (11 pixels, sigma 1.5), c_1 = 0.01^2, c_2 = 0.03^2. Factors are
    averaged over pixels; negative factors are set to 0. The image is halved between scales. The result is the mean over channels. There are
    five scales if the smaller side has at least 176 pixels. Smaller images have as many scales as the window fits into, and their weights
    are scaled to add up to 1. Below 11 pixels the window shrinks to the image.

    Args:
        first, second: [B, 3, H, W] in [0, 1]

    Returns:
        [B]

    Reference: Wang, Simoncelli and Bovik, Asilomar 2003, "Multi-scale structural similarity for image quality assessment".
    """
    window = _window(min(first.shape[-2:]))
    scales = _scales(min(first.shape[-2:]), len(window))
    weights = torch.tensor(_WEIGHTS[:scales], dtype=torch.float64)
    weights = (weights / weights.sum()).to(first.device)
    a, b = first.double(), second.double()
    result = a.new_ones(a.shape[:2])
    for scale in range(scales):
        if scale > 0:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        luminance, structure = _compared(a, b, window.to(a.device))
        factor = (luminance * structure if scale == scales - 1 else structure).mean(dim=(2, 3))
        result = result * factor.clamp(min=0) ** weights[scale]
    return result.mean(dim=1)


def ms_ssim_distance(images: Tensor) -> Tensor:
    """Distance 1 - mean MS-SSIM over pairs of each set: [G, n, 3, H, W] -> [G]; 0 for sets of one.

    Sets of up to 64 images are compared in all pairs. Of larger ones about 2016 pairs are, at least n, in which each image stands equally
    often: i with i + d (mod n), for some d spread evenly over 1 .. (n - 1) / 2. For samples in no order the expectation is the same.
    """
    groups, count = images.shape[:2]
    if count < 2:
        return images.new_zeros(groups, dtype=torch.float64)
    small = _shrunk(images.flatten(0, 1)).unflatten(0, (groups, count))
    first, second = _paired(count)
    pairs = list(zip(first.split(_PAIRS), second.split(_PAIRS), strict=True))
    return torch.stack([1 - torch.cat([ms_ssim(group[one], group[other]) for one, other in pairs]).mean() for group in small])


def _paired(count: int) -> tuple[Tensor, Tensor]:
    """Places of the first and the second image of each pair, every pair once: [B] each."""
    if count <= _ALL_PAIRS:
        first, second = torch.triu_indices(count, count, 1)
        return first, second
    partners = max(1, _ALL_PAIRS * (_ALL_PAIRS - 1) // 2 // count)
    apart = torch.linspace(1, (count - 1) // 2, partners).round().long()
    place = torch.arange(count)
    return place.repeat(partners), ((place + apart[:, None]) % count).flatten()


def _shrunk(images: Tensor) -> Tensor:
    longest = max(images.shape[-2:])
    if longest <= _LIMIT:
        return images
    size = [max(1, round(side * _LIMIT / longest)) for side in images.shape[-2:]]
    return F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)


def _window(side: int) -> Tensor:
    length = min(_WINDOW, side if side % 2 else side - 1)
    places = torch.arange(length, dtype=torch.float64) - length // 2
    weights = (-places.square() / (2 * _SIGMA**2)).exp()
    return weights / weights.sum()


def _scales(side: int, window: int) -> int:
    fitting = [scale for scale in range(len(_WEIGHTS)) if side >> scale >= window]
    return max(1, len(fitting))


def _compared(a: Tensor, b: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance factor and contrast-structure factor at each position of the window."""
    mean_a, mean_b, square_a, square_b, product = (_blur(x, window) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = 0.01**2, 0.03**2
    var_a, var_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (var_a + var_b + c2)


def _blur(x: Tensor, window: Tensor) -> Tensor:
    channels = x.shape[1]
    kernel = window.repeat(channels, 1, 1, 1)
    return F.conv2d(F.conv2d(x, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)
