"""What the tests of several processes run in each of them: `torchrun tests/two_processes.py FOLDER CASE ...`."""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from diffalign.core import AlignmentLoop, Average, Hook, Prompt, SingleProcess
from diffalign.evaluation import HeldOutEvaluation
from diffalign.objectives import DiffusionNFT, OnPolicyDistillation, SoftmaxTB, SurrogateReward
from diffalign.policies import TDMPolicy
from diffalign.processes.devices import connect, disconnect
from diffalign.processes.sharding import FullySharded
from diffalign.prompts import Prompts
from diffalign.runs.checkpoints import Checkpoints
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

TREE = TreeSampler(5, FixedPlan(splits=(1, 2)), rows=5)
PROMPTS = Prompts(["a", "b", "c", "d", "e"])


def tmpo(**options):
    return AlignmentLoop(SoftmaxTB(TinyPolicy(**options), updates=2, rows=3), TREE, channel_reward, PROMPTS, **settings())


def nft():
    return AlignmentLoop(DiffusionNFT(TinyPolicy(), rows=7), DeterministicSampler(5, 4), channel_reward, PROMPTS, **settings())


def tdm_r1(**options):
    objective = SurrogateReward(TDMPolicy(TinyPolicy(**options), steps=4), guidance=2.0, rows=4)
    return AlignmentLoop(objective, DeterministicSampler(4, 3, rows=5), channel_reward, PROMPTS, **settings())


def distilled():
    """Two teachers beside the student, each with adapters of its own. Of three prompts a process may have those of one teacher alone."""
    student = TinyPolicy()
    teachers = {}
    for seed, name in enumerate(("one", "two")):
        teachers[name] = student.fork()
        with torch.no_grad():
            teachers[name].network.lora_B.weight.normal_(generator=torch.Generator().manual_seed(seed))
    prompts = [Prompt(text, {"teacher": name}) for text, name in zip("abcde", ("one", "two", "one", "two", "two"), strict=True)]
    objective = OnPolicyDistillation(student, teachers, by="teacher", rows=4)
    return AlignmentLoop(objective, DeterministicSampler(4, 3, rows=5), channel_reward, Prompts(prompts), **settings())


SETTINGS = {}


def settings():
    adamw = {"default": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)}
    return {"prompts_per_step": 3, "optimizers": adamw, "average": Average(0.5), **SETTINGS}


def weights(loop):
    own = {f"{role}.{n}": p for role, policy in loop.policies().items() for n, p in policy.named_parameters() if "lora" in n}
    return {name: parameter.detach().clone() for name, parameter in own.items()}


LOOPS = {"tmpo": tmpo, "recomputed": lambda: tmpo(checkpointing=True), "nft": nft, "tdm_r1": tdm_r1, "distilled": distilled}


class At(Hook):
    """Something that happens to one process after a step."""

    def __init__(self, rank, step, happen):
        self.rank, self.at, self.happen = rank, step, happen

    def step(self, loop, report):
        if (loop.devices.rank, report.step) == (self.rank, self.at):
            self.happen()


class Own:
    """Meter of the rows that this process has rolled out."""

    def read(self, ledger, trained, size=None):
        return {"own": (float(sum(rows for entry, rows in ledger.rows.items() if entry.endswith("/rollout"))), 1.0)}


class Costs(Hook):
    """Keeps the network rows of the rollouts, and the mean over processes of what each has rolled out."""

    def __init__(self):
        self.rows, self.own = [], []

    def step(self, loop, report):
        self.rows.append(sum(rows for entry, rows in report.ledger.rows.items() if entry.endswith("/rollout")))
        self.own.append(report.metrics["own"])


def train(name, folder, steps=5):
    """Train a loop for a few steps and write its weights, what its process has moved, and what the steps cost."""
    loop, costs = LOOPS[name](), Costs()
    loop.hooks, loop.meter = [costs], Own()
    before = dict(getattr(loop.devices, "moved", {}))
    loop.run(steps)
    moved = {verb: count - before.get(verb, 0) for verb, count in getattr(loop.devices, "moved", {}).items()}
    local = sum(p.to_local().numel() for policy in loop.policies().values() for p in policy.parameters() if isinstance(p, DTensor))
    facts = {"moved": moved, "padded": getattr(loop.lockstep, "padded", 0), "sharded": local, "reward": loop.reward}
    facts |= {"rows": costs.rows, "own": costs.own}
    torch.save({"weights": weights(loop), **facts}, folder / f"{name}-{loop.devices.rank}.pt")


