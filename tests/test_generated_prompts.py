"""Prompts by rule: the benchmark's own list, and lists to train on that share nothing with it nor with what is held out."""

import hashlib
import json

import pytest

from diffalign.cli import main
from diffalign.core import ConfigError
from diffalign.evaluation import HeldOutEvaluation
from diffalign.prompts import PromptFile, benchmark, generated, geneval, read_prompts
from diffalign.prompts.composition import CompositionGrammar
from diffalign.prompts.lists import LISTS
from diffalign.prompts.objects import attributed, content, counted, pair, positioned
from diffalign.rewards.geneval_rules import wanted
from diffalign.rewards.ocr import wanted_text
from diffalign.vocabulary import NAMES

KINDS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
PUBLISHED = """
a photo of a bear above a spoon; a photo of three laptops; a photo of a bench and a sports ball; a photo of a stop sign above a fork;
a photo of a laptop below a sports ball; a photo of a computer mouse and a zebra; a photo of three kites; a photo of a donut below a cat;
a photo of a laptop left of a cow; a photo of four donuts; a photo of a bottle right of a train; a photo of a toaster and an oven;
a photo of a horse and a computer keyboard; a photo of a hair drier and a cake; a photo of a purple wine glass and a black apple;
a photo of a dog right of a teddy bear; a photo of a blue fire hydrant; a photo of two clocks
"""
"""Prompts of the benchmark that stand in figures and tables of other papers."""


def test_the_benchmark_s_prompts_come_of_its_rule():
    prompts = geneval()
    tags = [prompt.metadata["tag"] for prompt in prompts]
    assert {tag: tags.count(tag) for tag in dict.fromkeys(tags)} == KINDS
    assert len(set(prompts)) == 553
    assert {words.strip() for words in PUBLISHED.split(";")} <= set(prompts)
    assert prompts[530] == "a photo of a purple suitcase and an orange pizza"
    suitcase, pizza = {"class": "suitcase", "count": 1, "color": "purple"}, {"class": "pizza", "count": 1, "color": "orange"}
    assert dict(prompts[530].metadata) == {"tag": "color_attr", "include": [suitcase, pizza]}


def test_another_numpy_is_no_other_benchmark(monkeypatch):
    monkeypatch.setattr(benchmark, "SEED", 44)
    with pytest.raises(ConfigError, match=r"draws other numbers .* Give its file evaluation_metadata\.jsonl"):
        benchmark.geneval.__wrapped__()


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_the_same_every_time_and_has_all_kinds(name):
    prompts = read_prompts(f"generated/{name}")
    assert [(str(each), dict(each.metadata)) for each in prompts[:50]] == [(str(each), dict(each.metadata)) for each in generated(name, 50)]
    assert generated(name, 50, seed=1) != prompts[:50]
    assert len(prompts) == LISTS[name].count
    assert {prompt.metadata["tag"] for prompt in prompts} == set(LISTS[name].grammar.mix)


@pytest.mark.parametrize("kind", ["composition", "text", "preference"])
def test_what_is_held_out_is_never_trained_on(kind):
    grammar = LISTS[kind].grammar
    trained = {grammar.content(prompt) for seed in (0, 1) for prompt in generated(kind, 2000, seed)}
    held_out = [grammar.content(prompt) for prompt in generated(f"{kind}-held-out")]
    assert not trained & set(held_out)
    assert len(set(held_out)) == len(held_out)


def test_nothing_that_the_benchmark_asks_for_is_trained_on_in_any_order():
    benchmark = {content(prompt) for prompt in geneval()}
    lists = [*generated("composition"), *generated("composition-held-out")]
    assert not benchmark & {content(prompt) for prompt in lists}
    assert not set(geneval()) & set(lists)
    assert content(pair("cat", "dog")) == content(pair("dog", "cat"))
    assert content(positioned("cat", "left of", "dog")) == content(positioned("dog", "right of", "cat"))
    assert content(positioned("cat", "below", "dog")) == content(positioned("dog", "above", "cat"))
    assert content(positioned("cat", "left of", "dog")) != content(positioned("dog", "left of", "cat"))
    assert content(attributed("cat", "red", "dog", "blue")) == content(attributed("dog", "blue", "cat", "red"))
    assert content(attributed("cat", "red", "dog", "blue")) != content(attributed("cat", "blue", "dog", "red"))
    assert content(counted("cat", 2)) != content(counted("cat", 3))


