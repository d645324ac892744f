"""Several sources of prompts at once: their order and shares, whose rewards score what, and a run with two from its file to its resume."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from started import start, start_two

from diffalign import AlignmentLoop, Prompt, config
from diffalign.cli import main
from diffalign.core import ConfigError, Overlapped, Progress, SingleProcess, StandardizedParts
from diffalign.core.demands import require
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Mixture, Prompts, Source
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

TREE = TreeSampler(5, FixedPlan(splits=(1, 2)))
LETTERS, DIGITS = Prompts(list("abcde"), seed=1), Prompts(["1", "2", "3"], seed=2)
MIXED = Mixture({"letters": Source(LETTERS, 2, ["channel"]), "digits": Source(DIGITS, 1, ["other"])})


def other(images, prompts):
    return images[:, 2].mean(dim=(1, 2))


def build(prompts=MIXED, **options):
    options = {"prompts_per_step": 3, "rewards": {"channel": channel_reward, "other": other}, **options}
    return AlignmentLoop(SoftmaxTB(TinyPolicy()), TREE, options.pop("rewards"), prompts, **options)


# --- the order ---------------------------------------------------------------------------------------------------------------


def test_every_step_has_its_shares_and_every_prompt_of_a_list_comes_before_one_comes_again():
    steps = [MIXED.draw(step, 3) for step in range(15)]
    assert all([prompt.source for prompt in step] == ["letters", "letters", "digits"] for step in steps)
    for source, length in (("letters", 5), ("digits", 3)):
        mine = [str(prompt) for step in steps for prompt in step if prompt.source == source]
        epochs = [mine[start : start + length] for start in range(0, len(mine) - length + 1, length)]
        assert all(len(set(epoch)) == length for epoch in epochs)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_shares_hold_to_within_a_prompt_or_two_whatever_the_step_takes(count):
    drawn = Counter(prompt.source for step in range(20) for prompt in MIXED.draw(step, count))
    assert abs(drawn["letters"] - 2 / 3 * 20 * count) < 2


def test_a_step_depends_on_its_number_alone():
    assert [MIXED.draw(step, 4) for step in (7, 3, 7)] == [MIXED.draw(7, 4), MIXED.draw(3, 4), MIXED.draw(7, 4)]
    each = [str(prompt) for step in range(12) for prompt in MIXED.draw(step, 1)]
    together = [str(prompt) for prompt in MIXED.draw(0, 12)]
    assert Counter(each) == Counter(together)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_draw_disjoint_prompts_and_equally_many_of_each_source(size):
    drawn = MIXED.draw(0, 12)
    shares = [drawn[rank::size] for rank in range(size)]
    counts = [Counter(prompt.source for prompt in share) for share in shares]
    assert all(max(count[name] for count in counts) - min(count[name] for count in counts) <= 1 for name in ("letters", "digits"))


def test_a_list_of_texts_is_a_source_of_prompts():
    mixed = Mixture({"letters": Source(["a", "b"], 2), "digits": Source(DIGITS)})
    assert [str(prompt) for prompt in mixed.prompts if prompt.source == "letters"] == ["a", "b"]
    with pytest.raises(ValueError, match="prompts must be a source of prompts"):
        Source("a, b")


def test_metadata_stay_and_the_source_is_said():
    mixture = Mixture({"a": Source(Prompts([Prompt("sign", {"text": "hi"})]))})
    (prompt,) = mixture.draw(0, 1)
    assert (prompt, prompt.metadata["text"], prompt.source) == ("sign", "hi", "a")
    assert [prompt.source for prompt in MIXED.prompts] == ["letters"] * 5 + ["digits"] * 3


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "must name at least one source"),
        ({"a/b": Source(LETTERS)}, "must hold no blanks and no '/'"),
        ({"a": Source(MIXED)}, "must list its prompts and be no mixture itself; got Mixture"),
        ({"a": Source(LETTERS, 1.0), "b": Source(DIGITS, 0.123456789)}, None),
        ({"a": Source(LETTERS, 1e9), "b": Source(DIGITS, 1)}, "shares must be small whole numbers or simple fractions.*got 1e.09, 1"),
        ({"a": Source(LETTERS), "b": Source(Prompts([Prompt("wide", {"height": 32, "width": 64})]))}, "ask for one size.*32 x 64"),
    ],
)
def test_what_is_no_mixture_is_refused(sources, message):
    if message is None:
        Mixture(sources)
        return
    with pytest.raises(ValueError, match=message):
        Mixture(sources)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"rewards": ["a", "a"]}, {"rewards": "channel"}])
def test_what_is_no_source_is_refused(options):
    with pytest.raises(ValueError, match=r"share|rewards"):
        Source(LETTERS, **options)


def test_the_state_of_a_source_that_has_one_goes_with_it():
    assert MIXED.state() == {}

    class Kept:
        prompts = ("x",)
        at = 0

        def draw(self, step, count):
            return [Prompt("x")] * count

        def state(self):
            return {"at": self.at}

        def restore(self, state):
            self.at = state["at"]

    kept = Kept()
    mixture = Mixture({"kept": Source(kept), "digits": Source(DIGITS)})
    mixture.restore({"kept": {"at": 5}})
    assert (kept.at, mixture.state()) == (5, {"kept": {"at": 5}})


# --- who scores what ----------------------------------------------------------------------------------------------------------


def test_a_step_scores_each_prompt_by_the_rewards_of_its_source():
    report = build().step(MIXED.draw(0, 3), Progress(0, 1))
    batch = report.batch
    letters = torch.tensor([prompt.source == "letters" for prompt in batch.trajectories.condition.prompts])[batch.trajectories.group]
    assert torch.equal(batch.parts.partial("channel").applies, letters)
    assert torch.equal(batch.parts.partial("other").applies, ~letters)
    assert torch.equal(batch.rewards[letters], batch.parts.partial("channel").scores)
    assert torch.equal(batch.rewards[~letters], batch.parts.partial("other").scores)


def test_metrics_are_those_of_what_applies_over_all_and_by_source():
    rewards = {"channel": channel_reward, "other": other}
    both = Mixture({"letters": Source(LETTERS, 2, ["channel", "other"]), "digits": Source(DIGITS, 1, ["other"])})
    report = build(both, rewards=rewards).step(both.draw(0, 3), Progress(0, 1))
    parts, metrics = report.batch.parts, report.metrics
    letters = parts.partial("channel").applies
    assert metrics["reward/channel"] == pytest.approx(float(parts.partial("channel").scores.mean()), rel=1e-5)
    assert metrics["reward/channel/letters"] == pytest.approx(metrics["reward/channel"])
    assert metrics["reward/other"] == pytest.approx(float(parts["other"].mean()), rel=1e-5)
    assert metrics["reward/other/digits"] == pytest.approx(float(parts["other"][~letters].mean()), rel=1e-5)
    assert metrics["source/digits/reward"] == pytest.approx(metrics["reward/other/digits"])
    assert metrics["source/letters/reward"] == pytest.approx(metrics["reward/channel"] + metrics["reward/other/letters"], rel=1e-5)
    assert metrics["reward"] == pytest.approx((2 * metrics["source/letters/reward"] + metrics["source/digits/reward"]) / 3)
    assert (metrics["source/letters/share"], metrics["source/digits/share"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert metrics["diversity/l_gmd"] == pytest.approx((2 * metrics["diversity/l_gmd/letters"] + metrics["diversity/l_gmd/digits"]) / 3)
    assert "reward/group_std/letters" in metrics
    assert "reward/channel/digits" not in metrics


def test_a_step_without_a_source_has_no_number_of_it():
    report = build(prompts_per_step=1).step(MIXED.draw(0, 1), Progress(0, 1))
    assert "reward/channel" in report.metrics
    assert not any("digits" in name or name == "reward/other" for name in report.metrics)


def test_prompts_without_rewards_are_no_zeros():
    held = Mixture({"letters": Source(LETTERS, 2, ["channel"]), "digits": Source(DIGITS, 1, [])})
    report = build(held, rewards={"channel": channel_reward}).step(held.draw(0, 3), Progress(0, 1))
    batch, metrics = report.batch, report.metrics
    letters = batch.parts.partial("channel").applies
    assert torch.equal(batch.scored, letters)
    assert 0 < int(letters.sum()) < len(letters)
    assert torch.equal(batch.rewards[~letters], torch.zeros(int((~letters).sum())))
    mine = batch.rewards[letters]
    assert metrics["reward"] == metrics["reward/channel"] == metrics["source/letters/reward"] == pytest.approx(float(mine.mean()), rel=1e-5)
    assert metrics["reward/group_std"] == metrics["reward/group_std/letters"]
    assert batch.deviation == pytest.approx(float(mine.double().std(unbiased=False)), rel=1e-6)
    assert metrics["source/digits/share"] == pytest.approx(1 / 3)
    assert {name for name in metrics if "digits" in name} == {"source/digits/share", "diversity/l_gmd/digits"}
    alone = build(held, rewards={"channel": channel_reward}, prompts_per_step=1)
    report = alone.step([held.prompts[-1]], Progress(0, 1))  # a step without a rewarded prompt
    assert not {"reward", "reward/group_std", "reward/channel"} & set(report.metrics), "a mean over nothing is no number"
    assert (report.batch.deviation, int(report.batch.scored.sum()), alone.reward) == (0.0, 0, None)


def test_a_run_without_sources_has_the_metrics_it_had():
    report = build(LETTERS).step(LETTERS.draw(0, 3), Progress(0, 1))
    assert not any(name.startswith("source/") or name.count("/") > 1 for name in report.metrics if name.startswith(("reward", "source")))


def test_a_prompt_gets_the_rewards_that_it_would_get_in_a_run_of_its_source():
    mixed = build(aggregation=StandardizedParts()).step(MIXED.draw(0, 3), Progress(0, 1)).batch
    for source, name in (("letters", "channel"), ("digits", "other")):
        rows = [row for row, prompt in enumerate(mixed.trajectories.condition.prompts) if prompt.source == source]
        index = torch.isin(mixed.trajectories.group, torch.tensor(rows))
        group = mixed.trajectories.group[index].unique(return_inverse=True)[1]
        alone = StandardizedParts()({name: mixed.parts.partial(name).scores}, group)
        torch.testing.assert_close(mixed.rewards[index], alone)
        assert float(alone.std()) > 0.5


def test_scoring_beside_the_rollout_changes_nothing():
    plain = build(chunk=4).step(MIXED.draw(0, 3), Progress(0, 1)).batch
    beside = build(chunk=4, rollout=Overlapped(prompts=1)).step(MIXED.draw(0, 3), Progress(0, 1)).batch
    torch.testing.assert_close(beside.rewards, plain.rewards)
    assert torch.equal(beside.parts.partial("other").applies, plain.parts.partial("other").applies)


def test_a_reward_is_asked_about_its_own_prompts_alone():
    class Needing:
        asked = ()

        def require(self, prompts):
            self.asked = [str(prompt) for prompt in prompts]

        def __call__(self, images, prompts):
            return other(images, prompts)

    needing = Needing()
    loop = build(rewards={"channel": channel_reward, "other": needing})
    require(loop.named_rewards().values(), MIXED.prompts)
    assert needing.asked == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"channel": channel_reward}, r"prompts.sources.digits.rewards must name rewards of the run, which are channel; got 'other'"),
        ({"channel": channel_reward, "other": other, "idle": other}, "the reward 'idle' belongs to no source of prompts"),
    ],
)
def test_names_that_lead_nowhere_are_refused(rewards, message):
    with pytest.raises(ConfigError, match=message):
        build(rewards=rewards)


class Rank(SingleProcess):
    def __init__(self, rank, size):
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "size", size)

    def gather(self, values):
        return values.repeat(self.size, *[1] * (values.ndim - 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_scores_its_share_as_one_process_would(rank):
    whole = build(prompts_per_step=6).step(MIXED.draw(0, 6), Progress(0, 1)).batch
    mine = build(prompts_per_step=6, devices=Rank(rank, 2)).step(MIXED.draw(0, 6), Progress(0, 1)).batch
    assert mine.trajectories.condition.ids.tolist() == list(range(6))[rank::2]
    for place, prompt in enumerate(mine.trajectories.condition.ids.tolist()):
        torch.testing.assert_close(mine.rewards[mine.trajectories.group == place], whole.rewards[whole.trajectories.group == prompt])


# --- a run from its file -----------------------------------------------------------------------------------------------------

SHORT = [
    "--policy.device",
    "cpu",
    "--prompts_per_step",
    "2",
    "--evaluation.samples",
    "2",
    "--evaluation.every",
    "2",
    "--average.every",
    "1",
]
NAMED = {f"reward/{name}" for name in ("even", "even/open", "asked", "asked/named", "thick", "thick/open", "thick/named")}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_two_sources_trains_resumes_exactly_keeps_its_best_and_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = [*SHORT, "--checkpoint_every", "2"]
    assert main(["train", "digits_mixture", *short, "--total", "4", "--folder", "whole"]) == 0
    assert main(["train", "digits_mixture", *short, "--total", "4", "--folder", "parts"]) == 0
    shutil.rmtree("parts/step-000004")
    assert main(["train", "parts", "--resume"]) == 0
    one, other_ = (load_file(f"{folder}/step-000004/policy.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(one[name], other_[name]) for name in one)
    timeless = [
        {name: value for name, value in line.items() if name.startswith(("reward", "source", "diversity"))}
        for line in lines(tmp_path / "whole")
    ]
    again = [{name: value for name, value in line.items() if name in timeless[0]} for line in lines(tmp_path / "parts")]
    assert timeless == again
    assert timeless[0].keys() >= NAMED
    first, last = (json.loads((tmp_path / "whole" / "evaluation.json").read_text())[place] for place in (0, -1))
    assert {f"reward/{name}" for name in first["rewards"]} == NAMED
    assert first["rewards"]["even"] == first["rewards"]["even/open"]
    rows = {row["prompt"]: row for row in last["by_prompt"]}
    opened = [row for row in rows.values() if row["source"] == "open"]
    assert opened
    assert all(row["rewards"].keys() == {"even", "even/open", "thick", "thick/open"} for row in opened)
    manifest = json.loads((tmp_path / "whole" / "best" / "manifest.json").read_text())
    values = last["rewards"] if manifest["step"] == 4 else json.loads((tmp_path / "whole" / "evaluation.json").read_text())[1]["rewards"]
    share = len(opened) / len(rows)
    by_hand = share * values["even"] + (1 - share) * values["asked"] + 0.25 * values["thick"]
    assert manifest["score"] == pytest.approx(by_hand, rel=1e-5)
    capsys.readouterr()
    assert main(["evaluate", "whole", "--samples", "2", "--steps", "8"]) == 0
    printed = capsys.readouterr().out
    assert "reward thick/named" in printed
    assert main(["compare", "whole", "parts", "--samples", "2", "--steps", "8"]) == 0
    assert (tmp_path / "whole" / "report.html").exists()


def test_two_processes_train_a_mixture_as_one_does(tmp_path):
    for start_it, folder in ((start, "one"), (start_two, "two")):
        words = ["--prompts_per_step", 4, "--total", 1, "--evaluation=null", "--policy.device", "cpu", "--folder", tmp_path / folder]
        done = start_it("-m", "diffalign", "train", "digits_mixture", *words)
        assert done.returncode == 0, done.stderr[-2000:]
    (one,), (two,) = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert one.keys() >= NAMED
    for name in NAMED:
        assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_check_builds_it_and_says_what_it_costs(capsys):
    assert main(["check", "digits_mixture", "--policy.device", "cpu"]) == 0
    assert "216 (8 prompts)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--prompts.sources.open.rewards=[evne]", "prompts.sources.open.rewards must name rewards of the run"),
        (
            "--evaluation.prompts={opne: digits/any}",
            "evaluation.prompts must name sources of the run, which are open and named; got 'opne'",
        ),
        ("--prompts.sources.open.share=0", "prompts.sources.open"),
    ],
)
def test_a_file_that_does_not_fit_together_is_one_message(override, message):
    with pytest.raises(ConfigError, match=message):
        config.parse("digits_mixture", ["--policy.device", "cpu", override]).build()


def test_another_share_is_another_run():
    from diffalign.runs.identity import differences

    before, after = (config.parse("digits_mixture", [f"--prompts.sources.open.share={share}"]).yaml() for share in (1, 2))
    assert [path for path, _, _ in differences(before, after)] == ["prompts.init_args.sources.open.init_args.share"]
