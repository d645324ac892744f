"""Rewards that do not apply to every picture: what they return, what becomes of it in a sum, and that nothing is made up."""

import attrs
import pytest
import torch

from diffalign import Prompt
from diffalign.core import (
    NonFiniteRewardError,
    Partial,
    Raw,
    RewardError,
    RunningScale,
    Scores,
    SingleProcess,
    StandardizedParts,
    StandardizedSum,
    score,
)
from diffalign.core.groups import group_normalize
from diffalign.core.scoring import OfSources

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
WHOLE = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0, 5.0])
SOME = Partial(torch.tensor([3.0, 5.0, 0.0, 0.0, 0.0, 0.0]), torch.tensor([True, True, False, False, False, False]))
PARTS = Scores({"whole": WHOLE, "some": SOME})
IMAGES = torch.arange(6.0)[:, None, None, None].expand(6, 3, 2, 2) / 10
PROMPTS = [
    Prompt(text, source=source) for text, source in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "two"), ("e", None), ("f", "x"))
]


def bright(images, prompts):
    return images.mean(dim=(1, 2, 3))


def test_a_score_that_there_is_not_cannot_be_read_as_one():
    assert torch.equal(PARTS["whole"], WHOLE)
    with pytest.raises(ValueError, match="the reward 'some' applies to 2 of 6 pictures; what reads it must say what becomes of the others"):
        PARTS["some"]
    assert PARTS.partial("some").scores.tolist() == [3.0, 5.0]
    assert bool(PARTS.partial("whole").applies.all())
    assert (len(PARTS), list(PARTS)) == (2, ["whole", "some"])


def test_raw_gives_a_sample_without_a_score_its_groups_mean_and_a_group_without_any_nothing():
    assert Raw()(PARTS, GROUP).tolist() == [1 + 3, 2 + 5, 6 + 4, 0, 4, 5]
    assert Raw({"some": 2.0})(PARTS, GROUP).tolist() == [6, 10, 8, 0, 0, 0]


def test_parts_are_standardised_over_the_samples_that_they_apply_to():
    z = group_normalize(WHOLE, GROUP)
    expected = z + torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # 3 and 5: mean 4, deviation 1
    torch.testing.assert_close(StandardizedParts()(PARTS, GROUP), expected)


def test_a_standardised_sum_is_that_of_the_raw_one():
    torch.testing.assert_close(StandardizedSum()(PARTS, GROUP), group_normalize(Raw()(PARTS, GROUP), GROUP))


