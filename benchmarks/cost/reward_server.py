"""A thousand requests from sixteen clients against one reward server: what is lost, what is answered twice, and what it costs.

The server runs in a process of its own (`diffalign serve-reward`), with fewer seats in its queue than there are clients, so that some
requests are told to come back. Its reward writes down what it scores and answers with a number that only this prompt has: every answer
is compared with its question, and the list with what was asked. "growth" is the server's resident memory at the end over that after a
tenth of the requests. Read the counts; the seconds depend on the machine.

Args:
    requests: in all
    clients: that ask at once
    images: of a request
    size: of an image, in pixels
    queue: seats of the server
    json: also write the table here
"""

import collections
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.cost.reward_process import served
from benchmarks.record import write
from diffalign.core import Prompt
from diffalign.rewards.remote import RemoteReward

REWARD = """
import torch

LIST = open("scored.txt", "a", buffering=1)

def number(images, prompts):
    LIST.write("".join(f"{prompt}\\n" for prompt in prompts))
    return torch.tensor([float(prompt.metadata["number"]) for prompt in prompts]) + 0 * images.mean(dim=(1, 2, 3))
"""


class Watch(threading.Thread):
    """Looks at the resident memory of a process, ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.kilobytes, self.stopped = pid, [], threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.1):
            self.kilobytes.append(self.resident())

    def resident(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def main(requests: int = 1000, clients: int = 16, images: int = 4, size: int = 64, queue: int = 8, json: Path | None = None) -> None:
    with served(REWARD, "number", "--queue", str(queue)) as (url, process, folder):
        numbers = measure(requests, clients, images, size, url, process)
        scored = collections.Counter((folder / "scored.txt").read_text().split())
    expected = {f"r{request}i{image}" for request in range(requests) for image in range(images)}
    numbers["images never scored"] = len(expected - scored.keys())
    numbers["images scored twice"] = sum(count - 1 for count in scored.values())
    for name, value in numbers.items():
        print(f"{name:<34}{value:>12,.3f}" if isinstance(value, float) else f"{name:<34}{value:>12,}")
    write(json, numbers)


def measure(requests: int, clients: int, pictures: int, size: int, url: str, pid: int) -> dict[str, float]:
    """Ask all requests; a client takes the next one when it has the answer to the last."""
    todo, lock = iter(range(requests)), threading.Lock()
    answers: collections.Counter[int] = collections.Counter()
    wrong, seconds, early = [], [], []
    watch = Watch(pid)
    watch.start()

    def client(_: int) -> None:
        reward = RemoteReward(url, retries=200, backoff=0.01, timeout=60.0, batch=pictures)
        images = torch.rand(pictures, 3, size, size)
        while True:
            with lock:
                request = next(todo, None)
            if request is None:
                return
            numbers = [request * pictures + image for image in range(pictures)]
            prompts = [Prompt(f"r{request}i{image}", {"number": number}) for image, number in enumerate(numbers)]
            start = time.perf_counter()
            scores = reward(images, prompts).tolist()
            with lock:
                seconds.append(time.perf_counter() - start)
                answers[request] += 1
                if scores != numbers:
                    wrong.append(request)
                if len(seconds) == max(1, requests // 10):
                    early.append(watch.resident())

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    total = time.perf_counter() - start
    last = watch.resident()
    watch.stopped.set()
    watch.join()
    seconds.sort()
    return {
        "requests": requests,
        "clients": clients,
        "answered": len(answers),
        "lost": requests - len(answers),
        "answered twice": sum(count - 1 for count in answers.values()),
        "wrong scores": len(wrong),
        "seconds": total,
        "images per second": requests * pictures / total,
        "median seconds of a request": seconds[len(seconds) // 2],
        "99th percentile": seconds[int(0.99 * (len(seconds) - 1))],
        "server memory, peak, MB": max(watch.kilobytes) / 1000,
        "server memory, growth": last / early[0] - 1,
    }
