"""What a sampler remembers, where memory runs out, a step is repeated, or a row budget changes."""

import attrs
import pytest
import torch

from diffalign import AlignmentLoop
from diffalign.core import Progress, TrajectorySampler
from diffalign.core.budget import limited
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler
from diffalign.testing import TinyPolicy, channel_reward


def build(objective, sampler):
    return AlignmentLoop(objective, sampler, channel_reward, Prompts(["a red cube", "two blue stars"], shuffle=False), prompts_per_step=2)


@attrs.define
class Remembering(TrajectorySampler):
    """Draws one sample more at every step, and remembers how many it drew; the step `full` runs out of memory with all rows at once."""

    rows: int | None = None
    full: int | None = None
    _drawn: int = attrs.field(default=2, init=False)

    def sample(self, policy, condition, progress, streams):
        self._drawn += 1
        drawn = ChainSampler(steps=4, samples=self._drawn, rows=self.rows).sample(policy, condition, progress, streams)
        if progress.step == self.full and self.rows is None:
            raise torch.OutOfMemoryError("all rows at once")
        return drawn

    def state(self):
        return {"drawn": self._drawn}

    def restore(self, state):
        self._drawn = state["drawn"]


@pytest.mark.parametrize("full", [None, 2])
def test_memory_that_runs_out_takes_nothing_from_what_a_sampler_remembers(full):
    loop = build(SoftmaxTB(TinyPolicy()), sampler=Remembering(full=full))
    drawn = [len(loop.step(loop.prompts.draw(step, 2), Progress(step, 4)).batch.rewards) for step in range(4)]
    assert drawn == [2 * samples for samples in (3, 4, 5, 6)]
    assert loop.sampler.state() == {"drawn": 6}


@attrs.define
class Listing(TrajectorySampler):
    """Remembers steps in a list that it changes in place; runs out of memory with more than two rows at once."""

    rows: int | None = None
    _seen: list[int] = attrs.field(factory=list, init=False)

    def sample(self, policy, condition, progress, streams):
        self._seen.append(progress.step)
        drawn = ChainSampler(steps=4, samples=4, rows=self.rows).sample(policy, condition, progress, streams)
        if self.rows is None or self.rows > 2:
            raise torch.OutOfMemoryError("too many rows")
        return drawn

    def state(self):
        return {"seen": self._seen}

    def restore(self, state):
        self._seen = state["seen"]


def test_a_step_that_is_repeated_twice_is_remembered_once():
    loop = build(SoftmaxTB(TinyPolicy()), sampler=Listing())
    loop.step(loop.prompts.draw(0, 2), Progress(0, 4))
    assert loop.sampler.rows == 2
    assert loop.sampler.state() == {"seen": [0]}


def test_another_row_budget_keeps_what_a_sampler_remembers(tmp_path):
    loop = build(SoftmaxTB(TinyPolicy()), sampler=Remembering(full=2))
    loop.run(3, folder=tmp_path)
    assert limited(loop.sampler, 7).state() == {"drawn": 5}
    again = build(SoftmaxTB(TinyPolicy()), sampler=Remembering())
    again.run(4, folder=tmp_path, resume=True)
    assert again.sampler.rows is not None  # the budget that the first run found
    assert again.sampler.state() == {"drawn": 6}
