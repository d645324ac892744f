"""A whole run in a headless browser: clicks, keys, reload, two tabs, a killed process, a phone."""

import json
import os
import signal
import socket
import sys
import time

import pytest
from devtools import NEEDS_BROWSER, Tab, browsing
from safetensors.torch import load_file
from started import CONTEXT

from diffalign.cli import main

RUN = ["--policy.device=cpu", "--prompts_per_step=2", "--sampler.plan.splits=[1, 2]", "--total=3"]
VOTING = "document.title.startsWith('Vote: step {} ') && document.querySelectorAll('.picture').length == 6"


def begin(folder, *words):
    """Start `diffalign train digits_clicks` in a process of its own; its stderr goes to a file."""
    process = CONTEXT.Process(target=_train, args=(str(folder), words))
    process.start()
    return process


def _train(folder, words):
    os.chdir(folder)
    os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    sys.exit(main(["train", "digits_clicks", "--folder", "run", *words]))


def link(folder):
    """The address that the terminal shows."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        said = (folder / "said.txt").read_text() if (folder / "said.txt").exists() else ""
        if "votes of you: " in said:
            return said.rpartition("votes of you: ")[2].split()[0]
        time.sleep(0.05)
    raise AssertionError((folder / "said.txt").read_text())


def marks(tab):
    return tab.value("[...document.querySelectorAll('.picture span')].map(each => each.textContent.trim())")


@NEEDS_BROWSER
def test_a_run_of_three_steps_by_clicks_and_keys(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*RUN, "--rewards.questions=6", f"--rewards.voters.port={port}"]
    process = begin(tmp_path, *words)
    try:
        address = link(tmp_path)
        with browsing(tmp_path) as browser:
            first = Tab(browser, address)
            # the first step by clicks, with a reload and a second tab
            first.until(VOTING.format(1))
            first.click("[data-question='0']")
            first.click("[data-question='1']")
            first.click("[data-question='1']")
            first.until("document.body.innerText.includes('2 votes of you')")
            assert marks(first) == ["like", "dislike", "", "", "", ""]
            first.call("Page.reload")
            first.until(VOTING.format(1) + " && document.body.innerText.includes('2 votes of you')")
            assert marks(first) == ["like", "dislike", "", "", "", ""]
            second = Tab(browser, address)
            second.until(VOTING.format(1))
            assert marks(second) == marks(first)
            second.click("[data-question='2']")
            first.until("document.body.innerText.includes('3 votes of you')")
            assert marks(first)[2] == "like"
            second.close()
            first.click("#rest")
            first.until("document.body.innerText.includes('6 votes of you')")
            assert marks(first) == ["like", "dislike", "like", "dislike", "dislike", "dislike"]
            first.click("#send")
            # the second step by keys; in its midst the process is killed
            first.until(VOTING.format(2))
            first.value("document.querySelector('.picture').focus()")
            first.press(" ", "ArrowRight", " ", " ")
            first.until("document.body.innerText.includes('8 votes of you')")
            assert marks(first)[:3] == ["like", "dislike", ""]
            assert first.complaints() == []
            process.kill()
            process.join()
            first.until("document.body.innerText.includes('The run does not answer')")
            process = begin(tmp_path, *words, "--resume")
            first.until(VOTING.format(2) + " && !document.body.innerText.includes('The run does not answer')", limit=120)
            assert marks(first)[:3] == ["like", "dislike", ""]
            first.press("ArrowDown", " ", "Enter")
            # the third step on a phone, in the dark
            first.until(VOTING.format(3))
            phone = Tab(browser, address, width=390, dark=True)
            phone.until(VOTING.format(3))
            assert phone.value("document.documentElement.scrollWidth") <= 390
            assert phone.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
            assert first.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            phone.value("document.querySelector('.picture').focus()")
            phone.press(" ", "ArrowRight", " ", " ", "Enter")
            phone.until("document.body.innerText.includes('The run has stopped')")
            assert phone.complaints() == []
            complaints = first.complaints()  # of the time without a server, which the page says itself as well
            assert complaints
            assert all("ERR_CONNECTION_REFUSED" in str(each) for each in complaints)
            origin = address.partition("?")[0]
            for tab in (first, second, phone):
                assert {each.removeprefix(origin).partition("?")[0] for each in tab.requests()} <= {"", "state", "pictures", "vote", "send"}
        process.join(60)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    lines = [json.loads(line) for line in (tmp_path / "run" / "votes.jsonl").read_text().splitlines()]
    asked = [picture for line in lines for picture in line.get("asked", ())]
    assert len(asked) == len(set(asked)) == 18
    assert (tmp_path / "run" / "report.html").exists()
    replay = f"--rewards={{class_path: Votes.replay, init_args: {{file: {tmp_path / 'run' / 'votes.jsonl'}}}}}"
    assert main(["train", "digits_clicks", "--folder", str(tmp_path / "again"), *RUN, replay]) == 0
    one, other = (load_file(tmp_path / name / "step-000003" / "policy.safetensors") for name in ("run", "again"))
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("words", [["digits_clicks"], ["digits_clicks", "--open"]])
def test_a_port_that_is_taken_ends_the_run_before_its_first_step(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["train", *words, "--folder", "run", *RUN, f"--rewards.voters.port={port}"]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_open_needs_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits_tmpo", "--folder", "run", "--policy.device=cpu", "--evaluation=null", "--total=1", "--open"]) == 2
    assert "--open needs a reward that asks people on a page" in capsys.readouterr().err