def run(folder, cases, train, trainings, others):
    """Each case in turn, whole or sharded: a training by name, or something else that is done with the processes."""
    torch.set_num_threads(1)
    devices = connect()
    SETTINGS["devices"] = devices
    for case in cases:
        SETTINGS["sharding"] = FullySharded(least=1) if case.startswith("sharded-") else None
        name = case.removeprefix("sharded-")
        (folder / case).mkdir(parents=True, exist_ok=True)
        if name in trainings:
            train(name, folder / case)
        else:
            others[name](folder / case, devices)
        devices.barrier()
    disconnect(devices)


def trained_alone(train, folder, names=("tmpo", "tdm_r1")):
    """What trainings give in one process."""
    SETTINGS.update(devices=SingleProcess(), sharding=None)
    for name in names:
        train(name, folder)
    return {name: torch.load(folder / f"{name}-0.pt", weights_only=True) for name in names}


def _loop(hooks=(), rewards=channel_reward, objective=None):
    return AlignmentLoop(objective or SoftmaxTB(TinyPolicy()), TREE, rewards, PROMPTS, **{**settings(), "hooks": hooks})


def nan_reward(folder, devices):
    """The second process sees a reward that is not a number in the third step; both say so and hold equal weights."""
    calls = []

    def reward(images, prompts):
        calls.append(0)
        scores = channel_reward(images, prompts)
        return scores * float("nan") if devices.rank == 1 and len(calls) == 3 else scores

    said(_loop(rewards=reward), folder, devices)


def held_out(folder, devices):
    """In the second process a reward of the evaluation after two steps fails; the first goes on to the next prompt."""
    (folder / f"prompts-{devices.rank}.txt").write_text("a\nb\nc\nd\ne\n")
    evaluation = HeldOutEvaluation(str(folder / f"prompts-{devices.rank}.txt"), every=2, samples=2, steps=2, rows=2)

    def odd(images, prompts):
        if devices.rank == 1 and evaluation.results:
            raise ValueError("no licence")
        return channel_reward(images, prompts)

    evaluation.rewards = {"odd": odd}
    loop = _loop([evaluation])
    said(loop, folder, devices)
    torch.save(evaluation.results[0].rewards["odd"], folder / f"before-{devices.rank}.pt")


def nan_weight(folder, devices):
    """A weight of the second process becomes NaN after the second step."""
    policy = TinyPolicy()
    broken = At(1, 1, lambda: policy.network.lora_B.weight.data.fill_(float("nan")))
    said(_loop([broken], objective=SoftmaxTB(policy)), folder, devices)


def said(loop, folder, devices, total=5, start=0):
    try:
        loop.run(total, start)
    except Exception as error:
        (folder / f"said-{devices.rank}").write_text(f"{type(error).__name__}: {error}")
        torch.save(weights(loop), folder / f"weights-{devices.rank}.pt")


def dies(folder, devices):
    """The second process is killed after the second step."""
    said(_loop([At(1, 1, lambda: os._exit(9))]), folder, devices)
    if devices.rank == 0:
        sys.exit(1)


def full_disk(folder, devices):
    """The first process cannot write; both stop."""

    def full():
        raise OSError("No space left on device")

    said(_loop([At(0, 1, full)]), folder, devices)


def stops(folder, devices):
    """The second process gets SIGTERM; both stop after the same step and have a checkpoint."""
    loop = _loop([At(1, 1, lambda: os.kill(os.getpid(), 15)), Checkpoints(folder, every=100)])
    try:
        loop.run(50)
    except KeyboardInterrupt as error:
        (folder / f"said-{devices.rank}").write_text(str(error))


def small_memory(folder, devices):
    """Calls of more than 4 rows do not fit the second process."""

    class Small(TinyPolicy):
        def velocity(self, latents, sigma, condition):
            if devices.rank == 1 and len(latents) > 4:
                self.counter.add(len(latents))
                raise torch.OutOfMemoryError("no memory")
            return super().velocity(latents, sigma, condition)

    loop = AlignmentLoop(SoftmaxTB(Small()), TreeSampler(5, FixedPlan(splits=(1, 2))), channel_reward, PROMPTS, **settings())
    loop.run(2)
    torch.save({"weights": weights(loop), "rows": (loop.sampler.rows, loop.objective.rows)}, folder / f"small-{devices.rank}.pt")


FAULTS = {
    "nan_reward": nan_reward,
    "held_out": held_out,
    "nan_weight": nan_weight,
    "dies": dies,
    "full_disk": full_disk,
    "stops": stops,
    "small_memory": small_memory,
}

if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:], train, LOOPS, FAULTS)
