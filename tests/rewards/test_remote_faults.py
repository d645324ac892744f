"""Whatever a server does wrong ends in an error that says so: never in a zero, never in a wait without end."""

import json
import time

import pytest
import torch
from fake_server import FakeServer, drip, drip_to_the_end, hang_up, lengths, says, scores, send, sleep, stop_in_the_answer
from ring import MODES

from diffalign.core import AlignmentLoop, Prompt, RewardError
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.rewards.connections import Answer, Connections
from diffalign.rewards.remote import RemoteReward
from diffalign.rewards.servers import _asked_pause
from diffalign.samplers import FixedPlan, TreeSampler

IMAGES = torch.zeros(2, 3, 4, 4)
PROMPTS = [Prompt("a"), Prompt("bb")]


def ask(server, **settings):
    return RemoteReward(server.url, **{"timeout": 5.0, "retries": 2, "backoff": 0.01, **settings})(IMAGES, PROMPTS)


def another_id(handler, body):
    send(handler, 200, json.dumps({"version": 1, "id": "someone-else", "scores": [1, 2]}).encode())


FOR_NOUGHT = {
    "garbage": (says(200, b"\xff\x00<html>"), "the message is not JSON"),
    "a web page": (says(200, b"<html>sign in</html>"), "the message is not JSON"),
    "deep": (says(200, b"[" * 50_000), "the message is not JSON"),
    "too few": (scores(1.0), "must hold 2 scores, one per image; got 1"),
    "too many": (scores(1.0, 2.0, 3.0), "must hold 2 scores, one per image; got 3"),
    "NaN": (scores(1.0, float("nan")), "score of image 1 of 2 must be a finite number; got nan"),
    "infinite": (scores(float("inf"), 1.0), "score of image 0 of 2 must be a finite number; got inf"),
    "beyond floats": (scores(10**400, 1.0), "score of image 0 of 2 must be a finite number"),
    "text": (scores("1.0", 1.0), "score of image 0 of 2 must be a finite number; got '1.0'"),
    "null": (scores(1.0, None), "score of image 1 of 2 must be a finite number; got None"),
    "a truth": (scores(True, 1.0), "score of image 0 of 2 must be a finite number; got True"),
    "another's": (another_id, "belongs to another request: its id is 'someone-else'"),
    "other version": (says(200, b'{"version": 3, "id": "", "scores": [1, 2]}'), "version must be 1 or 2; got 3"),
    "refusal": (says(422, b'{"version":1,"error":{"kind":"reward_refused","message":"no metadata"}}'), "answered 422: no metadata"),
    "unauthorised": (says(401, b"who are you"), "answered 401: 'who are you'"),
    "not ours": (says(404, b'{"error": "gone"}'), 'answered 404: \'{"error": "gone"}\''),
    "elsewhere": (says(307, b"", [("Location", "http://127.0.0.1:9/")]), "answered 307"),
}


@pytest.mark.parametrize("case", FOR_NOUGHT)
def test_an_answer_of_no_use_is_an_error_at_once(case):
    behaviour, message = FOR_NOUGHT[case]
    with FakeServer(behaviour) as server:
        with pytest.raises(RewardError) as caught:
            ask(server)
        assert message in str(caught.value)
        assert server.url in str(caught.value)
        assert len(server.bodies) == 1


