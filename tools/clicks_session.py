"""Records the session of docs/clicks.md in a headless browser: the votes, some of the weights, the picture of the page.

The clicks are made by a program that likes even digits: python tools/clicks_session.py docs
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "voting")]

from devtools import Tab, browsing  # noqa: E402

from diffalign import config  # noqa: E402
from diffalign.digits import ClassReward  # noqa: E402
from diffalign.rewards.png import decode_png  # noqa: E402
from diffalign.runs import Checkpoints, Recorder  # noqa: E402
from diffalign.voting import Page, Votes  # noqa: E402

STEPS = 6
SHOWN = "network.inward.bias"
"""Weights that a test compares after a replay."""
RUN = [f"--total={STEPS}", "--prompts_per_step=4", "--policy.device=cpu"]


def liked(addresses: list[str]) -> list[bool]:
    """Whether pictures show even digits."""
    pictures = torch.stack([decode_png(address.partition(",")[2]) for address in addresses])
    return (ClassReward((0, 2, 4, 6, 8))(pictures.float() / 255, [""] * len(pictures)) > 0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where clicks_session.jsonl, clicks_session.json and clicks.png are written")
    target = parser.parse_args().folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        job = config.parse("digits_clicks", [*RUN, f"--folder={folder}", "--rewards.voters.port=0"])
        loop = job.build((Recorder(folder, job.yaml(), job.name), Checkpoints(folder, STEPS, job.yaml())))
        assert isinstance(loop.rewards, Votes)
        assert isinstance(loop.rewards.voters, Page)
        page = loop.rewards.voters
        thread = threading.Thread(target=loop.advance, args=(STEPS,))
        thread.start()
        while not page.links:
            time.sleep(0.05)
        with browsing(Path(place)) as browser:
            tab = Tab(browser, page.links["you"], width=820, height=1020)
            for step in range(STEPS):
                tab.until(f"document.title.startsWith('Vote: step {step + 1} ')")
                for number, like in enumerate(liked(tab.value("[...document.querySelectorAll('.picture img')].map(image => image.src)"))):
                    if like:
                        tab.click(f"[data-question='{number}']")
                tab.click("#rest")
                if step == STEPS - 1:
                    tab.value("scrollTo(0, 0)")
                    time.sleep(1.0)
                    tab.screenshot(target / "clicks.png")
                tab.click("#send")
            thread.join()
        shutil.copy(folder / "votes.jsonl", target / "clicks_session.jsonl")
        weights = load_file(folder / f"step-{STEPS:06d}" / "policy.safetensors")
        about = {
            "command": f"diffalign train digits_clicks {' '.join(RUN)}",
            "weights": {SHOWN: [round(float(value), 7) for value in weights[SHOWN]]},
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }
        (target / "clicks_session.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
