"""Scorers give full marks to the generator's own images, few to wrong captions, and exact fractions in between."""

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import DARK, WHITE, blurred, noisy, paint, rounded

from diffalign.core import Reward
from diffalign.core.types import Prompt
from diffalign.shapeworld.grammar import ALPHABET, COLORS, FAMILIES, RELATIONS, SHAPES, Text, parse, random_scenes, scenes
from diffalign.shapeworld.recognition import find_objects, read_text
from diffalign.shapeworld.render import SIZE, draw
from diffalign.shapeworld.scorers import (
    BindingReward,
    CompositionalReward,
    CountReward,
    ExactMatch,
    RelationReward,
    TextReward,
)

REWARDS = {"count": CountReward(), "binding": BindingReward(), "relation": RelationReward(), "text": TextReward()}
PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
SAMPLES = 150


def score(reward, caption, image):
    return reward(image[None], [Prompt(caption)]).item()


def drawn(family, seed=0):
    """[SAMPLES, 3, 64, 64], the true captions, and for each another caption of the family."""
    choice, generator, pool = random.Random(seed), np.random.default_rng(seed), scenes(family)
    chosen = [choice.sample(pool, 2) for _ in range(SAMPLES)]
    images = torch.from_numpy(np.stack([draw(scene, generator) for scene, _ in chosen]))
    return images, [Prompt(scene.caption) for scene, _ in chosen], [Prompt(other.caption) for _, other in chosen]


def mixed(count, seed=0):
    stream, generator = random_scenes(seed), np.random.default_rng(seed)
    chosen = [next(stream) for _ in range(count)]
    return torch.from_numpy(np.stack([draw(scene, generator) for scene in chosen])), [Prompt(scene.caption) for scene in chosen]


