"""Many clients at once: nothing lost, nothing answered twice, nothing left behind. `benchmarks cost reward_server` does it at full size."""

import collections
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from running import ask, running

from diffalign.core import Prompt
from diffalign.rewards.remote import RemoteReward
from diffalign.rewards.wire import HEALTH

CLIENTS, REQUESTS = 8, 25


def test_two_hundred_requests_from_eight_clients():
    seen, lock = collections.Counter(), threading.Lock()

    def number(images, prompts):
        with lock:
            seen.update(str(prompt) for prompt in prompts)
        return torch.tensor([float(prompt.metadata["n"]) for prompt in prompts])

    with running(number, queue=4) as address:  # fewer seats than clients, so that some are told to come back

        def client(place):
            reward, scores = RemoteReward("http://{}:{}".format(*address), retries=60, backoff=0.005, timeout=30.0), {}
            for turn in range(REQUESTS):
                names = [f"{place}-{turn}-{image}" for image in range(2)]
                prompts = [Prompt(name, {"n": 1000 * place + 10 * turn + image}) for image, name in enumerate(names)]
                scores.update(zip(names, reward(torch.rand(2, 3, 8, 8), prompts).tolist(), strict=True))
            reward.close()
            return scores

        with ThreadPoolExecutor(CLIENTS) as pool:
            answered = list(pool.map(client, range(CLIENTS)))
        assert ask(address, None, "GET", HEALTH)[1] == {"status": "ok", "waiting": 0}
    expected = {f"{c}-{t}-{i}": 1000.0 * c + 10 * t + i for c in range(CLIENTS) for t in range(REQUESTS) for i in range(2)}
    assert {name: score for scores in answered for name, score in scores.items()} == expected
    assert seen == collections.Counter(dict.fromkeys(expected, 1))
    assert json.dumps(answered)


def test_an_answer_does_not_wait_for_an_acknowledgement():
    with running(lambda images, prompts: [1.0] * len(images)) as address:
        reward, seconds = RemoteReward("http://{}:{}".format(*address)), []
        for _ in range(30):
            start = time.perf_counter()
            reward(torch.zeros(1, 3, 4, 4), ["a"])
            seconds.append(time.perf_counter() - start)
        reward.close()
    assert min(seconds[2:]) < 0.035  # Nagle's algorithm and a delayed acknowledgement make 0.040 of each
