"""What is left of votes after a kill, a full disk, a pause and an end; and files that do not belong to a run."""

import errno
import json
import os
import stat
import threading
import time

import pytest
import torch
from sessions import Impatient, loop_of, red, voted, weights
from test_votes_page import Visitor

from diffalign import durable
from diffalign.core import ConfigError, Hook, Interrupted
from diffalign.evaluation import HeldOutEvaluation
from diffalign.voting import Page, Simulated, Stars, VoteRecord, Votes
from diffalign.voting.desk import tokens_of
from diffalign.voting.record import Question


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def of_old(file):
    """Leave out of a votes file what earlier versions did not write into its head."""
    head, *lines = lines_of(file)
    del head["answers"]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (head, *lines)))


# --- a run that is killed


def test_an_evaluation_at_a_resume_knows_the_votes_as_before(tmp_path):
    (tmp_path / "held.txt").write_text("one\nthree\n")

    def run(folder, answers, **options):
        hooks = [HeldOutEvaluation(str(tmp_path / "held.txt"), every=1, samples=2, steps=2)]
        loop_of(voted(Impatient(answers)), hooks=hooks).run(3, folder=tmp_path / folder, **options)
        return lines_of_evaluations(tmp_path / folder)

    def lines_of_evaluations(folder):
        return {entry["step"]: entry["rewards"] for entry in json.loads((folder / "evaluation.json").read_text())}

    whole = run("whole", 99)
    with pytest.raises(KeyboardInterrupt):
        run("killed", 2 * 4 + 1)
    before = lines_of_evaluations(tmp_path / "killed")
    assert set(before) == {0, 1, 2}
    assert "Votes" in before[2]
    assert run("killed", 99, resume=True) == whole


