"""Small runs with votes, and people who vote."""

import torch

from diffalign.core import AlignmentLoop
from diffalign.objectives import SoftmaxTB
from diffalign.samplers import ChainSampler
from diffalign.testing.doubles import TinyPolicy
from diffalign.voting import Simulated, Voters, Votes


def red(images, prompts):
    """A taste: more red than green."""
    colour = images.mean(dim=(2, 3))
    return (colour[:, 0] > colour[:, 1]).float()


class Impatient(Voters):
    """Answers as a person does, and is gone after some answers, as if the process were killed."""

    def __init__(self, answers):
        self.people, self.left, self.asked = ("simulated",), answers, []

    def ask(self, asked):
        known = asked.answers("simulated")
        for place, question in enumerate(asked.questions):
            if known[place] is None:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                self.asked.append(question)
                image = asked.pictures[question.pictures[0]][None].float()
                asked.answer("simulated", place, int(red(image, [])))
        asked.send("simulated")


def voted(voters=None, questions=4, **changed):
    return Votes(voters or Simulated(red), questions=questions, **changed)


def loop_of(votes, **changed):
    given = {
        "objective": SoftmaxTB(TinyPolicy(), beta=4.0),
        "sampler": ChainSampler(4, 6),
        "rewards": votes,
        "prompts": ["one", "two"],
        "prompts_per_step": 2,
        "optimizers": 1e-2,
    }
    return AlignmentLoop(**{**given, **changed})


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.objective.policy.parameters()])


def of_a_session(folder, questions=4, total=2, **changed):
    """The loop of a session whose votes are in a folder."""
    loop = loop_of(voted(questions=questions), **changed)
    loop.folder = folder
    loop.advance(total)
    return loop
