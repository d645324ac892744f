"""A thousand requests from sixteen clients against one reward server: what is lost, what is answered twice, and what it costs.

python benchmarks/reward_server.py [--requests 1000] [--clients 16] [--json FILE]

The server runs in a process of its own (`diffalign serve-reward`), with fewer seats in its queue than there are clients, so that some
requests are told to come back. Its reward writes down what it scores and answers with a number that only this prompt has: every answer
is compared with its question, and the list with what was asked. "growth" is the server's resident memory at the end over that after a
tenth of the requests. Read the counts; the seconds depend on the machine.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--images", type=int, default=4, help="of a request")
    parser.add_argument("--size", type=int, default=64, help="of an image, in pixels")
    parser.add_argument("--queue", type=int, default=8, help="seats of the server")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "counted_reward.py").write_text(REWARD)
        Path(folder, "reward.yaml").write_text("counted_reward.number\n")
        command = [sys.executable, "-m", "diffalign", "serve-reward", "reward.yaml", "--port", "0", "--device", "cpu"]
        command += ["--queue", str(arguments.queue)]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            url = server.stdout.readline().split()[-1]
            numbers = measure(arguments, url, server.pid)
            scored = collections.Counter(Path(folder, "scored.txt").read_text().split())
        finally:
            server.kill()
            server.communicate()
    expected = {f"r{request}i{image}" for request in range(arguments.requests) for image in range(arguments.images)}
    numbers["images never scored"] = len(expected - scored.keys())
    numbers["images scored twice"] = sum(count - 1 for count in scored.values())
    for name, value in numbers.items():
        print(f"{name:<34}{value:>12,.3f}" if isinstance(value, float) else f"{name:<34}{value:>12,}")
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1))


def measure(arguments: argparse.Namespace, url: str, pid: int) -> dict[str, float]:
    """Ask all requests; a client takes the next one when it has the answer to the last."""
    todo, lock = iter(range(arguments.requests)), threading.Lock()
    answers: collections.Counter[int] = collections.Counter()
    wrong, seconds, early = [], [], []
    watch = Watch(pid)
    watch.start()

    def client(_: int) -> None:
        reward = RemoteReward(url, retries=200, backoff=0.01, timeout=60.0, batch=arguments.images)
        images = torch.rand(arguments.images, 3, arguments.size, arguments.size)
        while True:
            with lock:
                request = next(todo, None)
            if request is None:
                return
            numbers = [request * arguments.images + image for image in range(arguments.images)]
            prompts = [Prompt(f"r{request}i{image}", {"number": number}) for image, number in enumerate(numbers)]
            start = time.perf_counter()
            scores = reward(images, prompts).tolist()
            with lock:
                seconds.append(time.perf_counter() - start)
                answers[request] += 1
                if scores != numbers:
                    wrong.append(request)
                if len(seconds) == max(1, arguments.requests // 10):
                    early.append(watch.resident())

    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as pool:
        list(pool.map(client, range(arguments.clients)))
    total = time.perf_counter() - start
    last = watch.resident()
    watch.stopped.set()
    watch.join()
    seconds.sort()
    return {
        "requests": arguments.requests,
        "clients": arguments.clients,
        "answered": len(answers),
        "lost": arguments.requests - len(answers),
        "answered twice": sum(count - 1 for count in answers.values()),
        "wrong scores": len(wrong),
        "seconds": total,
        "images per second": arguments.requests * arguments.images / total,
        "median seconds of a request": seconds[len(seconds) // 2],
        "99th percentile": seconds[int(0.99 * (len(seconds) - 1))],
        "server memory, peak, MB": max(watch.kilobytes) / 1000,
        "server memory, growth": last / early[0] - 1,
    }


if __name__ == "__main__":
    main()