def test_kinds_come_as_often_as_the_mix_says_although_the_benchmark_takes_its_own():
    tags = [prompt.metadata["tag"] for prompt in generated("composition")]
    mix = CompositionGrammar.mix
    for tag, weight in mix.items():
        assert tags.count(tag) / len(tags) == pytest.approx(weight / sum(mix.values()), abs=0.02)


def test_rewards_understand_the_metadata():
    for prompt in [*geneval(), *generated("composition", 500), *generated("composition-held-out")]:
        assert wanted(prompt, NAMES).include
    for prompt in generated("text", 500):
        text = prompt.metadata["text"]
        assert wanted_text(prompt) == text
        assert wanted_text(str(prompt)) == text, "the same stands in the quotes"


def test_too_many_to_hold_out_are_refused():
    with pytest.raises(ConfigError, match="count must be at most about"):
        generated("preference-held-out", 4000)


def test_sources_and_evaluations_take_the_names():
    assert PromptFile("generated/text", shuffle=False).draw(0, 2) == generated("text")[:2]
    assert list(HeldOutEvaluation("generated/preference-held-out").held_out) == generated("preference-held-out")
    with pytest.raises(ConfigError, match=r"there is no list generated/songs; known: composition, composition-held-out, .*geneval"):
        read_prompts("generated/songs")


def test_the_command_writes_a_file_that_is_read_back(tmp_path, capsys):
    for name, options in (("composition", ["--count", "30", "--seed", "3"]), ("text-held-out", []), ("geneval", [])):
        file = tmp_path / "lists" / f"{name}.jsonl"
        assert main(["prompts", name, str(file), *options]) == 0
        assert f"{file}: {len(read_prompts(str(file)))} prompts" in capsys.readouterr().out
    drawn = generated("composition", 30, 3)
    again = read_prompts(str(tmp_path / "lists" / "composition.jsonl"))
    assert [(str(each), dict(each.metadata)) for each in again] == [(str(each), dict(each.metadata)) for each in drawn]
    assert main(["prompts", "text", str(tmp_path / "list.txt")]) == 2
    assert "must end in .jsonl" in capsys.readouterr().err
    assert main(["prompts", "geneval", str(tmp_path / "a.jsonl"), "--count", "3"]) == 2
    assert "is the benchmark's fixed list" in capsys.readouterr().err
    assert main(["prompts", "text", str(file)]) == 2
    assert "there is a file" in capsys.readouterr().err


def test_files_of_others_are_read_as_they_are(tmp_path):
    """GenEval's evaluation_metadata.jsonl, Flow-GRPO's train_metadata.jsonl, and a list such as PickScore's train.txt."""
    lines = [{**prompt.metadata, "prompt": str(prompt)} for prompt in geneval()]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = read_prompts(str(tmp_path / "evaluation_metadata.jsonl"))
    assert [(str(each), dict(each.metadata)) for each in read] == [(str(each), dict(each.metadata)) for each in geneval()]
    (tmp_path / "train_metadata.jsonl").write_text(
        '{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}], '
        '"exclude": [], "prompt": "a photo of a cat left of a dog"}\n'
        '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}], "prompt": "two cats"}\n'
    )
    position, counting = (wanted(prompt, NAMES) for prompt in read_prompts(str(tmp_path / "train_metadata.jsonl")))
    assert position.include[1].position == ("left of", 0)
    assert counting.counting
    assert counting.exclude[0].count == 3
    (tmp_path / "train.txt").write_text("cute cat, 8k, trending on artstation\nAn astronaut: (masterpiece:1.2) “hello”\n")
    assert read_prompts(str(tmp_path / "train.txt")) == ["cute cat, 8k, trending on artstation", "An astronaut: (masterpiece:1.2) “hello”"]


def test_lists_do_not_change_between_releases():
    """A run that is resumed goes on with the same prompts."""
    text = "\n".join(str(prompt) for name in LISTS for prompt in generated(name, 100))
    assert hashlib.sha256(text.encode()).hexdigest() == "696992efc4eb9dd0d395a61f49c2ebd2416913107f6e2702aab6f3482fb3f4cc"
