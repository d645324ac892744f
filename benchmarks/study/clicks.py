"""How many clicks a taste costs: simulated people vote while a run trains, until a fresh set of pictures is liked.

    even, three, thick, slanted    the person likes even digits; 0, 1 and 7; strokes thicker than most of the base's; digits that lean right
    TMPO                           the run file `digits_clicks`: trees of the embedded flow
    TDM-R1                         `digits_tdm_r1` from its student of 4 steps, which is made once and kept in --student
    model                          pictures that nobody voted on get what the model of votes expects; votes where it is least sure
    at random                      the same model; votes on any pictures
    no model                       pictures that nobody voted on are left out
    all voted                      no model, and a step draws the 12 pictures that are voted on alone
    weight 1                       of the reward in the generator's direction, 0.5 else

Learning rates were chosen on seed 100. Measured after the steps with votes: the share of 256 fresh pictures of "a digit" that the person
likes when making no mistakes, the effective number of digits, and the distance to real pictures. `votes` is the number of votes before that
share is first at least 0.8; a run that does not come there has none.

Runs that the file holds are not run again. Without --seeds it prints the tables of the file: seeds from 100 on are the search.

Args:
    arms: what trains, and from what
    tastes: what people like
    errors: shares of wrong answers
    seeds: runs of each
    first: the first seed; 100 begins a search
    set: what to change in the run file beside the arm, as OPTION=VALUE; for the search
    student: folder of the distillation
    json: the runs, written after each; those that it holds are not run again
"""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from benchmarks.intervals import shown
from benchmarks.record import RESULTS, Record
from benchmarks.study.few import SEARCH, distilled, pictures
from diffalign import AlignmentLoop, Prompt, config
from diffalign.core import Hook, Report, Reward, RewardFunction
from diffalign.digits import ClassReward, ThicknessReward, class_shares, distance_to_real, effective_classes
from diffalign.digits.judge import look
from diffalign.voting import Votes

PROMPT = Prompt("a digit")
FRESH = 256
WANTED = 0.8
LEANING = 0.01
"""Shear above which a digit leans right, which a third of the real ones do."""


@attrs.frozen
class Slanted(Reward):
    """1 for a digit that leans right, 0 for all else: the ink's shear, sum (x - mx)(my - y) / sum (y - my)^2, is above `LEANING`."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sight = look(images)
        return ((shear(sight.ink) > LEANING) & sight.sure).float().to(images.device)


def shear(ink: Tensor) -> Tensor:
    """How far pictures lean right, [K]: fields to the right for each field upwards."""
    place = torch.arange(ink.shape[-1], dtype=ink.dtype)
    mass = ink.sum(dim=(1, 2)).clamp(min=1e-6)
    across, down = ((ink * axis).sum(dim=(1, 2)) / mass for axis in (place, place[:, None]))
    x, y = place - across[:, None, None], place[:, None] - down[:, None, None]
    return -(ink * x * y).sum(dim=(1, 2)) / (ink * y * y).sum(dim=(1, 2)).clamp(min=1e-6)


@attrs.frozen
class Thicker(Reward):
    """1 for a stroke thicker than that of two thirds of the real pictures of the digit, 0 for all else."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return (ThicknessReward("thick")(images, prompts) > 2 / 3).float()


TASTES: Mapping[str, tuple[str, RewardFunction]] = {
    "even": ("{class_path: ClassReward, init_args: {classes: [0, 2, 4, 6, 8]}}", ClassReward((0, 2, 4, 6, 8))),
    "three": ("{class_path: ClassReward, init_args: {classes: [0, 1, 7]}}", ClassReward((0, 1, 7))),
    "thick": (f"{__name__}.Thicker", Thicker()),
    "slanted": (f"{__name__}.Slanted", Slanted()),
}

TMPO = ("--total=25", "--rewards.questions=12", "--rewards.every=1")
TDM = ("--total=200", "--rewards.questions=12", "--rewards.every=8", "--objective.mix.reward=0.5")
NO_MODEL = ("--rewards.model=null", "--rewards.choice=AtRandom")
ARMS: Mapping[str, tuple[str, Sequence[str]]] = {
    # name: (run file, options)
    "TMPO, model": ("digits_clicks", TMPO),
    "TMPO, model, at random": ("digits_clicks", (*TMPO, "--rewards.choice=AtRandom")),
    "TMPO, no model": ("digits_clicks", (*TMPO, *NO_MODEL)),
    "TMPO, all voted": (
        "digits_clicks",
        (*TMPO, *NO_MODEL, "--prompts_per_step=3", "--sampler.plan.splits=[1, 2]", "--sampler.plan.branches=2"),
    ),
    "TDM-R1, model": ("digits_tdm_r1", TDM),
    "TDM-R1, model, weight 1": ("digits_tdm_r1", (*TDM, "--objective.mix.reward=1.0")),
    "TDM-R1, all voted": (
        "digits_tdm_r1",
        (*TDM, "--rewards.every=1", "--total=25", "--objective.plan.warmup=5", "--prompts_per_step=2", "--sampler.samples=6", *NO_MODEL),
    ),
}


