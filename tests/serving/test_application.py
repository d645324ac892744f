"""The reward server over real sockets: scores, and what it refuses."""

import http.client
import json
import socket
import threading
import time

import pytest
import torch
from running import ask, request, running

import diffalign
from diffalign.core import Partial, Prompt, RewardError
from diffalign.rewards.remote import RemoteReward
from diffalign.rewards.wire import ABOUT, HEALTH, SCORE, Limits, ScoreRequest, encode_request, read_request
from diffalign.serving import Settings

LIMITS = Limits(body=200_000, images=8, pixels=8 * 64 * 64)


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3)) + torch.tensor([float(prompt.metadata.get("plus", 0)) for prompt in prompts])


def kind(answer):
    status, message = answer
    return status, message["error"]["kind"]


@pytest.fixture(scope="module")
def server():
    with running(brightness, limits=LIMITS) as address:
        yield address


@pytest.fixture(scope="module")
def guarded():
    with running(brightness, limits=LIMITS, token="open sesame") as address:
        yield address


def test_the_client_gets_the_scores_of_the_local_reward(server):
    images = torch.rand(11, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt("p", {"plus": place}) for place in range(11)]
    reward = RemoteReward("http://{}:{}".format(*server), batch=4)
    assert torch.equal(reward(images, prompts), brightness((images * 255).round() / 255, prompts))
    reward.close()


def test_a_served_reward_reads_the_source_and_the_size_of_a_prompt():
    prompts = [Prompt("a", {"height": 8, "width": 6}, "likes"), Prompt("b", {}, "counts"), Prompt("c")]
    reward = lambda images, prompts: torch.tensor([len(p.source or "") + 10.0 * sum(p.size or ()) for p in prompts])  # noqa: E731
    images = torch.zeros(3, 3, 8, 6)
    with running(reward) as address:
        for batch in (1, 3):
            assert RemoteReward("http://{}:{}".format(*address), batch=batch)(images, prompts).tolist() == [145.0, 6.0, 0.0]