@pytest.mark.parametrize("kept", [1, 2])
def test_questions_of_which_a_killed_process_wrote_some_are_completed(tmp_path, kept):
    whole = loop_of(voted(Impatient(99)))
    whole.run(2, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        loop_of(voted(Impatient(4))).run(2, folder=tmp_path / "killed")
    file = tmp_path / "killed" / "votes.jsonl"
    texts = file.read_text().splitlines(keepends=True)
    first = next(number for number, text in enumerate(texts) if json.loads(text).get("asked") and json.loads(text)["step"] == 1)
    file.write_text("".join(texts[: first + kept]) + texts[first + kept][:40])
    again = loop_of(voted(Impatient(99)))
    again.run(2, folder=tmp_path / "killed", resume=True)
    assert again.rewards.record.asked(1) == whole.rewards.record.asked(1)
    assert len(again.rewards.voters.asked) == 4
    assert torch.equal(weights(again), weights(whole))


def test_a_full_disk_keeps_no_half_of_the_questions(tmp_path, monkeypatch):
    file, written = tmp_path / "votes.jsonl", os.write
    record = VoteRecord("likes", ("you",), file)
    room = 250

    def write(descriptor, content):
        return written(descriptor, content[: max(0, room - os.fstat(descriptor).st_size)])

    monkeypatch.setattr(durable.os, "write", write)
    questions = {Question((name,), "one"): [torch.zeros(2, dtype=torch.float64)] for name in "abcd"}
    with pytest.raises(OSError, match="No space left") as caught:
        record.ask(0, questions)
    assert caught.value.errno == errno.ENOSPC
    assert record.asked(0) == []
    assert len(lines_of(file)) == 1
    monkeypatch.undo()
    record.ask(0, questions)
    assert VoteRecord.read(file).asked(0) == list(questions) == record.asked(0)
    record.ask(0, questions)  # they are known
    assert len(lines_of(file)) == 5


# --- an end and a pause


class Leaving(Impatient):
    """Ends the run after some answers, without having sent them."""

    def ask(self, asked):
        for place in range(min(self.left, len(asked.questions))):
            self.left -= 1
            asked.answer("simulated", place, place % 2)
        if self.left:
            asked.send("simulated")

    def ended(self):
        return not self.left


def test_a_session_that_was_ended_is_replayed(tmp_path):
    live = loop_of(voted(Leaving(6)))
    with pytest.raises(Interrupted, match="ended by the voters"):
        live.run(5, folder=tmp_path)
    again = loop_of(Votes.replay(tmp_path / "votes.jsonl"))
    again.run(2)
    assert again.rewards.record.count() == 6
    assert torch.equal(weights(again), weights(live))
    assert [line for line in lines_of(tmp_path / "votes.jsonl") if "sent" in line][-1] == {"step": 1, "person": "simulated", "sent": True}


def test_a_session_that_was_ended_on_the_page_is_replayed(tmp_path):
    page = Page(port=0, people=("ann", "bo"), strip=0)
    loop = loop_of(voted(page))

    def act():
        while not page.links:
            time.sleep(0.01)
        ann, bo = (Visitor(link) for link in page.links.values())
        ann.until(phase="voting")
        ann.vote(0, [1, 0])
        ann.ask("/send", {"step": 0})
        bo.vote(0, [0])
        bo.ask("/stop", {"how": "end"})

    threading.Thread(target=act, daemon=True).start()
    with pytest.raises(Interrupted):
        loop.run(3, folder=tmp_path)
    again = loop_of(Votes.replay(tmp_path / "votes.jsonl"))
    again.run(1)
    assert torch.equal(weights(again), weights(loop))
    assert [line["person"] for line in lines_of(tmp_path / "votes.jsonl") if "sent" in line] == ["ann", "bo"]


def test_a_pause_between_questions_stops_after_the_step(tmp_path):
    page = Page(port=0, strip=0)

    class Pausing(Hook):
        def start(self, loop, step, total):
            self.you = Visitor(page.links["you"])  # votes begin before other hooks
            threading.Thread(target=self.send, daemon=True).start()

        def send(self):
            self.you.until(phase="voting")
            self.you.vote(0, [1, 0, 1, 0])
            self.you.ask("/send", {"step": 0})

        def step(self, loop, report):
            if report.step == 1:
                self.you.ask("/stop", {"how": "pause"})

    loop = loop_of(voted(page, every=4), hooks=[Pausing()])
    with pytest.raises(KeyboardInterrupt, match="paused") as caught:
        loop.run(8, folder=tmp_path)
    assert isinstance(caught.value, Interrupted)  # weights and optimizers fit together
    assert [folder.name for folder in tmp_path.glob("step-*")] == ["step-000002"]
    later = loop_of(voted(Page(port=0, strip=0), every=4))
    later.run(4, folder=tmp_path, resume=True)
    whole = loop_of(Votes.replay(tmp_path / "votes.jsonl", every=4))
    whole.run(4)
    assert torch.equal(weights(later), weights(whole))


def test_a_pause_in_the_last_step_is_none(tmp_path):
    class Pausing(Simulated):
        def paused(self):
            return True

    loop_of(voted(Pausing(red))).run(1, folder=tmp_path)
    with pytest.raises(Interrupted, match="paused"):
        loop_of(voted(Pausing(red))).run(3)


# --- files of others


def five_stars(file):
    record, question = VoteRecord("stars", ("simulated",), file, tuple(Stars(5).answers)), Question(("a",), "one")
    record.ask(0, {question: [torch.zeros(3, dtype=torch.float64)]})
    record.answer(0, question, "simulated", 4)
    return file


@pytest.mark.parametrize("count", [3, 9])
def test_stars_of_another_count_are_refused(tmp_path, count):
    file = five_stars(tmp_path / "votes.jsonl")
    has = "it is of one with 1, 2, 3, 4, 5. Give the ballot of that session"
    with pytest.raises(ConfigError, match=has):
        voted(ballot=Stars(count), earlier=file)
    with pytest.raises(ConfigError, match=has):
        loop_of(voted(ballot=Stars(count), file=file)).run(1)
    with pytest.raises(ConfigError, match=has):
        loop_of(Votes.replay(file, ballot=Stars(count))).run(1)
    voted(ballot=Stars(5), earlier=file)
    loop_of(voted(ballot=Stars(5), file=file)).run(1)


def test_an_old_file_does_not_say_its_count_and_is_refused_where_its_answers_show_it(tmp_path):
    file = five_stars(tmp_path / "votes.jsonl")
    of_old(file)
    with pytest.raises(ConfigError, match="with the answers 1, 2, 3; it is of one with 4"):
        voted(ballot=Stars(3), earlier=file)
    with pytest.raises(ConfigError, match="with the answers 1, 2, 3; it is of one with 4"):
        loop_of(voted(ballot=Stars(3), file=file)).run(1)
    for count in (4, 5, 9):
        voted(ballot=Stars(count), earlier=file)
    loop_of(voted(ballot=Stars(5), file=file)).run(1)
    assert "answers" not in lines_of(file)[0]


def test_two_rewards_have_two_files(tmp_path):
    def votes(**changed):
        return voted(Simulated(red), **changed)

    with pytest.raises(ConfigError, match=r"rewards 'a', 'b' must keep their votes in different files; they have one, .*votes.jsonl"):
        loop_of({"a": votes(), "b": votes()}).run(1, folder=tmp_path / "one")
    assert not (tmp_path / "one" / "votes.jsonl").exists()
    named = tmp_path / "two" / ".." / "two" / "votes.jsonl"
    with pytest.raises(ConfigError, match="must keep their votes in different files"):
        loop_of({"a": votes(), "b": votes(file=named)}).run(1, folder=tmp_path / "two")
    loop_of({"a": votes(), "b": votes(file=tmp_path / "b.jsonl")}).run(1, folder=tmp_path / "three")
    loop_of({"a": votes(), "b": votes()}).run(1)  # in memory
    replayed = {"a": Votes.replay(tmp_path / "three" / "votes.jsonl"), "b": Votes.replay(tmp_path / "b.jsonl")}
    loop_of(replayed).run(1, folder=tmp_path / "four")


# --- the links


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def test_links_are_at_no_moment_readable_by_others(tmp_path, monkeypatch):
    file, seen, synced = tmp_path / "votes.links.json", [], durable.sync
    (tmp_path / "votes.links.json.tmp").touch(mode=0o644)  # of a process that was killed
    monkeypatch.setattr(durable, "sync", lambda path: [seen.append(mode(path)) if path.is_file() else None, synced(path)])
    before = os.umask(0o022)
    try:
        tokens = tokens_of(("you",), file)
        assert seen == [0o600]
        assert mode(file) == 0o600
        assert tokens_of(("you", "bo"), file)["you"] == tokens["you"]
        assert seen == [0o600, 0o600]
        file.chmod(0o644)  # as an earlier version left it
        assert tokens_of(("you", "bo"), file)["you"] == tokens["you"]
        durable.write_whole(tmp_path / "public", "text")
        assert mode(tmp_path / "public") == 0o644
    finally:
        os.umask(before)
    assert mode(file) == 0o600
