"""The files that ship: small, documented, and as their card says."""

import json

import pytest
import torch

from diffalign.core import Progress, Prompt, Streams
from diffalign.digits import DigitReward, class_shares, distance_to_real, effective_classes, split
from diffalign.digits.policy import EMBEDDED
from diffalign.samplers import DeterministicSampler

CARD = json.loads((EMBEDDED / "measured.json").read_text())


@torch.no_grad()
def drawn(base, prompt, steps, samples):
    forest = DeterministicSampler(steps, samples).sample(base, base.encode([Prompt(prompt)]), Progress(0, 1), Streams(77))
    return base.decode(forest.samples)


@pytest.mark.parametrize("prompt", ["an even digit", "a seven", "a thick eight"])
def test_right_pictures_are_as_many_as_the_card_says(base, prompt):
    said, count = CARD["settings"]["8 steps"]["right"][prompt], 400
    share = float(DigitReward()(drawn(base, prompt, 8, count), [Prompt(prompt)] * count).mean())
    assert share == pytest.approx(said, abs=3.5 * (said * (1 - said) * (1 / count + 1 / CARD["samples"])) ** 0.5)


def test_a_digit_is_any_digit_and_looks_like_handwriting(base):
    said = CARD["settings"]["8 steps"]
    images = drawn(base, "a digit", 8, 600)
    shares = class_shares(images)
    spread = 3.5 * (0.1 * 0.9 * (1 / 600 + 1 / (8 * CARD["samples"]))) ** 0.5
    assert shares.tolist() == pytest.approx(said["shares"], abs=spread)
    assert effective_classes(shares) > 9
    assert distance_to_real(images) == pytest.approx(said["distance"], rel=0.05)
    assert distance_to_real(images) < 1.15 * distance_to_real(split()[1].images)


def test_the_base_leaves_something_to_align():
    right = CARD["settings"]["20 steps"]["right"]
    assert all(0.5 < right[prompt] < 0.85 for prompt in ("an even digit", "an odd digit", "a digit below five"))
    assert all(0.3 < right[prompt] < 0.75 for prompt in ("a zero", "a four", "a seven", "a nine"))


def test_files_are_small_and_documented():
    sizes = {file.name: file.stat().st_size for file in EMBEDDED.iterdir()}
    assert sizes["velocity.safetensors"] < 3e6
    assert sizes["judge.safetensors"] < 1e6
    assert sum(sizes.values()) < 4e6
    card = (EMBEDDED / "README.md").read_text()
    for part in ("CC BY 4.0", "E. Alpaydin", "license: apache-2.0", "tools/digits_pretrain.py", "## Accuracy", "## Judge"):
        assert part in card
    assert f"accuracy {CARD['judge']['accuracy']:.3f}" in card
    assert f"{CARD['settings']['20 steps']['right']['an even digit']:.3f}" in card
    assert json.loads((EMBEDDED / "training.json").read_text()).keys() == {"judge", "flow"}