DEGRADATIONS = {
    "clean": (lambda images: images, 0.98),
    "8 bit": (rounded, 0.98),
    "noise": (lambda images: rounded(noisy(images)), 0.95),
    "blur": (lambda images: rounded(blurred(images, 0.8)), 0.95),
    "blur and noise": (lambda images: rounded(noisy(blurred(images, 1.0))), 0.95),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_true_captions_score_high_and_wrong_ones_low(family):
    images, true, wrong = drawn(family)
    for name, (degrade, bound) in DEGRADATIONS.items():
        seen = degrade(images)
        assert REWARDS[family](seen, true).mean() >= bound, name
        assert REWARDS[family](seen, wrong).mean() <= 0.35, name


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_match_accepts_true_captions_and_refuses_wrong_ones(family):
    images, true, wrong = drawn(family, seed=1)
    assert ExactMatch()(images, true).mean() >= 0.98
    assert ExactMatch()(noisy(images), true).mean() >= 0.95
    # binding and relation have two captions for one scene: "a and b", "b and a"
    assert ExactMatch()(images, wrong).mean() <= 0.02


class TestCount:
    one, two, three = ("red circle", 14, 14, 9), ("red circle", 46, 18, 8), ("red circle", 30, 46, 8)
    square, green = ("red square", 52, 52, 7), ("green circle", 52, 52, 7)

    @pytest.mark.parametrize("background", [WHITE, DARK])
    @pytest.mark.parametrize(
        ("things", "expected"),
        [
            ((), 0),
            ((one,), 1 / 3),
            ((one, two), 2 / 3),
            ((one, two, three), 1),
            ((one, two, three, ("red circle", 52, 52, 6)), 3 / 4),  # one too many: 3 / max(4, 3)
            ((one, two, three, square), 3 / 4),  # another shape
            ((one, two, three, green), 3 / 4),  # another colour
            ((one, two, square), 2 / 3),  # fills the place of the third: 2 / max(3, 3)
            ((one, square), 1 / 3),  # 1 / max(2, 3)
            ((square,), 0),
        ],
    )
    def test_by_hand(self, things, expected, background):
        image = paint(*things, background=background)
        assert score(CountReward(), "three red circles", image) == pytest.approx(expected)
        assert score(ExactMatch(), "three red circles", image) == (expected == 1)

    def test_a_letter_is_an_object_but_no_shape(self):
        image = torch.from_numpy(draw(Text("NA", "red"), np.random.default_rng(0)))
        assert len(find_objects(image[None])[0]) == 2
        assert all(score(CountReward(), f"one red {shape}", image) == 0 for shape in SHAPES)


class TestBinding:
    caption = "a red circle and a blue square"
    circle, square = ("red circle", 16, 16, 9), ("blue square", 46, 46, 9)

    @pytest.mark.parametrize(
        ("things", "expected"),
        [
            ((), 0),
            ((circle,), 1 / 2),
            ((circle, square), 1),
            ((("blue circle", 16, 16, 9), ("red square", 46, 46, 9)), 0),  # colours exchanged
            ((("red square", 16, 16, 9), square), 1 / 2),
            ((circle, ("red circle", 46, 46, 9)), 1 / 2),  # the same item twice serves once
            ((circle, square, ("yellow cross", 48, 14, 8)), 2 / 3),
            ((circle, ("red circle", 46, 46, 9), ("yellow cross", 48, 14, 8)), 1 / 3),
        ],
    )
    def test_by_hand(self, things, expected):
        image = paint(*things)
        assert score(BindingReward(), self.caption, image) == pytest.approx(expected)
        assert score(BindingReward(), "a blue square and a red circle", image) == pytest.approx(expected)
        assert score(ExactMatch(), self.caption, image) == (expected == 1)


class TestRelation:
    left, right, cross = ("red circle", 14, 34, 9), ("blue square", 48, 28, 9), ("yellow cross", 32, 56, 6)

    @pytest.mark.parametrize(
        ("relation", "things", "expected"),
        [
            ("left of", (left, right), 1),
            ("right of", (left, right), 1 / 2),
            ("below", (left, right), 1 / 2),  # a little lower, but mainly to the left
            ("left of", (left,), 1 / 4),
            ("left of", (cross,), 0),
            ("left of", (left, right, cross), 2 / 3),  # (1/2 + 1/2) * 2 / 3
            ("right of", (left, right, cross), 1 / 3),  # 1/2 * 2 / 3
            ("left of", (("red circle", 48, 50, 8), left, right), 2 / 3),  # one of two circles lies well
            ("above", (("red circle", 30, 14, 8), ("blue square", 34, 44, 8)), 1),
        ],
    )
    def test_by_hand(self, relation, things, expected):
        caption = f"a red circle {relation} a blue square"
        assert score(RelationReward(), caption, paint(*things)) == pytest.approx(expected)
        assert score(ExactMatch(), caption, paint(*things)) == (expected == 1)

    @PROPERTY
    @given(st.floats(0, 2 * np.pi), st.floats(24, 40))
    def test_no_two_relations_hold_at_once_and_the_mirrored_caption_agrees(self, angle, apart):
        dx, dy = np.cos(angle) * apart / 2, np.sin(angle) * apart / 2
        image = paint(("red circle", 32 + dx, 32 + dy, 8), ("blue square", 32 - dx, 32 - dy, 8))
        mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        scores = [score(RelationReward(), f"a red circle {relation} a blue square", image) for relation in RELATIONS]
        assert scores == [score(RelationReward(), f"a blue square {mirror[relation]} a red circle", image) for relation in RELATIONS]
        assert sorted(scores) in ([0.5, 0.5, 0.5, 1.0], [0.5] * 4)  # on the diagonal none holds


class TestText:
    def test_every_pair_of_characters_is_read(self):
        generator = np.random.default_rng(0)
        texts = [first + second for first in ALPHABET for second in ALPHABET]
        images = torch.from_numpy(np.stack([draw(Text(text, list(COLORS)[i % 5]), generator) for i, text in enumerate(texts)]))
        assert [reading.text for reading in read_text(rounded(noisy(blurred(images, 0.8))))] == texts

    def test_by_hand(self):
        image = torch.from_numpy(draw(Text("K7", "blue"), np.random.default_rng(3)))
        assert score(TextReward(), 'the text "K7" in blue', image) == 1
        assert score(TextReward(), 'the text "K7" in red', image) == 0.5  # no ink in the colour: (1 + 0) / 2
        assert score(ExactMatch(), 'the text "K7" in red', image) == 0
        fits = read_text(image[None])[0].fits
        # the first character counts in full, the second by its fit, halved because 7 fits better; the colour is right
        expected = (1 + min(max((fits[1]["T"] - 0.3) / 0.5, 0), 1) / 2) / 2
        assert score(TextReward(), 'the text "KT" in blue', image) == pytest.approx(expected)
        assert 0.5 < expected < 0.75
        assert score(ExactMatch(), 'the text "KT" in blue', image) == 0

    def test_exchanged_characters_are_not_read(self):
        image = torch.from_numpy(draw(Text("LX", "green"), np.random.default_rng(0)))
        assert score(TextReward(), 'the text "XL" in green', image) < 0.2

    def test_two_colours_count_by_their_ink(self):
        image = torch.from_numpy(draw(Text("HH", "red"), np.random.default_rng(1)))
        other = torch.from_numpy(draw(Text("HH", "blue"), np.random.default_rng(1)))
        middle = next(i for i in range(30, 44) if (image[:, :, i] == image[:, :1, i]).all())  # an empty column between the characters
        image[:, :, middle:] = other[:, :, middle:]
        reading = read_text(image[None])[0]
        assert reading.colors["red"] == pytest.approx(0.5, abs=0.02)
        assert score(TextReward(), 'the text "HH" in red', image) == pytest.approx((1 + reading.colors["red"]) / 2)

    def test_nothing_written_scores_nothing(self):
        assert read_text(paint()[None]) == [None]
        assert score(TextReward(), 'the text "HH" in red', paint()) == 0
        assert score(ExactMatch(), 'the text "HH" in red', paint()) == 0


class TestInterface:
    def test_compositional_reward_is_each_familys_own(self):
        images, prompts = mixed(40)
        images = images.flip(0)  # most captions wrong, so that scores differ
        own = [score(REWARDS[parse(prompt).family], prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        together = CompositionalReward()(images, prompts)
        assert together.tolist() == own
        assert len(set(own)) > 3

    def test_each_score_of_a_batch_is_the_score_of_the_image_alone(self):
        images, prompts = mixed(30, seed=5)
        order = list(range(30))
        random.Random(0).shuffle(order)
        shuffled = images[order]
        together = CompositionalReward()(shuffled, prompts)
        alone = torch.cat([CompositionalReward()(shuffled[i : i + 1], prompts[i : i + 1]) for i in range(30)])
        assert torch.equal(together, alone)

    @pytest.mark.parametrize("reward", [*REWARDS.values(), CompositionalReward(), ExactMatch()])
    def test_result_is_one_float32_in_unit_range_per_image(self, reward):
        assert isinstance(reward, Reward)
        caption = {CountReward: "two red circles", BindingReward: "a red cross and a blue square", TextReward: 'the text "AC" in red'}
        prompt = Prompt(caption.get(type(reward), "a red cross above a blue square"))
        images = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = reward(images, [prompt] * 5)
        assert scores.shape == (5,)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        assert ((scores >= 0) & (scores <= 1)).all()
        assert reward(images[:0], []).shape == (0,)

    def test_half_precision_images_are_read(self):
        images, prompts = mixed(20)
        assert CompositionalReward()(images.bfloat16(), prompts).mean() >= 0.98

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_caption_of_another_family_is_refused(self, family):
        reward = REWARDS[family]
        own = Prompt(scenes(family)[0].caption)
        for other in FAMILIES:
            if other == family:
                continue
            caption = scenes(other)[0].caption
            with pytest.raises(ValueError, match=r"prompts\[1\]") as error:
                reward(torch.ones(2, 3, SIZE, SIZE), [own, Prompt(caption)])
            assert str(error.value) == (
                f"{type(reward).__name__} scores {family} captions such as {str(own)!r}; prompts[1] is of the family {other}: "
                f"{caption!r}. Use CompositionalReward for mixed prompts."
            )

    @pytest.mark.parametrize(
        ("images", "words"),
        [
            (torch.zeros(2, 3, 32, 32), ["(K, 3, 64, 64)", "(2, 3, 32, 32)"]),
            (torch.zeros(2, 3, 128, 128), ["(2, 3, 128, 128)"]),
            (torch.zeros(2, 1, 64, 64), ["(2, 1, 64, 64)"]),
            (torch.zeros(3, 64, 64), ["(3, 64, 64)"]),
            (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["floating point", "torch.uint8"]),
            (torch.full((2, 3, 64, 64), 255.0), ["[0, 1]", "255"]),
            (torch.full((2, 3, 64, 64), float("nan")), ["[0, 1]", "nan"]),
            (torch.zeros(3, 3, 64, 64), ["one prompt per image", "3 images", "2 prompts"]),
        ],
    )
    def test_other_images_are_refused(self, images, words):
        with pytest.raises(ValueError, match="got") as error:
            CompositionalReward()(images, [Prompt("two red circles"), Prompt('the text "AC" in red')])
        assert all(word in str(error.value) for word in words)

    def test_other_text_is_refused(self):
        with pytest.raises(ValueError, match="'a cat' is not a ShapeWorld caption"):
            CompositionalReward()(torch.zeros(1, 3, SIZE, SIZE), [Prompt("a cat")])

    def test_a_batch_of_108_takes_less_than_150_milliseconds(self):
        images, prompts = mixed(108)
        seconds = []
        for _ in range(5):
            start = time.process_time()  # other processes on the machine do not count
            CompositionalReward()(images, prompts)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.15
