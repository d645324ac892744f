"""A vision-language model as a judge, played by a server whose answers are known."""

import base64
import io
import json

import pytest
import torch
from fake_server import FakeServer, hang_up, says, send
from PIL import Image

from diffalign.core import ConfigError, Prompt, RewardError
from diffalign.rewards.judge import Judge

IMAGES = torch.stack([torch.full((3, 4, 6), level) for level in (0.0, 0.4, 1.0)])
PROMPTS = [Prompt("black"), Prompt("grey"), Prompt("white")]


def answers(content):
    """The same completion for everything."""
    return says(200, json.dumps({"choices": [{"message": {"content": content}}]}).encode())


def brightness(handler, body):
    """Looks at the picture that came."""
    url = json.loads(body)["messages"][0]["content"][1]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert picture.size == (6, 4)
    mark = json.dumps({"reason": "seen", "score": picture.getpixel((0, 0))[0] / 25.5})
    send(handler, 200, json.dumps({"choices": [{"message": {"content": mark}}]}).encode())


def judge(server, **settings):
    return Judge(server.url + "/v1", "vlm", **{"backoff": 0.01, "retries": 1, "timeout": 5.0, **settings})


def test_each_picture_gets_its_own_mark_brought_to_one():
    with FakeServer(brightness) as server:
        torch.testing.assert_close(judge(server)(IMAGES, PROMPTS), torch.tensor([0.0, 0.4, 1.0]))
        assert {path for path, _ in server.headers} == {"/v1/chat/completions"}
        bodies = [json.loads(body) for body in server.bodies]
    texts = [body["messages"][0]["content"][0]["text"] for body in bodies]
    assert sorted(word for word in ("black", "grey", "white") for text in texts if f"\n{word}\n" in text) == ["black", "grey", "white"]
    assert all("from 0 (not at all) to 10 (perfectly)" in text for text in texts)
    assert bodies[0]["model"] == "vlm"
    assert bodies[0]["response_format"]["json_schema"]["schema"]["required"] == ["reason", "score"]


@pytest.mark.parametrize(("form", "expected"), [("json_object", {"type": "json_object"}), ("none", None)])
def test_the_form_of_the_answer_is_asked_for_as_the_end_point_knows_it(form, expected):
    with FakeServer(answers('{"score": 5}')) as server:
        assert judge(server, answer_format=form)(IMAGES[:1], PROMPTS[:1]).tolist() == [0.5]
        assert json.loads(server.bodies[0]).get("response_format") == expected


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("Does it show ${target}, as in '$prompt'? $$5 for a good answer. $low..$high")
    with FakeServer(answers('{"score": 1}')) as server:
        reward = judge(server, template=str(file), low=1, high=5)
        assert reward(IMAGES[:1], [Prompt("a cat", {"target": "a tail"})]).tolist() == [0.0]
        text = json.loads(server.bodies[0])["messages"][0]["content"][0]["text"]
        assert text == "Does it show a tail, as in 'a cat'? $5 for a good answer. 1..5"
        with pytest.raises(RewardError, match=r"names \$target, but prompt 'a dog' has no metadata 'target'"):
            reward(IMAGES[:1], [Prompt("a dog")])
        with pytest.raises(ConfigError, match=r"names \$target, but prompt 'a dog' has no metadata 'target'"):
            reward.require([Prompt("a cat", {"target": "a tail"}), Prompt("a dog")])
        assert len(server.bodies) == 1


def test_the_template_that_reasons_first_asks_for_reasons_and_reads_the_mark_behind_them():
    thought = '<think>hm, a 3?</think>```json\n{"reason": "1. a cat: there. 2. black: {it is grey}.", "score": 4}\n```'
    with FakeServer(answers(thought)) as server:
        assert judge(server, template="reasoned", max_tokens=1024)(IMAGES[:1], PROMPTS[:1]).tolist() == pytest.approx([0.4])
        (body,) = map(json.loads, server.bodies)
    text = body["messages"][0]["content"][0]["text"]
    assert "\nblack\n" in text
    assert text.index('"reason"') < text.index('"score"')
    assert "from 0 (nothing fits) to 10\n(everything fits" in text
    assert body["max_tokens"] == 1024
    assert list(body["response_format"]["json_schema"]["schema"]["properties"]) == ["reason", "score"]


@pytest.mark.parametrize("text", ["no place for it", "costs $ 5: $prompt"])
def test_a_template_that_cannot_be_used_is_refused(tmp_path, text):
    file = tmp_path / "template.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"must hold \$prompt, and '\$\$'"):
        Judge("http://127.0.0.1:9/v1", "vlm", template=str(file))
    with pytest.raises(ConfigError, match=r"must be judge, reasoned or a readable UTF-8 file; got 'nowhere\.txt'"):
        Judge("http://127.0.0.1:9/v1", "vlm", template="nowhere.txt")


def test_thoughts_and_fences_are_read_over():
    content = '<think>{"score": 1}? No.</think>\nHere:\n```json\n{"reason": "a {brace}", "score": 7.5}\n```'
    with FakeServer(answers(content)) as server:
        assert judge(server)(IMAGES[:1], PROMPTS[:1]).tolist() == [0.75]


BAD = ["great!", '{"mark": 5}', '{"score": "5"}', '{"score": 11}', '{"score": -1}', '{"score": NaN}', '{"score": true}', "[5]", None, 5]


@pytest.mark.parametrize("content", BAD)
def test_an_answer_without_a_mark_is_asked_again_and_is_then_an_error(content):
    with FakeServer(answers(content)) as server:
        with pytest.raises(
            RewardError, match=r"no score after 2 tries; .*the judge must answer with JSON with a number score from 0 to 10"
        ):
            judge(server)(IMAGES[:1], PROMPTS[:1])
        assert len(server.bodies) == 2
    with FakeServer(answers(content), answers('{"score": 10}')) as server:
        assert judge(server)(IMAGES[:1], PROMPTS[:1]).tolist() == [1.0]


@pytest.mark.parametrize(
    "behaviour", [hang_up, says(500, b"x"), says(429, b"slow down"), says(200, b"<html>"), says(200, b'{"choices": []}')]
)
def test_faults_that_pass_are_tried_again(behaviour):
    with FakeServer(behaviour, answers('{"score": 10}')) as server:
        assert judge(server)(IMAGES[:1], PROMPTS[:1]).tolist() == [1.0]


def test_a_refusal_is_an_error_at_once():
    with FakeServer(says(401, b'{"error": "bad key"}')) as server:
        with pytest.raises(RewardError, match=r"Judge: http.* answered 401: .*bad key"):
            judge(server)(IMAGES[:1], PROMPTS[:1])
        assert len(server.bodies) == 1


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with FakeServer(answers('{"score": 0}')) as server:
        judge(server)(IMAGES[:1], PROMPTS[:1])
        assert server.headers[0][1]["Authorization"] == "Bearer sk-1"


def test_marks_need_a_range():
    with pytest.raises(ValueError, match=r"Judge\.high must be above low"):
        Judge("http://127.0.0.1:9/v1", "vlm", low=5, high=5)