@attrs.define(eq=False)
class Fresh(Hook):
    """Measures fresh pictures after each step with votes.

    Args:
        votes: the votes of the run
        taste: the person's, without mistakes
        steps: of the sampler
        seed: of the noise
    """

    votes: Votes
    taste: RewardFunction
    steps: int
    seed: int
    curve: list[dict[str, float]] = attrs.field(factory=list, init=False)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if self.votes.due(report.step + 1) or report.step + 1 == report.total:
            self.measure(loop, report.step + 1)

    def measure(self, loop: AlignmentLoop, step: int) -> None:
        images, prompts = pictures(loop.evaluation_policy(), self.steps, [PROMPT], FRESH, self.seed)
        scores = self.taste(images, prompts)
        assert isinstance(scores, Tensor)
        shares = class_shares(images)
        self.curve.append(
            {
                "step": step,
                "votes": self.votes.record.count(),
                "liked": float(scores.mean()),
                "digits": effective_classes(shares),
                "seen": float(shares.sum()),
                "distance": distance_to_real(images),
            }
        )


def run(arm: str, taste: str, error: float, seed: int, student: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Curve of one run.

    Args:
        arm: of `ARMS`
        taste: of `TASTES`
        error: share of wrong answers
        seed: of the run
        student: folder of the distillation
        changes: options beside those of the arm
    """
    file, options = ARMS[arm]
    people = f"{{class_path: Simulated, init_args: {{reward: {TASTES[taste][0]}, error: {error}, seed: {seed}}}}}"
    rewards = f"--rewards={{class_path: Votes, init_args: {{voters: {people}}}}}"
    few = file == "digits_tdm_r1"
    fixed = [rewards, f"--seed={seed}", "--evaluation=null", "--hooks=[]", "--check_rows=0"]
    fixed += [f"--policy.path={distilled(student)}", "--policy.policy.device=cpu"] if few else ["--policy.device=cpu"]
    job = config.parse(file, [*fixed, *options, *changes])
    loop = job.build()
    loop.folder = None  # votes are kept in memory: every run asks anew
    votes = loop.rewards
    assert isinstance(votes, Votes)
    fresh = Fresh(votes, TASTES[taste][1], 4 if few else 8, seed)
    begun = time.process_time()
    fresh.measure(loop, 0)
    loop.advance(job.tree["total"], also=[fresh])
    needed = votes_needed(fresh.curve)
    print(arm, taste, error, seed, f"votes {needed}", {name: round(value, 3) for name, value in fresh.curve[-1].items()}, flush=True)
    return {"seconds": time.process_time() - begun, "votes": needed, "curve": fresh.curve, "foreseen": votes.record.agreement()}


def votes_needed(curve: Sequence[Mapping[str, float]]) -> int | None:
    """Number of votes before the share that is liked is first at least `WANTED`; None if it never is."""
    return next((int(point["votes"]) for point in curve if point["liked"] >= WANTED), None)


def table(runs: Sequence[Mapping[str, Any]], search: bool) -> str:
    """One line an arm, taste and error, of the seeds that are reported or of those of the search."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in runs:
        if (entry["seed"] >= SEARCH) == search:
            groups.setdefault((entry["taste"], entry["error"], entry["arm"], tuple(entry["set"])), []).append(entry)
    lines = []
    for (taste, error, arm, changes), entries in sorted(groups.items()):
        came = [entry["votes"] for entry in entries if entry["votes"] is not None]
        needed = f"{shown(came, 0)} votes" if came else "never"
        last = [entry["curve"][-1] for entry in entries]
        numbers = "  ".join(f"{name} {shown([point[name] for point in last])}" for name in ("liked", "digits", "distance"))
        begun = shown([entry["curve"][0]["liked"] for entry in entries])
        lines.append(
            f"{taste:8s} {error:.1f} {arm:24s} {len(came)} of {len(entries)}: {needed:18s} at first {begun}, at last ({last[0]['votes']} "
            f"votes) {numbers}  {' '.join(changes)}"
        )
    return "\n".join(lines)


def curves(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean share that is liked by number of votes, of the seeds that are reported."""
    groups: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for entry in runs:
        if entry["seed"] < SEARCH and not entry["set"]:
            points = groups.setdefault((entry["taste"], entry["error"], entry["arm"]), {})
            for point in entry["curve"]:
                points.setdefault(int(point["votes"]), []).append(point["liked"])
    lines = []
    for (taste, error, arm), points in sorted(groups.items()):
        whole = max(map(len, points.values()), default=0)
        kept = [(votes, values) for votes, values in sorted(points.items()) if len(values) == whole][:: max(1, len(points) // 8)]
        lines.append(
            f"{taste:8s} {error:.1f} {arm:24s} " + "  ".join(f"{votes}: {sum(values) / len(values):.2f}" for votes, values in kept)
        )
    return "\n".join(lines)


def main(
    arms: tuple[Literal[*ARMS], ...] = tuple(ARMS),
    tastes: tuple[Literal[*TASTES], ...] = tuple(TASTES),
    errors: tuple[float, ...] = (0.0, 0.1),
    seeds: int = 0,
    first: int = 0,
    set: tuple[str, ...] = (),  # noqa: A002  # names the option
    student: Path = Path("runs/few_study"),
    json: Path = RESULTS / "clicks_study.json",
) -> None:
    record = Record(json, {"fresh": FRESH, "wanted": WANTED})
    runs = record.content.setdefault("runs", [])
    changes = sorted(set)
    for seed, taste, error, arm in itertools.product(range(first, first + seeds), tastes, errors, arms):
        about = {"arm": arm, "taste": taste, "error": error, "set": changes, "seed": seed}
        options = [f"--{change}" for change in changes]
        record.run("runs", about, functools.partial(run, arm, taste, error, seed, student, options))
    print(f"search\n{table(runs, True)}\n\nreported\n{table(runs, False)}\n\nliked by votes, means\n{curves(runs)}")
