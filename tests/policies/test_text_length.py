"""Texts that are longer than any encoder reads are told before a picture is drawn."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import Guided
from diffalign.core.unessential import say_once
from diffalign.policies import FlowMatchingPolicy
from diffalign.policies.text_length import unread

FAMILIES = ["sd3", "flux-dev", "qwen-image", "z-image", "sana", "sd15", "sdxl"]
LONG = "seven small green cubes on a long wooden table " * 60


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_read_changes_no_encoding(load, name):
    policy = load(name)
    encoded = [policy.encode([Prompt(text)]).tensors for text in (LONG, f"{LONG} and a red cat")]
    assert unread(policy.family, [LONG])[0] > 0
    assert all(torch.equal(encoded[0][key], encoded[1][key]) for key in encoded[0])
    assert unread(policy.family, ["a cat", ""]) == [0, 0]


def test_texts_that_surely_fit_are_not_tokenised(load, monkeypatch):
    family = load("sd15").family
    monkeypatch.setattr(type(family.pipeline.tokenizer), "__call__", None)
    assert unread(family, ["a cat", "two red cubes"] * 1000) == [0] * 2000


def test_a_pipeline_without_a_plain_tokenizer_says_nothing(load, monkeypatch):
    family = load("z-image").family
    monkeypatch.setattr(type(family.pipeline), "components", {"tokenizer": object()})  # a processor of texts and pictures
    assert unread(family, [LONG, "a cat"]) == [0, 0]


def test_a_text_that_one_encoder_reads_whole_is_not_cut(load):
    policy = load("sd3", max_sequence_length=100)
    clip = policy.family.pipeline.tokenizer.model_max_length
    text = " ".join(["a"] * (clip + 1))
    assert len(policy.family.pipeline.tokenizer(text).input_ids) > clip
    assert unread(policy.family, [text]) == [0]
    encoded = [policy.encode([Prompt(each)]).tensors for each in (text, f"{text} b")]
    assert any(not torch.equal(encoded[0][key], encoded[1][key]) for key in encoded[0])


def test_cut_prompts_are_said_once_and_the_first_is_named(capsys):
    say_once.cache_clear()
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", max_sequence_length=16)
    for _ in range(2):
        policy.require([Prompt("two red circles"), Prompt(LONG), Prompt(f"{LONG} more")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 of 3 prompts are longer than the policy reads" in said
    assert f"First: {LONG[:60]!r}"[:-1] in said
    assert "max_sequence_length (now 16)" in said
    policy.require([Prompt("a purple triangle left of a green square")])  # one of its encoders cuts it off, another reads it whole
    assert capsys.readouterr().err == ""


def test_the_end_of_a_negative_prompt_that_is_not_read_is_said(capsys):
    say_once.cache_clear()
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", max_sequence_length=16)
    Guided(policy, policy.no_guidance, LONG).scaled(policy.no_guidance)
    Guided(policy, 4.0).require([Prompt("two red circles")])
    assert capsys.readouterr().err == ""
    guided = Guided(policy, 4.0, LONG)
    guided.scaled(3.0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        f"1 of 1 negative prompts are longer than the policy reads; the end of each has no influence on its pictures. First: {LONG[:60]!r}"[
            :-1
        ]
        in said
    )
