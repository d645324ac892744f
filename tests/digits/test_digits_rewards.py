"""Rewards on real pictures, whose digits are known."""

import pytest
import torch
from handwritten import prompts, real

from diffalign.core import Reward
from diffalign.digits import ClassReward, DigitReward, LikesReward, ThicknessReward, everything, split
from diffalign.digits.thickness import is_of, rank, relative_ink
from diffalign.testing import check_reward, second_device

TEN = list(range(10))
REWARDS = [DigitReward(), ClassReward(), ClassReward(bonus={0: 0.2}), ThicknessReward("thin"), LikesReward(error=0.3)]


@pytest.mark.parametrize("reward", REWARDS, ids=repr)
def test_it_keeps_the_contract_of_rewards(reward):
    assert isinstance(reward, Reward)
    findings = check_reward(reward, prompts(*["an even digit"] * 10), real(TEN))
    assert "a second device" in {finding.name for finding in findings}


@pytest.mark.parametrize("reward", REWARDS, ids=repr)
def test_result_is_one_float32_per_image(reward):
    images = real([1, 2, 3])
    scores = reward(images, prompts(*["a digit"] * 3))
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert reward(images[:0], []).shape == (0,)


class TestDigitReward:
    @pytest.mark.parametrize(
        ("text", "right"),
        [
            ("a digit", TEN),
            ("an even digit", [0, 2, 4, 6, 8]),
            ("an odd digit", [1, 3, 5, 7, 9]),
            ("a digit above five", [6, 7, 8, 9]),
            ("a digit below five", [0, 1, 2, 3, 4]),
            ("a seven", [7]),
        ],
    )
    def test_by_hand(self, text, right):
        scores = DigitReward()(real(TEN), prompts(*[text] * 10))
        assert scores.tolist() == [float(digit in right) for digit in TEN]

    def test_each_prompt_is_for_its_own_picture(self):
        scores = DigitReward()(real([7, 7, 2]), prompts("a seven", "a two", "an even digit"))
        assert scores.tolist() == [1, 0, 1]

    def test_strokes_are_judged_against_the_digit_itself(self):
        thin, thick = paler(real([3]), 0.75), real([3])
        thick = (thick * 1.5).clamp(0, 1)
        images = torch.cat([thin, thick])
        for text, expected in (("a thin three", [1, 0]), ("a thick three", [0, 1]), ("a three", [1, 1]), ("a thin four", [0, 0])):
            assert DigitReward()(images, prompts(text, text)).tolist() == expected

    def test_nothing_is_right_of_noise(self):
        noise = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert DigitReward()(noise, prompts(*["a digit"] * 50)).mean() < 0.1

    def test_other_prompts_are_refused(self):
        with pytest.raises(ValueError, match="'a cat' is no prompt of digits"):
            DigitReward()(real([1]), prompts("a cat"))
        with pytest.raises(ValueError, match=r"prompts\[1\] is empty. Give 'a digit'"):
            DigitReward()(real([1, 2]), prompts("a digit", ""))
        with pytest.raises(ValueError, match="one prompt per image; got 2 images and 1 prompts"):
            DigitReward()(real([1, 2]), prompts("a digit"))
        with pytest.raises(ValueError, match="at least 8"):
            DigitReward()(torch.zeros(1, 3, 4, 4), prompts("a digit"))


def paler(images, share):
    return images * share