TRIED_AGAIN = {
    "killed": (hang_up, "RemoteDisconnected"),
    "killed in the answer": (stop_in_the_answer, "IncompleteRead"),
    "overlong": (says(200, b" " * 10**6), "the answer is longer than"),
    "not HTTP": (lambda handler, body: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"), "BadStatusLine"),
    "broken": (says(500, b"oh"), "answered 500: 'oh'"),
    "gateway": (says(502, b"<html>"), "answered 502"),
    "full": (says(503, b'{"error": {"kind": "busy", "message": "come back later"}}'), "answered 503: come back later"),
}


@pytest.mark.parametrize("case", TRIED_AGAIN)
def test_what_may_pass_is_tried_again_and_then_an_error(case):
    behaviour, message = TRIED_AGAIN[case]
    with FakeServer(behaviour) as server:
        with pytest.raises(RewardError, match="no score after 3 tries; the last failed at http") as caught:
            ask(server)
        assert message in str(caught.value)
        assert len(server.bodies) == 3


@pytest.mark.parametrize("behaviour", [hang_up, stop_in_the_answer, says(500, b""), says(503, b""), says(429, b"", [("Retry-After", "0")])])
def test_recovery_gives_the_scores(behaviour):
    with FakeServer(behaviour, behaviour, lengths) as server:
        assert ask(server).tolist() == [1.0, 2.0]
        assert len(server.bodies) == 3
        assert len({json.loads(body)["id"] for body in server.bodies}) == 1


@pytest.mark.parametrize("behaviour", [sleep(5.0), drip, drip_to_the_end], ids=["silent", "dripping", "dripping to the end"])
def test_a_slow_server_is_left_at_the_deadline(behaviour):
    with FakeServer(behaviour) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"no score after 2 tries; the last failed at .*: no complete answer within 0.3 s"):
            ask(server, timeout=0.3, retries=1)
        assert time.monotonic() - start < 3.0


def test_a_slow_answer_leaves_nothing_for_the_next_request():
    def late(handler, body):
        time.sleep(0.5)
        scores(8.0, 9.0)(handler, body)

    with FakeServer(late, lengths) as server:
        assert ask(server, timeout=0.2).tolist() == [1.0, 2.0]


def test_retry_after_is_kept():
    with FakeServer(says(503, b"", [("Retry-After", "1")]), lengths) as server:
        start = time.monotonic()
        assert ask(server).tolist() == [1.0, 2.0]
        assert time.monotonic() - start >= 1.0


def test_pauses_double():
    reward = RemoteReward("http://127.0.0.1:9", backoff=1.0)
    pauses = [reward._servers._pause(lap, 0.0) for lap in (1, 2, 3, 4, 9)]
    for pause, expected in zip(pauses, (1, 2, 4, 8, 30), strict=True):
        assert 0.75 * expected <= pause <= 1.25 * expected


@pytest.mark.parametrize(("asked", "pause"), [("120", 120.0), ("99999", 600.0)])
def test_a_long_retry_after_is_kept_up_to_ten_minutes(asked, pause):
    answer = Answer(503, {"retry-after": asked}, b"")
    assert RemoteReward("http://127.0.0.1:9")._servers._pause(1, _asked_pause(answer)) == pause


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://[::1]/v1", ("::1", 80)),
        ("https://[2001:db8::17]", ("2001:db8::17", 443)),
        ("http://[::1]:81", ("::1", 81)),
        ("http://host", ("host", 80)),
        ("https://host:8443/v1", ("host", 8443)),
    ],
)
def test_a_url_without_a_port_takes_that_of_its_scheme(url, address):
    connection = Connections(url, timeout=1.0, longest=10)._connection()
    assert (connection.host, connection.port) == address


def test_nobody_listens():
    with pytest.raises(RewardError, match=r"no score after 2 tries; the last failed at http://127\.0\.0\.1:9: ConnectionRefusedError"):
        RemoteReward("http://127.0.0.1:9", retries=1, backoff=0.01)(IMAGES, PROMPTS)


def test_the_first_failure_stops_the_rest():
    with FakeServer(scores()) as server:
        with pytest.raises(RewardError, match="must hold 1 scores"):
            RemoteReward(server.url, batch=1, concurrency=1)(torch.zeros(50, 3, 2, 2), ["a"] * 50)
        assert len(server.bodies) < 10


def test_a_failed_score_leaves_no_half_written_step():
    policy = GaussianMixturePolicy(MODES, 0.3)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    sampler = TreeSampler(steps=4, plan=FixedPlan(splits=(1, 2), branches=2, eta=0.5))
    with FakeServer(scores(1.0)) as server:  # right for none of the chunks
        loop = AlignmentLoop(SoftmaxTB(policy), sampler, RemoteReward(server.url), Prompts(["a"]))
        with pytest.raises(RewardError, match=r"RemoteReward.*must hold"):
            loop.run(2)
    assert all(value.equal(before[name]) for name, value in policy.state_dict().items())
    assert not any(optimizer.state for optimizer in loop.running.values())
