"""The judge: right on pictures that it never saw, in any size, unsure of what is no digit."""

import pytest
import torch
from handwritten import real
from torch.nn import functional as F

from diffalign.digits import probabilities, split
from diffalign.digits.judge import FILE, look
from diffalign.digits.reading import ink_of, latents_of


def test_it_reads_handwriting_that_it_never_saw():
    _, held_out = split()
    seen = look(held_out.images)
    assert (seen.classes == held_out.labels).float().mean() > 0.985
    assert seen.sure.float().mean() > 0.9
    assert (seen.classes == held_out.labels)[seen.sure].float().mean() > 0.99
    assert FILE.stat().st_size < 1_000_000


def test_probabilities_are_of_each_picture_alone():
    images = real([3, 8, 1, 0, 7])
    together = probabilities(images)
    assert together.shape == (5, 10)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.sum(1), torch.ones(5))
    torch.testing.assert_close(torch.cat([probabilities(image[None]) for image in images]), together, rtol=1e-4, atol=1e-5)
    assert probabilities(images[:0]).shape == (0, 10)
    assert together.argmax(1).tolist() == [3, 8, 1, 0, 7]


@pytest.mark.parametrize("size", [8, 16, 64, 100])
def test_any_size_is_read(size):
    assert probabilities(real([2, 5, 9], size)).argmax(1).tolist() == [2, 5, 9]


def test_it_is_unsure_of_what_is_no_digit():
    draws = torch.Generator().manual_seed(0)
    images = split()[1].images
    shuffled = images.flatten(2)[:, :, torch.randperm(64, generator=draws)].view_as(images)
    noise = torch.rand(images.shape, generator=draws)
    dots = (torch.rand(360, 1, 8, 8, generator=draws) < 0.4).float().expand(-1, 3, -1, -1)
    for nothing in (shuffled, noise, dots, torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)):
        assert look(nothing).sure.float().mean() < 0.1


def test_a_little_noise_does_not_change_its_mind():
    _, held_out = split()
    moved = (held_out.images + 0.05 * torch.randn(360, 1, 8, 8)).clamp(0, 1)
    assert (look(moved).classes == held_out.labels).float().mean() > 0.975


def test_ink_is_the_mean_of_fields():
    images = torch.zeros(1, 3, 16, 16)
    images[0, 0, :2, :2] = 1  # one field, one channel of three
    images[0, :, 14, 15] = 1  # one pixel of four, in all channels
    ink = ink_of(images)
    assert ink.shape == (1, 8, 8)
    assert ink[0, 0, 0].item() == pytest.approx(1 / 3)
    assert ink[0, 7, 7].item() == pytest.approx(1 / 4)
    assert ink.sum().item() == pytest.approx(1 / 3 + 1 / 4)
    assert latents_of(images).shape == (1, 64)
    assert latents_of(images)[0, [0, 1]].tolist() == pytest.approx([-1 / 3, -1])


def test_it_is_repeatable_and_leaves_the_images_alone():
    images = real([4, 6])
    before = images.clone()
    assert torch.equal(probabilities(images), probabilities(images.requires_grad_()))
    assert not probabilities(images).requires_grad
    assert torch.equal(images, before)
    torch.testing.assert_close(probabilities(before.bfloat16()), probabilities(before), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 1, 8, 8), ["(K, 3, H, W)", "(2, 1, 8, 8)", "DigitsPolicy.decode"]),
        (torch.zeros(2, 3, 7, 8), ["at least 8", "(2, 3, 7, 8)"]),
        (torch.zeros(3, 8, 8), ["(3, 8, 8)"]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["floating point", "torch.uint8"]),
        (torch.full((2, 3, 8, 8), 255.0), ["[0, 1]", "255"]),
        (torch.full((2, 3, 8, 8), -0.5), ["[0, 1]", "-0.5"]),
        (torch.full((2, 3, 8, 8), float("nan")), ["[0, 1]", "nan"]),
    ],
)
def test_other_images_are_refused(images, words):
    with pytest.raises(ValueError, match="got") as error:
        probabilities(images)
    assert all(word in str(error.value) for word in words)


def test_enlarging_changes_nothing():
    _, held_out = split()
    large = F.interpolate(held_out.images[:20], size=(64, 64), mode="nearest")
    torch.testing.assert_close(probabilities(large), probabilities(held_out.images[:20]), rtol=1e-4, atol=1e-5)