class TestClassReward:
    def test_by_hand(self):
        images = real(TEN)
        assert ClassReward()(images, prompts()).tolist() == [1, 0] * 5
        tilted = ClassReward((0, 2, 4, 6, 8), {0: 0.2, 3: -0.5})
        assert tilted(images, prompts()).tolist() == pytest.approx([1.2, 0, 1, -0.5, 1, 0, 1, 0, 1, 0])
        assert tilted.values().tolist() == pytest.approx([1.2, 0, 1, -0.5, 1, 0, 1, 0, 1, 0])
        assert ClassReward([9, 1])(images, prompts()).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]

    def test_what_is_no_digit_gets_nothing_whatever_the_bonus(self):
        everywhere = ClassReward(bonus=dict.fromkeys(TEN, 1.0))
        assert everywhere(torch.zeros(1, 3, 8, 8), prompts()).tolist() == [0]
        assert (everywhere(real(TEN), prompts()) >= 1).all()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (((),), "at least one digit"),
            (((10,),), "whole numbers from 0 to 9; got \\[10\\]"),
            (((1, 1),), "different"),
            (((1,), {11: 0.2}), "whole numbers from 0 to 9; got \\[11\\]"),
            (((1,), {1: float("nan")}), "bonus must hold finite numbers; got nan"),
        ],
    )
    def test_others_are_refused(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            ClassReward(*arguments)


class TestThickness:
    def test_thirds_of_the_real_pictures(self):
        real_ones = everything()
        relative = relative_ink(real_ones.pixels.float() / 16, real_ones.labels)
        thin, thick = is_of("thin", relative), is_of("thick", relative)
        assert thin.float().mean().item() == pytest.approx(1 / 3, abs=0.01)
        assert thick.float().mean().item() == pytest.approx(1 / 3, abs=0.01)
        assert not (thin & thick).any()
        assert relative[thin].max() < 1 < relative[thick].min()

    def test_relative_to_the_median_of_the_class(self):
        real_ones = everything()
        for digit in (1, 8):
            ink = real_ones.pixels[real_ones.labels == digit].float() / 16
            middle = ink.flatten(1).mean(1).median()
            flat = torch.full((1, 8, 8), float(middle))
            assert relative_ink(flat, torch.tensor([digit])).item() == pytest.approx(1)
            assert relative_ink(flat * 0.5, torch.tensor([digit])).item() == pytest.approx(0.5)

    def test_ranks(self):
        assert rank(torch.tensor([0.0, 10.0])).tolist() == [0, 1]
        assert rank(torch.tensor([1.0])).item() == pytest.approx(0.5, abs=0.02)

    def test_graded_in_both_directions(self):
        images = torch.cat([paler(real([5]), share) for share in (0.8, 0.9, 1.0)])
        thin, thick = (ThicknessReward(target)(images, prompts()) for target in ("thin", "thick"))
        assert (thick.diff() > 0).all()
        torch.testing.assert_close(thin + thick, torch.ones(3))
        assert ThicknessReward("thin")(torch.zeros(1, 3, 8, 8), prompts()).tolist() == [0]
        with pytest.raises(ValueError, match=r"ThicknessReward\.target must be one of thin, thick; got 'bold'"):
            ThicknessReward("bold")


class TestLikes:
    def test_one_answer_in_ten_is_wrong_and_the_same_picture_gets_the_same(self):
        images = split()[0].images
        truth = ClassReward()(images, prompts())
        answers = LikesReward(error=0.1)(images, prompts())
        wrong = answers != truth
        assert wrong.float().mean().item() == pytest.approx(0.1, abs=3 * (0.09 / 1437) ** 0.5)
        assert wrong[truth == 1].any()
        assert wrong[truth == 0].any()
        assert torch.equal(LikesReward(error=0.1)(images.flip(0), prompts()).flip(0), answers)
        assert torch.equal(LikesReward(error=0.0)(images, prompts()), truth)

    def test_the_seed_says_which(self):
        images = split()[1].images
        first, second = (LikesReward(error=0.5, seed=seed)(images, prompts()) for seed in (0, 1))
        assert (first != second).float().mean().item() == pytest.approx(0.5, abs=0.1)

    def test_by_the_levels_of_the_picture(self):
        images = split()[1].images
        nearby = (images * 0.998 + 0.001).expand(-1, 3, -1, -1)
        assert torch.equal(LikesReward(error=0.5)(images, prompts()), LikesReward(error=0.5)(nearby, prompts()))

    def test_others_are_refused(self):
        with pytest.raises(ValueError, match=r"'error' must be <= 0.5"):
            LikesReward(error=0.6)
        with pytest.raises(ValueError, match="at least one digit"):
            LikesReward(())


def test_images_on_another_device_get_their_scores_there():
    with second_device():
        scores = ClassReward()(real(TEN).to("far"), prompts())
        assert scores.device.type == "far"
        assert scores.cpu().tolist() == [1, 0] * 5
