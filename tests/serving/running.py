"""A reward server in a thread, and the plainest of clients."""

import http.client
import json
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn

from diffalign.core import Prompt
from diffalign.rewards.wire import SCORE, ScoreRequest, encode_request
from diffalign.serving import Settings, application
from diffalign.serving.launch import listen


@contextmanager
def running(reward, **settings):
    """The address of a server."""
    app = application(reward, "tested", Settings(**{"device": "cpu", **settings}))
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join(10.0)
        listening.close()
        assert not thread.is_alive()


def request(count=1, size=4, identity="id-1", prompts=None, seed=0):
    """The body of a good request."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return encode_request(ScoreRequest(identity, images, tuple(prompts or [Prompt("a")] * count)))


def ask(address, body, method="POST", path=SCORE, headers=(), timeout=20.0):
    """Status and message of an answer."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **dict(headers)})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