@pytest.mark.parametrize("aggregation", [Raw(), StandardizedParts(), StandardizedSum()])
def test_scores_that_apply_to_all_are_summed_as_ever(aggregation):
    everywhere = Partial(WHOLE, torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(aggregation(Scores({"a": everywhere}), GROUP), aggregation({"a": WHOLE}, GROUP))


def test_groups_of_different_rewards_have_the_sums_that_they_would_have_alone():
    first = Partial(torch.tensor([1.0, 2.0, 6.0, 9.0, 9.0, 9.0]), GROUP == 0)
    second = Partial(torch.tensor([9.0, 9.0, 9.0, 0.0, 4.0, 5.0]), GROUP == 1)
    for aggregation in (Raw(), StandardizedParts(), StandardizedSum()):
        both = aggregation(Scores({"a": first, "b": second}), GROUP)
        alone = torch.cat([aggregation({"a": WHOLE[:3]}, GROUP[:3]), aggregation({"b": WHOLE[3:]}, GROUP[:3])])
        torch.testing.assert_close(both, alone)


def test_a_running_scale_has_the_spread_of_what_applies_and_keeps_it_where_nothing_does():
    scale = RunningScale(decay=0.5)
    scale.observe(PARTS, GROUP, SingleProcess())
    assert scale.scale("some") == pytest.approx(1.0)
    scale.observe(Scores({"whole": WHOLE, "some": SOME.where(torch.zeros(6, dtype=torch.bool))}), GROUP, SingleProcess())
    assert scale.scale("some") == pytest.approx(1.0)
    torch.testing.assert_close(scale(PARTS, GROUP), WHOLE / scale.scale("whole") + torch.tensor([3.0, 5, 4, 0, 0, 0]))


def test_a_running_scale_that_has_not_seen_a_reward_yet_does_without_it_where_it_does_not_apply():
    nothing = Scores({"whole": WHOLE, "some": SOME.where(torch.zeros(6, dtype=torch.bool))})
    scale = RunningScale()
    scale.observe(nothing, GROUP, SingleProcess())
    torch.testing.assert_close(scale(nothing, GROUP), WHOLE / scale.scale("whole"))
    with pytest.raises(ValueError, match="has not observed the reward 'some'"):
        scale.scale("some")


def test_a_checkpoint_with_one_weight_for_all_is_read():
    scale = RunningScale()
    scale.restore({"sums": {"a": 2.0}, "weight": 0.5})
    assert scale.scale("a") == pytest.approx(2.0)


def test_a_reward_says_itself_where_it_does_not_apply_and_what_stands_there_is_never_read():
    applies = torch.tensor([True, False, True, True, True, True])

    def picky(images, prompts):
        values = bright(images, prompts).clone()
        values[1] = float("nan")
        return Partial(values, applies)

    part = score({"picky": picky}, IMAGES, PROMPTS).partial("picky")
    assert torch.equal(part.applies, applies)
    torch.testing.assert_close(part.scores, bright(IMAGES, PROMPTS)[applies])
    assert bool(part.values.isfinite().all())


def test_a_nan_where_a_reward_applies_is_an_error_as_ever():
    with pytest.raises(NonFiniteRewardError, match="nan returned nan for image 0 of 6, prompt 'a'"):
        score({"nan": lambda images, prompts: Partial(torch.full((6,), float("nan")), torch.ones(6, dtype=torch.bool))}, IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=r"short returned shape \(2,\) for 6 images"):
        score({"short": lambda images, prompts: Partial(torch.ones(2), torch.ones(2, dtype=torch.bool))}, IMAGES, PROMPTS)
    with pytest.raises(ValueError, match="applies \\[K\\] of type bool"):
        Partial(torch.ones(2), torch.ones(2))


def test_a_reward_of_some_sources_sees_their_pictures_and_those_of_none():
    seen = []

    def noting(images, prompts):
        seen.append([str(prompt) for prompt in prompts])
        return bright(images, prompts)

    part = score({"r": OfSources(noting, ("one",))}, IMAGES, PROMPTS).partial("r")
    assert seen == [["a", "b", "e"]]
    assert part.applies.tolist() == [True, True, False, False, True, False]
    torch.testing.assert_close(part.scores, bright(IMAGES, PROMPTS)[[0, 1, 4]])
    assert not bool(score({"r": OfSources(noting, ("one",))}, IMAGES[2:4], PROMPTS[2:4]).partial("r").applies.any())
    assert len(seen) == 1  # it was not asked about nothing
    torch.testing.assert_close(OfSources(noting, ("one",))(IMAGES, PROMPTS).scores, part.scores)


def test_a_fault_of_a_reward_of_some_sources_keeps_its_name_and_kind():
    with pytest.raises(NonFiniteRewardError, match="r returned nan for image 0 of 2, prompt 'c'"):
        score({"r": OfSources(lambda images, prompts: [float("nan")] * len(images), ("two",))}, IMAGES[:4], PROMPTS[:4])


def test_pieces_are_joined_whether_they_apply_or_not():
    joined = Scores.joined([Scores({"a": WHOLE[:2]}), Scores({"a": Partial(WHOLE[2:], GROUP[2:] == 1)})])
    assert joined.partial("a").applies.tolist() == [True, True, False, True, True, True]
    assert torch.equal(Scores.joined([{"a": WHOLE[:2]}, {"a": WHOLE[2:]}])["a"], WHOLE)


def test_everything_goes_into_files_as_tensors():
    assert PARTS.tensors("reward").keys() == {"reward/whole", "reward/some", "applies/some"}


def test_a_prompt_keeps_its_source_through_a_pipe():
    import pickle

    prompt = pickle.loads(pickle.dumps(Prompt("a", {"n": 1}, "one")))
    assert (str(prompt), dict(prompt.metadata), prompt.source) == ("a", {"n": 1}, "one")


def test_a_batch_takes_plain_tensors():
    from diffalign.testing import strategies

    assert attrs.fields_dict(strategies.ScoredBatch)["parts"].converter({"a": WHOLE})["a"] is WHOLE
