"""Requests made of noise: every answer is one of the protocol's, and no traceback reaches the log."""

import asyncio
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import request

from diffalign.rewards.wire import ABOUT, HEALTH, SCORE, Limits
from diffalign.serving import Settings, application

CASES = int(os.environ.get("DIFFALIGN_FUZZ_CASES", "150"))
GOOD = request(count=2, size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "metadata", "id", "x"]), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw):
    body = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, len(body) - 1))
        body[place : place + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    return bytes(body)


@st.composite
def replaced(draw):
    message = json.loads(GOOD)
    for key in draw(st.lists(st.sampled_from(["version", "id", "prompts", "images", "other"]), min_size=1, max_size=3)):
        message[key] = draw(JSON)
    return json.dumps(message).encode()


REQUESTS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["POST", "POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS", "X"]),
        "path": st.sampled_from([SCORE] * 6 + [HEALTH, ABOUT, "/", "//v1/score", "/v1/score/"]),
        "body": st.one_of(damaged(), damaged(), replaced(), st.binary(max_size=200), st.just(GOOD)),
        "length": st.sampled_from(["true"] * 6 + ["", "-1", "1e3", "٣", "9" * 30, "0"]),
        "type": st.sampled_from([b"application/json"] * 6 + [b"", b"text/plain", b"\xff", b"application/json;" + b"x" * 50]),
        "token": st.sampled_from([b"Bearer t"] * 6 + [b"", b"Bearer", b"Bearer \xff", b"Basic t"]),
        "pieces": st.integers(1, 3),
        "leaves": st.sampled_from([False] * 6 + [True]),
    }
)


class Service:
    """The application without a socket, in an event loop of its own."""

    def __enter__(self):
        reward = lambda images, prompts: [float(prompts[0].metadata.get("n", 1.0))] * len(images)  # noqa: E731
        self.app = application(reward, "fuzzed", Settings(device="cpu", token="t", limits=Limits(body=50_000, pixels=2**12)))
        self.loop = asyncio.new_event_loop()
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.loop.run_until_complete(self.lifespan.__aenter__())
        return self

    def __exit__(self, *exception):
        self.loop.run_until_complete(self.lifespan.__aexit__(None, None, None))
        self.loop.close()

    def answer(self, asked):
        return self.loop.run_until_complete(asyncio.wait_for(self._answer(asked), 10))

    async def _answer(self, asked):
        body, pieces, sent = asked["body"], asked["pieces"], []
        length = str(len(body)) if asked["length"] == "true" else asked["length"]
        headers = [(b"content-type", asked["type"]), (b"authorization", asked["token"])]
        headers += [(b"content-length", length.encode("utf-8"))] if length else []
        step = max(1, -(-len(body) // pieces))
        parts = [body[start : start + step] for start in range(0, len(body), step)] or [b""]
        messages = [{"type": "http.request", "body": part, "more_body": place + 1 < len(parts)} for place, part in enumerate(parts)]
        messages = messages[:-1] if asked["leaves"] else messages

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.sleep(0 if asked["leaves"] else 60)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": asked["method"],
            "scheme": "http",
            "path": asked["path"],
            "raw_path": asked["path"].encode(),
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture(scope="module")
def service():
    with Service() as service:
        yield service


@settings(max_examples=CASES)
@given(asked=REQUESTS)
def test_noise_is_answered_by_the_protocol(service, asked):
    status, body = service.answer(asked)  # the application raises what it did not expect
    assert status in (200, 307, 400, 401, 404, 405, 408, 411, 413, 415, 422, 500)
    if status == 500:
        assert json.loads(body)["error"]["kind"] == "reward_failed"
    if status == 200 and asked["path"] == SCORE:
        assert len(json.loads(body)["scores"]) >= 1
    if status >= 400 and asked["method"] != "HEAD":
        assert json.loads(body)["error"]["message"]
    assert service.app.routes


def test_the_good_request_among_them_is_good(service):
    asked = {"method": "POST", "path": SCORE, "body": GOOD, "length": "true", "type": b"application/json", "token": b"Bearer t"}
    status, body = service.answer({**asked, "pieces": 3, "leaves": False})
    assert (status, json.loads(body)["scores"]) == (200, [1.0, 1.0])
