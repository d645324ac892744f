"""The page of votes over real sockets: what it answers, and what it refuses."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from sessions import loop_of, voted, weights

from diffalign.core import ConfigError, Interrupted, Progress
from diffalign.serving.votes import policy_of
from diffalign.voting import Page, Pairs, Votes
from diffalign.voting.page import PAGE


class Visitor:
    """A client of the page."""

    def __init__(self, link):
        self.host, _, rest = link.removeprefix("http://").partition("/")
        self.token = rest.partition("token=")[2]

    def ask(self, path, body=None, **headers):
        """Status and content of an answer."""
        connection = http.client.HTTPConnection(self.host, timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        about = {"Authorization": f"Bearer {self.token}", **({"Content-Type": "application/json"} if body is not None else {}), **named}
        text = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(
            "GET" if body is None else "POST", path, text, {name: value for name, value in about.items() if value is not None}
        )
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if answer.headers["content-type"] == "application/json" else content.decode()

    def until(self, **wanted):
        """The state, once it is as wanted."""
        end = time.monotonic() + 20
        while True:
            state = self.ask("/state")[1]
            if all(state.get(name) == value for name, value in wanted.items()):
                return state
            assert time.monotonic() < end, (wanted, state)
            time.sleep(0.01)

    def vote(self, step, answers):
        for question, answer in enumerate(answers):
            status, state = self.ask("/vote", {"step": step, "question": question, "answer": answer})
            assert status == 200
            assert state["answers"][question] == answer


class Run:
    """A run in a thread that waits for votes."""

    def __init__(self, folder, total=3, resume=False, people=("you",), **changed):
        self.page = Page(port=0, people=people, strip=2)
        self.loop, self.error = loop_of(voted(self.page, **changed)), None
        self.thread = threading.Thread(target=self.run, args=(folder, total, resume))
        self.thread.start()
        while not self.page.links and self.thread.is_alive():
            time.sleep(0.005)
        self.visitors = [Visitor(self.page.links[person]) for person in people]

    def run(self, folder, total, resume):
        try:
            self.loop.run(total, folder=folder, resume=resume)
        except BaseException as error:
            self.error = error

    def end(self):
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.error


@contextmanager
def waiting(folder, **changed):
    """A run, which is ended from the page if the test has not."""
    run = Run(folder, **changed)
    try:
        yield run
    finally:
        if run.thread.is_alive():
            run.visitors[0].ask("/stop", {"how": "pause"})
            run.end()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    with waiting(tmp_path_factory.mktemp("asked")) as run:
        run.visitors[0].until(phase="voting")
        yield run.visitors[0]


# --- what it is for


def test_votes_are_given_and_replayed(tmp_path):
    run = Run(tmp_path)
    you = run.visitors[0]
    for step in range(3):
        you.until(phase="voting", step=step)
        shown = you.ask("/pictures")[1]
        assert [question["prompt"] in ("one", "two") for question in shown["questions"]] == [True] * 4
        assert all(question["pictures"][0].startswith("data:image/png;base64,") for question in shown["questions"])
        assert len(shown["strip"]) == 2
        assert (shown["strip"][0] == shown["strip"][1]) == (step == 0)
        you.vote(step, [1, 0, 0, None])
        assert you.ask("/send", {"step": step})[0] == 200
    assert run.end() is None
    again = loop_of(Votes.replay(tmp_path / "votes.jsonl"))
    again.advance(3)
    assert (weights(again) == weights(run.loop)).all()
    assert (tmp_path / "votes.links.json").stat().st_mode & 0o077 == 0


def test_a_run_is_paused_and_goes_on_with_the_same_link(tmp_path):
    run = Run(tmp_path)
    you = run.visitors[0]
    you.until(phase="voting")
    you.vote(0, [1, 0, 1, 0])
    you.ask("/send", {"step": 0})
    you.until(phase="voting", step=1)
    you.vote(1, [1, 1])
    you.ask("/stop", {"how": "pause"})
    assert isinstance(run.end(), KeyboardInterrupt)
    assert (tmp_path / "step-000001").is_dir()
    with waiting(tmp_path, resume=True) as later:
        assert later.visitors[0].token == you.token
        state = later.visitors[0].until(phase="voting", step=1)
        assert state["answers"] == [1, 1, None, None]
        assert state["votes"] == 6


def test_a_run_is_ended_with_the_votes_so_far(tmp_path):
    run = Run(tmp_path)
    you = run.visitors[0]
    you.until(phase="voting")
    you.vote(0, [1, 0])
    you.ask("/stop", {"how": "end"})
    assert isinstance(run.end(), Interrupted)
    assert (tmp_path / "step-000001").is_dir()
    assert (tmp_path / "report.html").exists()


def test_everybody_is_waited_for_and_votes_are_kept_apart(tmp_path):
    with waiting(tmp_path, people=("ann", "bo")) as run:
        ann, bo = run.visitors
        ann.until(phase="voting")
        ann.vote(0, [1, 1, 0, 0])
        ann.ask("/send", {"step": 0})
        assert ann.until(phase="sent")["missing"] == ["bo"]
        assert bo.until(phase="voting")["answers"] == [None] * 4
        bo.vote(0, [1, 0, 0, 0])
        bo.ask("/send", {"step": 0})
        assert bo.until(phase="voting", step=1)["between"] == ["ann and bo agree in 75% of 4 answers"]


def test_pairs_are_shown(tmp_path):
    with waiting(tmp_path, ballot=Pairs()) as run:
        run.visitors[0].until(phase="voting")
        shown = run.visitors[0].ask("/pictures")[1]
        assert (shown["ballot"], {len(question["pictures"]) for question in shown["questions"]}) == ("pairs", {2})


# --- what it refuses


def test_an_old_tab_is_told_that_its_step_is_over(tmp_path):
    with waiting(tmp_path) as run:
        you = run.visitors[0]
        you.until(phase="voting")
        you.ask("/send", {"step": 0})
        you.until(phase="voting", step=1)
        for path, body in (("/vote", {"step": 0, "question": 0, "answer": 1}), ("/send", {"step": 0})):
            status, content = you.ask(path, body)
            assert status == 409
            assert content["error"] == "step 0 is over; votes are asked on step 1. Reload the page."
        assert you.ask("/state")[1]["answers"] == [None] * 4


GARBAGE = [
    (b"nonsense", {}, 400),
    (b"[]", {}, 400),
    (b'{"step": 0}', {}, 400),
    (b"[" * 3000, {}, 400),
    ({"step": 0, "question": 99, "answer": 1}, {}, 422),
    ({"step": 0, "question": 0, "answer": 7}, {}, 422),
    ({"step": "0", "question": 0, "answer": 1}, {}, 400),
    ({"step": 0, "question": True, "answer": 1}, {}, 400),
    ({"step": 0, "question": 0, "answer": 1.5}, {}, 400),
    ({"step": -1, "question": 0, "answer": 1}, {}, 400),
    ({"step": 0, "question": 0, "answer": 1}, {"Content_Type": "text/plain"}, 415),
    (b" " * 5000, {}, 413),
    ({"step": 0, "question": 0, "answer": 1}, {"Authorization": "Bearer wrong"}, 401),
    ({"step": 0, "question": 0, "answer": 1}, {"Authorization": None}, 401),
    ({"step": 0, "question": 0, "answer": 1}, {"Host": "evil.example:80"}, 403),
    ({"step": 0, "question": 0, "answer": 1}, {"Origin": "http://evil.example"}, 403),
    ({"step": 0, "question": 0, "answer": 1}, {"Origin": "null"}, 403),
    ({"step": 0, "question": 0, "answer": 1}, {"Sec_Fetch_Site": "cross-site"}, 403),
    ({"step": 0, "question": 0, "answer": 1}, {"Sec_Fetch_Site": "same-site"}, 403),
    ({"step": 0, "question": 0, "answer": 1}, {"Sec_Fetch_Site": "none", "Origin": "https://evil.example"}, 403),
]


@pytest.mark.parametrize(("body", "headers", "status"), GARBAGE)
def test_garbage_and_foreign_requests_are_refused_and_nothing_is_counted(asked, body, headers, status):
    found, content = asked.ask("/vote", body, **headers)
    assert found == status
    assert content["error"]
    assert asked.ask("/state")[1]["answers"] == [None] * 4


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://votes.example", "Sec_Fetch_Site": "same-origin"},  # the proxy asks under this server's own address
        {"Origin": "https://192.0.2.7", "Host": "192.0.2.7"},  # it passes the address on, and the browser does not say the site
    ],
)
def test_votes_are_counted_behind_a_proxy_with_tls(asked, headers):
    for answer in (1, None):
        status, state = asked.ask("/vote", {"step": 0, "question": 0, "answer": answer}, **headers)
        assert (status, state["answers"]) == (200, [answer, None, None, None])


def test_a_link_in_another_page_leads_to_the_page_alone(asked):
    foreign = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert asked.ask(f"/?token={asked.token}", **foreign)[0] == 200
    assert asked.ask("/state", **foreign)[0] == asked.ask("/pictures", **foreign)[0] == 403
    assert asked.ask("/stop", {"how": "pause"}, **foreign)[0] == 403


def test_other_addresses_and_methods_are_refused(asked):
    assert asked.ask("/nothing")[0] == 404
    assert asked.ask("/vote")[0] == 405
    assert asked.ask("/stop", {"how": "explode"})[0] == 422
    assert asked.ask("/pictures", Authorization="Bearer")[0] == 401


def test_the_page_needs_the_token_and_forbids_everything_else(asked):
    assert asked.ask("/")[0] == 401
    assert asked.ask("/?token=wrong")[0] == 401
    status, html = asked.ask(f"/?token={asked.token}")
    assert (status, html) == (200, PAGE.read_text())
    policy = policy_of(html)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert asked.ask(f"/?token={asked.token}", Host="evil.example")[0] == 403


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: .*another Page.port"):
            loop_of(voted(Page(port=port))).run(1, folder=tmp_path)


def test_a_page_needs_people_and_a_run(capsys):
    votes = voted(Page())
    loop_of(votes).step(["one", "two"], Progress(0, 1))  # as `diffalign check --try` does
    assert votes.record.count() == 0
    assert "nobody is asked for votes: the page is served by loop.run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="names that differ"):
        Page(people=("ann", "ann"))


# --- waiting


def test_the_wait_uses_no_core_and_says_so(tmp_path, capsys):
    page = Page(port=0, remind=0.2, strip=0)
    loop = loop_of(voted(page))
    before, times = time.monotonic(), []

    def interrupt():
        while not page.links:
            time.sleep(0.01)
        visitor = Visitor(page.links["you"])
        visitor.until(phase="voting")
        times.append(time.process_time())
        time.sleep(1.0)
        times.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):  # the first signal is enough: no weight moves
        loop.run(2, folder=tmp_path)
    assert time.monotonic() - before < 30
    assert times[1] - times[0] < 0.2
    said = capsys.readouterr().err
    assert said.count("step 1 of 2: waiting for votes at http://127.0.0.1:") >= 4