def test_a_served_reward_need_not_apply_to_every_picture():
    asked = []

    def smile(images, prompts):
        asked.append(len(images))
        brightness = images.mean(dim=(1, 2, 3))
        return Partial(brightness, brightness > 0.5)

    images = torch.tensor([1.0, 0.0, 0.6, 0.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    with running(smile) as address:
        for batch in (1, 4):
            scores = RemoteReward("http://{}:{}".format(*address), batch=batch, retries=0)(images, ["p"] * 4)
            assert scores.applies.tolist() == [True, False, True, False]
            torch.testing.assert_close(scores.scores, torch.tensor([1.0, 0.6]))
        everywhere = RemoteReward("http://{}:{}".format(*address))(images[[0, 2]], ["p"] * 2)
        torch.testing.assert_close(everywhere, torch.tensor([1.0, 0.6]))
        assert sum(asked) == 10  # nothing was tried again


def test_health_and_version(server):
    assert ask(server, None, "GET", HEALTH) == (200, {"status": "ok", "waiting": 0})
    status, about = ask(server, None, "GET", ABOUT)
    assert (status, about["version"], about["diffalign"], about["reward"]) == (200, 1, diffalign.__version__, "tested")
    assert about["versions"] == [1, 2]
    assert about["limits"] == {"body": 200_000, "images": 8, "pixels": 32_768, "text": 20_000}


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer open", "Basic open sesame", "open sesame", "Bearer öpen"])
def test_whoever_lacks_the_token_is_refused(guarded, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    assert kind(ask(guarded, request(), headers=headers)) == (401, "unauthorised")
    assert kind(ask(guarded, None, "GET", ABOUT, headers=headers)) == (401, "unauthorised")
    assert ask(guarded, None, "GET", HEALTH, headers=headers)[0] == 200  # for those who watch over it


def test_the_token_opens(guarded, monkeypatch):
    assert ask(guarded, request(), headers={"Authorization": "bearer open sesame"})[0] == 200
    monkeypatch.setenv("DIFFALIGN_REWARD_TOKEN", "open sesame")
    assert len(RemoteReward("http://{}:{}".format(*guarded))(torch.zeros(1, 3, 2, 2), ["a"])) == 1
    monkeypatch.setenv("DIFFALIGN_REWARD_TOKEN", "wrong")
    with pytest.raises(RewardError, match="answered 401: this server requires its bearer token"):
        RemoteReward("http://{}:{}".format(*guarded))(torch.zeros(1, 3, 2, 2), ["a"])


def test_oversized_requests_are_refused(server):
    assert kind(ask(server, request(count=9))) == (400, "malformed")  # images
    assert kind(ask(server, request(size=182))) == (400, "malformed")  # pixels
    assert kind(ask(server, b" " * 200_001)) == (413, "too_large")
    with pytest.raises(RewardError, match="answered 400: images must be a list of 1 to 8 images; got 9"):
        RemoteReward("http://{}:{}".format(*server))(torch.zeros(9, 3, 2, 2), ["a"] * 9)


def test_a_large_body_is_refused_before_it_is_sent(server):
    with socket.create_connection(server, timeout=10) as connection:
        announced = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {10**12}\r\n\r\n"
        connection.sendall(announced.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_of_unknown_length_is_refused(server):
    with socket.create_connection(server, timeout=10) as connection:
        start = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"
        connection.sendall(start.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 411")


def test_large_headers_are_refused(server):
    with socket.create_connection(server, timeout=10) as connection:
        connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 10**6)
        assert connection.recv(1000)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"version": 1}', b"\xff\xfe", b"[" * 10**5])
def test_malformed_bodies_are_refused(server, body):
    assert kind(ask(server, body)) == (400, "malformed")


def test_other_requests_are_refused(server):
    assert kind(ask(server, request(), headers={"Content-Type": "text/plain"})) == (415, "not_json")
    assert kind(ask(server, None, "GET", SCORE)) == (405, "not_allowed")
    assert kind(ask(server, request(), path="/")) == (404, "not_found")
    assert ask(server, request(), headers={"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


def test_a_body_that_does_not_come_is_given_up():
    with running(brightness, body_timeout=0.2) as address, socket.create_connection(address, timeout=10) as connection:
        head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


FAILING = {
    "nan": (lambda images, prompts: [float("nan")] * len(images), 422, "tested returned nan for image 0 of 1"),
    "shape": (lambda images, prompts: torch.ones(len(images), 1), 422, "tested returned shape (1, 1) for 1 images"),
    "refuses": (lambda images, prompts: prompts[0].metadata["target"], 422, "raised KeyError for 1 images: 'target'"),
    "breaks": (lambda images, prompts: 1 / 0, 500, "raised ZeroDivisionError"),
    "memory": (lambda images, prompts: bytearray(10**15), 500, "memory ran out for a single image of 4 x 4"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_reward_that_fails_is_an_error_of_its_request(case):
    reward, status, text = FAILING[case]
    with running(reward) as address:
        for _ in range(2):  # and the server goes on
            answer = ask(address, request())
            assert kind(answer) == (status, "reward_failed" if status == 500 else "reward_refused")
            assert text in answer[1]["error"]["message"]


def test_the_queue_is_bounded_and_says_so():
    go_on = threading.Event()

    def slow(images, prompts):
        go_on.wait(20)
        return [1.0] * len(images)

    with running(slow, queue=2) as address:
        answers = []
        asking = [threading.Thread(target=lambda: answers.append(ask(address, request()))) for _ in range(3)]
        for thread in asking:
            thread.start()
        while not answers:  # whichever comes last is refused; the others have no answer yet
            time.sleep(0.01)
        assert [kind(answer) for answer in answers] == [(503, "busy")]
        go_on.set()
        for thread in asking:
            thread.join(10)
        assert sorted(status for status, *_ in answers) == [200, 200, 503]
        assert ask(address, request())[0] == 200  # room again


def test_memory_is_bounded():
    limits = Limits(body=10_000, images=8, pixels=8 * 64 * 64)
    least = 4 * 10_000 + 3 * limits.pixels
    with pytest.raises(ValueError, match=f"Settings.memory must hold the largest request that the limits allow, {least} bytes"):
        Settings(limits=limits, memory=least - 1)
    with running(brightness, limits=limits, memory=least, patience=0.1) as address:
        with socket.create_connection(address) as idle:  # holds room for its body as long as it comes
            head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10000\r\n\r\n"
            idle.sendall(head.encode() + b" " * 5000)
            time.sleep(0.1)
            white = torch.full((8, 3, 64, 64), 255, dtype=torch.uint8)
            body = encode_request(ScoreRequest("x", white, (Prompt("a"),) * 8))
            assert kind(ask(address, body)) == (503, "busy")
        time.sleep(0.1)
        assert ask(address, body)[0] == 200


def test_requests_for_which_memory_is_taken_are_waited_for():
    def slow(images, prompts):
        time.sleep(0.05)
        return brightness(images, prompts)

    bodies = [request(2, 16, f"id-{place}", seed=place) for place in range(12)]
    limits = Limits(body=max(map(len, bodies)), images=2, pixels=2 * 16 * 16)
    answers = {}
    with running(slow, batch=2, limits=limits, memory=4 * limits.body + 3 * limits.pixels) as address:
        asking = [threading.Thread(target=lambda body=body: answers.update({body: ask(address, body)})) for body in bodies]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(20)
    assert [answers[body][0] for body in bodies] == [200] * 12
    for place, body in enumerate(bodies):
        assert answers[body][1]["id"] == f"id-{place}"
        images = read_request(body, limits).unpack().images.float() / 255
        assert answers[body][1]["scores"] == images.mean(dim=(1, 2, 3)).tolist()


def test_who_finds_no_room_is_told_when_there_may_be_some():
    begun, go_on = threading.Event(), threading.Event()

    def slow(images, prompts):
        if len(images) == 1:
            time.sleep(0.6)  # the pace of the server: 0.6 s an image
        else:
            begun.set()
            go_on.wait(20)
        return [1.0] * len(images)

    with running(slow, queue=1) as address:
        assert ask(address, request())[0] == 200
        waiting = threading.Thread(target=ask, args=(address, request(4)))
        waiting.start()
        assert begun.wait(10)
        connection = http.client.HTTPConnection(*address, timeout=20)
        connection.request("POST", SCORE, request(), {"Content-Type": "application/json"})
        refused = connection.getresponse()
        connection.close()
        go_on.set()
        waiting.join(10)
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) >= 3  # four images take at least 2.4 s


def test_a_client_that_has_gone_is_not_scored():
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def slow(images, prompts):
        seen.extend(prompts)
        begun.set()
        go_on.wait(20)
        return [1.0] * len(images)

    with running(slow, batch=1) as address:
        first = threading.Thread(target=ask, args=(address, request(prompts=[Prompt("first")])))
        first.start()
        begun.wait(10)
        with socket.create_connection(address) as impatient:
            body = request(prompts=[Prompt("impatient")])
            head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            impatient.sendall(head.encode() + body)
            while ask(address, None, "GET", HEALTH)[1]["waiting"] < 1:
                time.sleep(0.01)
        while ask(address, None, "GET", HEALTH)[1]["waiting"] > 0:
            time.sleep(0.01)
        go_on.set()
        first.join(10)
        assert ask(address, request(prompts=[Prompt("last")]))[0] == 200
        assert seen == ["first", "last"]


def test_tokens_that_cannot_stand_in_a_header_are_refused():
    for token in ("", " x", "two\nlines", "ü"):
        with pytest.raises(ValueError, match=r"Settings\.token must be printable ASCII"):
            Settings(token=token)
    assert "secret" not in repr(Settings(token="secret"))


def test_answers_are_the_documented_json(server):
    status, message = ask(server, request(count=2, identity="my-id_7"))
    assert status == 200
    assert message.keys() == {"version", "id", "scores"}
    assert (message["version"], message["id"], len(message["scores"])) == (1, "my-id_7", 2)
    assert json.dumps(message)
