"""The real pictures: all there, unchanged, and with their licence."""

import hashlib

import torch

from diffalign.digits import everything, split
from diffalign.digits.handwriting import FILE

PIXELS = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_the_pictures_are_those_of_the_source():
    real = everything()
    assert real.pixels.shape == (1797, 8, 8)
    assert real.pixels.dtype == torch.uint8
    assert (int(real.pixels.min()), int(real.pixels.max())) == (0, 16)
    assert torch.bincount(real.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as scikit-learn documents them
    assert real.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    content = real.pixels.numpy().tobytes() + real.labels.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == PIXELS
    assert real.pixels[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_the_halves_are_apart_and_whole():
    train, held_out = split()
    assert (len(train), len(held_out)) == (1437, 360)
    rows = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, everything().pixels.flatten(1).tolist()))
    assert torch.bincount(held_out.labels, minlength=10).min() >= 20


def test_what_networks_and_rewards_see():
    real = everything()
    assert (float(real.latents.min()), float(real.latents.max())) == (-1.0, 1.0)
    assert (float(real.images.min()), float(real.images.max())) == (0.0, 1.0)
    assert real.images.shape == (1797, 3, 8, 8)
    assert torch.equal(real.images[:, :1] * 2 - 1, real.latents)


def test_source_and_licence_are_named():
    text = (FILE.parent / "README.md").read_text()
    for part in ("E. Alpaydin", "C. Kaynak", "CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/", "Changes:", "scikit-learn"):
        assert part in text
    assert FILE.stat().st_size < 200_000
