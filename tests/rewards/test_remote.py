"""Rewards over HTTP: the same scores, in order, over connections that stay."""

import json

import pytest
import torch
from fake_server import FakeServer, hang_up, lengths, says, send

from diffalign.core import ConfigError, Prompt, RewardError
from diffalign.rewards.remote import RemoteReward
from diffalign.rewards.wire import Limits, encode_error, read_request

IMAGES = torch.rand(7, 3, 8, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("x" * (place + 1), {"target": place, "box": [0.5, {"deep": None}]}) for place in range(7)]


def brightness(handler, body):
    request = read_request(body, Limits()).unpack()
    values = (request.images.float() / 255).mean(dim=(1, 2, 3)).tolist()
    send(handler, 200, json.dumps({"version": 1, "id": request.id, "scores": values}).encode())


def test_scores_come_back_in_order_however_the_images_are_split():
    rounded = (IMAGES * 255).round() / 255
    with FakeServer(brightness) as server:
        for batch, concurrency in ((16, 1), (3, 1), (1, 4), (2, 3)):
            scores = RemoteReward(server.url, batch=batch, concurrency=concurrency)(IMAGES, PROMPTS)
            assert torch.equal(scores, rounded.mean(dim=(1, 2, 3)))


def test_metadata_travels():
    with FakeServer(lengths) as server:
        assert RemoteReward(server.url)(IMAGES, PROMPTS).tolist() == [1, 2, 3, 4, 5, 6, 7]
        sent = read_request(server.bodies[0], Limits())
    assert sent.prompts == tuple(PROMPTS)
    assert [dict(prompt.metadata) for prompt in sent.prompts] == [dict(prompt.metadata) for prompt in PROMPTS]


def test_a_server_of_version_1_serves_prompts_without_a_source_and_refuses_the_others_at_once():
    def older(handler, body):
        version = json.loads(body)["version"]
        if version == 1:
            lengths(handler, body)
        else:
            send(handler, 400, encode_error("malformed", f"version must be 1; got {version}. Both ends need the same protocol."))

    with FakeServer(older) as server:
        reward = RemoteReward(server.url, retries=2, backoff=0.0)
        assert reward(IMAGES, PROMPTS).tolist() == [1, 2, 3, 4, 5, 6, 7]
        with pytest.raises(RewardError, match=r"answered 400: version must be 1; got 2\. Both ends need the same protocol"):
            reward(IMAGES[:1], [Prompt("a", {}, "likes")])
        assert len(server.bodies) == 2


def test_plain_strings_serve_as_prompts():
    with FakeServer(lengths) as server:
        assert RemoteReward(server.url)(IMAGES[:2], ["ab", "abc"]).tolist() == [2, 3]


def test_connections_are_used_again():
    with FakeServer(lengths) as server:
        reward = RemoteReward(server.url, batch=1, concurrency=1)
        reward(IMAGES, PROMPTS)
        reward(IMAGES, PROMPTS)
        assert (len(server.bodies), server.connections) == (14, 1)
        reward.close()
        reward(IMAGES, PROMPTS)
        assert server.connections == 2


def test_a_kept_connection_that_the_server_has_closed_costs_no_retry():
    def closing(handler, body):
        lengths(handler, body)
        handler.close_connection = True  # without saying so

    with FakeServer(closing) as server:
        reward = RemoteReward(server.url, retries=0)
        for _ in range(3):
            assert reward(IMAGES, PROMPTS).tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert (len(server.bodies), server.connections) == (3, 3)


def test_several_servers_share_the_work():
    with FakeServer(lengths) as one, FakeServer(lengths) as two:
        RemoteReward([one.url, two.url], batch=1)(IMAGES, PROMPTS)
        assert sorted([len(one.bodies), len(two.bodies)]) == [3, 4]


def test_another_server_takes_over_at_once():
    with FakeServer(hang_up) as broken, FakeServer(says(503, b"full")) as full, FakeServer(lengths) as whole:
        reward = RemoteReward([broken.url, "http://127.0.0.1:9", full.url, whole.url], batch=1, retries=0)
        assert reward(IMAGES, PROMPTS).tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert len(whole.bodies) == 7


def test_the_token_comes_from_the_environment_and_stays_out_of_sight(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-7\n")
    with FakeServer(lengths) as server:
        reward = RemoteReward(f"{server.url}/behind/a/proxy/", token_variable="MY_TOKEN")
        reward(IMAGES, PROMPTS)
        RemoteReward(server.url, token_variable="NO_TOKEN")(IMAGES, PROMPTS)
    (path, headers), (plain_path, plain) = server.headers
    assert (path, headers["Authorization"]) == ("/behind/a/proxy/v1/score", "Bearer secret-7")
    assert plain_path == "/v1/score"
    assert "Authorization" not in plain
    assert "secret" not in repr(reward)
    monkeypatch.setenv("MY_TOKEN", "two\nlines")
    with pytest.raises(ValueError, match="MY_TOKEN must be printable ASCII"):
        RemoteReward(server.url, token_variable="MY_TOKEN")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://host", "http://", "http://host:99999", "http://me:pass@host", "http://h?a=1", "http://h\n"]
)
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(ValueError, match="url must be http://HOST:PORT"):
        RemoteReward(url)


def test_what_cannot_travel_is_named():
    reward = RemoteReward("http://127.0.0.1:9", retries=0)
    with pytest.raises(RewardError, match="metadata 'mask' of prompt 'a cat' cannot be sent as JSON"):
        reward(IMAGES[:1], [Prompt("a cat", {"mask": torch.zeros(2)})])
    with pytest.raises(ConfigError, match="metadata 'mask' of prompt 'a cat' cannot be sent as JSON"):
        reward.require([Prompt("a dog"), Prompt("a cat", {"mask": {1, 2}})])
    with pytest.raises(RewardError, match="some pixels are NaN"):
        reward(torch.full((1, 3, 2, 2), float("nan")), ["a"])
    with pytest.raises(RewardError, match=r"must have shape \[K, 3, H, W\]; got \(1, 4, 2, 2\)"):
        reward(torch.zeros(1, 4, 2, 2), ["a"])
    with pytest.raises(RewardError, match="got 7 images and 2 prompts"):
        reward(IMAGES, PROMPTS[:2])
    with pytest.raises(ValueError, match="at least one server"):
        RemoteReward([])
