"""What TDM-R1 gives to a student of four steps, and which of its parts it needs.

    TDM-R1                      the run file `shapeworld_tdm_r1`, or the settings of `examples/ring_tdm_r1.py`
    last stage spared           the reward pulls at the first three stages, whose ends are noisy, not at the last; weight 12 instead of 8
    no reward term              the control: distillation goes on, with as many steps and samples
    all stage ends              the surrogate learns from the ends of all stages, with their trajectory's advantage, not only the last
    stochastic trajectories     the same, where every step but the last renoises (`CPS`, eta 0.8): the advantage is that of the one sample
    moving reference            the surrogate's density ratio against its own moving average (the paper) instead of the frozen teacher
    independent draws           stages drawn for each prompt, tau and the reward branch's noise for each sample
    graded reward, both rewards the count reward in place of the exact match, or beside it
    TDM and direct RL           no surrogate: the group loss on the student's own weights beside its distillation (the paper's ablation)
    DGPO alone                  the same loss without distillation

`--world shapeworld`: held-out prompts of all four families, of which the run trains on counts; beside the arms the base with 100 and with 8
network evaluations and the student that they start from, all with the seed's noise. L-GMD is diversity. Minutes to hours. Seeds from 100
on are a search: measured on prompts of the training, so that nothing is chosen on those that are reported.
`--taste` trains on `UpperHalf` instead of the exact count: a taste, which the prompts leave open, instead of a skill, which the base lacks.
`--set` changes the run file of all arms, and names the rows after it. What a GPU does in eight minutes an arm and seed: `--set
prompts_per_step=16 sampler.samples=24 total=240`, with the reward in processes where an arm names none (`WorkerReward`).
`--world ring`: seconds a run; reward, share of samples on rewarded modes, and distance to the nearest mode (0.42 for exact modes).

Args:
    world: where
    seeds: runs of each arm
    first: the first seed; 100 begins a search
    steps: of a run; by default those of the run file, or 800 on the ring
    only: arms
    set: what to change in the run file beside the arm, as OPTION=VALUE (ShapeWorld)
    prompts: of count, binding, relation and text, on which it is measured
    samples: of each prompt; rows of another number than 8 are kept apart
    taste: another trained reward, whose rows are kept apart, too (ShapeWorld)
    skip_base: leave out the base with 100 evaluations, the dearest of the baselines
    pretrain: steps of the ring's base
    distil: steps of the ring's student
    json: rows by world, name and seed, written after each; those that it holds are not run again
    figure: bars of the means, one dot for each seed (PNG)
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from benchmarks.record import Record
from benchmarks.study.bars import bars
from benchmarks.subjects.examples import ring, ring_tdm_r1
from benchmarks.subjects.upper_half import UpperHalf
from diffalign import config
from diffalign.config.blueprint import build
from diffalign.core import CPS, Guided, Policy
from diffalign.evaluation import evaluate
from diffalign.objectives import DGPO
from diffalign.objectives.few_step import MonteCarlo, MovingReference, SigmoidWeighted, WeightedMix
from diffalign.policies import TDMPolicy
from diffalign.prompts import read_prompts
from diffalign.samplers import ChainSampler
from diffalign.shapeworld import CompositionalReward, ExactMatch

Row = dict[str, float]
Runs = Iterator[tuple[str, int, Callable[[], Row]]]
"""Name and seed of what is measured, and how."""
FAMILIES = ("count", "binding", "relation", "text")
SEARCH = 100
"""The first seed of a search for settings."""
SAMPLES = 8
"""Of each prompt, where no other number is named."""
START = "student, 4 evaluations"
ETA = 0.8
TASTE = "{class_path: benchmarks.subjects.upper_half.UpperHalf}"
ADAM = "{class_path: AdamW, init_args: {lr: %s, betas: [0.0, 0.999], weight_decay: 0.0}}"
ARMS: dict[str, list[str]] = {
    "TDM-R1": [],
    "last stage spared": ["--objective.reward_stages=3", "--objective.mix.reward=12"],
    "no reward term": ["--objective.mix.reward=0"],
    "all stage ends": ["--objective.surrogate_stages={class_path: CleanerStages, init_args: {}}"],
    "moving reference": ["--objective.reference=MovingReference", "--objective.group_objective.beta=5000"],
    "stochastic trajectories": [
        "--policy.kernel=CPS",
        "--objective.attribution=MonteCarlo",
        "--objective.surrogate_stages={class_path: CleanerStages, init_args: {}}",
        "--sampler={class_path: ChainSampler, init_args: {steps: 4, samples: SAMPLES, eta: 0.8, window: [0, 3]}}",
    ],
    "independent draws": ["--objective.stages_by=prompt", "--objective.shared=sample", "--objective.reward_noise=sample"],
    "graded reward": ["--rewards={class_path: CountReward, init_args: {}}"],
    "both rewards": ["--rewards={exact: {class_path: ExactMatch, init_args: {}}, count: {class_path: CountReward, init_args: {}}}"],
    "TDM and direct RL": [
        (
            "--objective={class_path: DirectReinforcement, init_args: {guidance: 3.0, interval: {class_path: Separate}, "
            "times: {class_path: ShiftedTime, init_args: {margin: 0.05}}, stages: {class_path: UniformStages, init_args: {count: 2}}, "
            "plan: {class_path: Together, init_args: {warmup: 28}}, levels: 2, beta: 10.0}}"
        ),
        f"--optimizers={{fake: {ADAM % '2e-3'}, generator: {ADAM % '1e-3'}}}",
    ],
    "DGPO alone": [
        "--objective={class_path: DGPO, init_args: {levels: 2, beta: 10.0, clip: 0.05}}",
        f"--optimizers={{policy: {ADAM % '1e-3'}}}",
    ],
}
"""Arm -> what it changes in the run file."""
ON_SHAPEWORLD = ("last stage spared", "all stage ends", "independent draws", "graded reward", "both rewards", "TDM and direct RL")
"""Arms that the ring lacks; its settings have all stage ends already."""


def measured(policy: Policy, steps: int, prompts: Mapping[str, int], samples: int, seed: int) -> Row:
    """Mean reward, share of exact pictures and of those with `UpperHalf`, and L-GMD by family."""
    row: Row = {}
    for family in FAMILIES:
        if seed >= SEARCH:
            known = read_prompts(f"shapeworld/{family}")
            asked = known[:: len(known) // prompts[family]][: prompts[family]]
        else:
            asked = read_prompts(f"shapeworld/{family}-held-out")[: prompts[family]]
        rewards = {"reward": CompositionalReward(), "exact": ExactMatch(), "upper": UpperHalf()}
        result = evaluate(policy, asked, rewards, samples=samples, steps=steps, seed=seed, pictures=0)
        row |= {family: float(result.rewards["reward"].mean()), f"{family} L-GMD": float(result.l_gmd.mean())}
        row |= {f"{family} {name}": float(result.rewards[name].mean()) for name in ("exact", "upper")}
    return row


def start() -> TDMPolicy:
    """The student that the run file starts from."""
    tree = config.parse("shapeworld_tdm_r1").tree
    student = build(tree["policy"], {})
    assert isinstance(student, TDMPolicy)
    return student


def baselines(many_steps: bool) -> dict[str, Callable[[], tuple[Policy, int]]]:
    """Name -> what is measured without training, and its steps."""
    table: dict[str, Callable[[], tuple[Policy, int]]] = {}
    if many_steps:
        table["base, 100 evaluations"] = lambda: (Guided(start().policy.fork(pristine=True), 3.0), 50)
    table["base, 8 evaluations"] = lambda: (start().policy.fork(pristine=True), 8)
    table[START] = lambda: (start(), 4)
    return table


def changes(arm: str, more: Sequence[str] = ()) -> list[str]:
    """What is changed in the run file: by one arm, which keeps the number of samples, then by all."""
    told = [change for change in more if change.startswith("--sampler")]
    samples = config.parse("shapeworld_tdm_r1", told).tree["sampler"].arguments["samples"]
    return [*(change.replace("SAMPLES", str(samples)) for change in ARMS[arm]), *more]


def trained(arm: str, seed: int, steps: int | None, more: Sequence[str]) -> Policy:
    """The student after one run."""
    job = config.parse("shapeworld_tdm_r1", [*changes(arm, more), f"--seed={seed}", "--evaluation=null", "--hooks=[]"])
    total, loop = job.tree["total"] if steps is None else steps, job.build()
    loop.run(total)
    policy = loop.evaluation_policy()
    assert isinstance(policy, TDMPolicy)
    return policy


def ring_row(arm: str, base: Policy, student: TDMPolicy, steps: int, seed: int) -> Row:
    """The ring's numbers after one run."""
    if arm == "DGPO alone":
        objective = DGPO(student.fork(trainable=True), beta=10.0, clip=0.1, sigma_min=0.0)
        after = ring_tdm_r1.trained(objective, {"policy": ring_tdm_r1.adam(2.5e-4)}, steps, seed)
    elif arm == "no reward term":
        after = ring_tdm_r1.reinforced(base, student, steps, seed, mix=WeightedMix(reward=0.0))
    elif arm == "moving reference":
        after = ring_tdm_r1.reinforced(base, student, steps, seed, reference=MovingReference(), group_objective=SigmoidWeighted(5000.0))
    elif arm == "stochastic trajectories":
        noisy = TDMPolicy(student.policy, student.steps, student.sigmas(student.steps).tolist(), kernel=CPS())
        sampler = ChainSampler(steps=4, samples=64, eta=ETA, window=(0, 3))
        after = ring_tdm_r1.reinforced(base, noisy, steps, seed, sampler, attribution=MonteCarlo())
    else:
        after = ring_tdm_r1.reinforced(base, student, steps, seed)
    return ring_tdm_r1.measured(ring_tdm_r1.points_of(after, 4))


def ring_world(only: Sequence[str], seeds: range, steps: int, pretrain: int, distil: int) -> Runs:
    @functools.cache
    def start(seed: int) -> tuple[Policy, TDMPolicy]:
        base = ring.trained_base(seed, pretrain).fork()
        student = ring_tdm_r1.distilled(base, distil, seed)
        assert isinstance(student, TDMPolicy)
        return base, student

    for seed in seeds:
        yield START, seed, lambda seed=seed: ring_tdm_r1.measured(ring_tdm_r1.points_of(start(seed)[1], 4))
        for arm in only:
            if arm not in ON_SHAPEWORLD:
                yield arm, seed, lambda seed=seed, arm=arm: ring_row(arm, *start(seed), steps, seed)


def shapeworld(
    only: Sequence[str],
    seeds: range,
    steps: int | None,
    prompts: Sequence[int],
    samples: int,
    many_steps: bool,
    set_: Sequence[str],
    taste: bool,
) -> Runs:
    measure = functools.partial(measured, prompts=dict(zip(FAMILIES, prompts, strict=True)), samples=samples)
    for name, make in baselines(many_steps).items():
        for seed in seeds:
            yield name, seed, lambda make=make, seed=seed: measure(*make(), seed=seed)
    more = [f"--{change}" for change in set_]
    if taste:
        more.append(f"--rewards={TASTE}")
    for arm in only:
        for seed in seeds:
            yield " ".join([arm, *set_]), seed, lambda arm=arm, seed=seed: measure(trained(arm, seed, steps, more), 4, seed=seed)


def told(name: str, seed: int, row: Row) -> Row:
    print(f"{name:26s} seed {seed}  " + "  ".join(f"{measure} {value:.3f}" for measure, value in row.items()), flush=True)
    return row


def table(found: Mapping[str, Mapping[str, Row]], measures: list[str]) -> None:
    """Means over seeds, with the standard deviation where there are several."""
    print(f"\n{'':26s} seeds  " + "".join(f"{measure:>18s}" for measure in measures))
    for name, rows in found.items():
        line = f"{name:26s} {len(rows):5d}  "
        for measure in measures:
            values = [row[measure] for row in rows.values()]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            line += f"{statistics.mean(values):.3f}{spread}".rjust(18)
        print(line)


def figure_of(worlds: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> Image.Image:
    """Bars of the means, one dot for each seed."""
    panels = []
    for world, measures in (("shapeworld", ["count exact", *FAMILIES]), ("ring", ["reward", "mass"])):
        if rows := worlds.get(world):
            values = {name: {m: [row[m] for row in seeds.values()] for m in measures} for name, seeds in rows.items()}
            panels.append((f"{world}: mean {'reward by family' if world == 'shapeworld' else 'on the rewarded modes'}", values))
    return bars(panels)


def main(
    world: Literal["shapeworld", "ring"] = "shapeworld",
    seeds: int = 1,
    first: int = 0,
    steps: int | None = None,
    only: tuple[Literal[*ARMS], ...] = tuple(ARMS),
    set: tuple[str, ...] = (),  # noqa: A002  # names the option
    prompts: tuple[int, int, int, int] = (24, 12, 12, 12),
    samples: int = SAMPLES,
    taste: bool = False,
    skip_base: bool = False,
    pretrain: int = 2500,
    distil: int = 400,
    json: Path | None = None,
    figure: Path | None = None,
) -> None:
    record = Record(json)
    section = world if world == "ring" or samples == SAMPLES else f"{world}, {samples} samples"
    section = f"{section}, upper half" if taste else section
    found = record.content.setdefault(f"{section}, search" if first >= SEARCH else section, {})
    of_seeds = range(first, first + seeds)
    if world == "ring":
        runs = ring_world(only, of_seeds, 800 if steps is None else steps, pretrain, distil)
    else:
        runs = shapeworld(only, of_seeds, steps, prompts, samples, not skip_base, sorted(set), taste)
    for name, seed, make in runs:
        record.once(found.setdefault(name, {}), str(seed), lambda name=name, seed=seed, make=make: told(name, seed, make()))
    trained_on = "count upper" if taste else "count exact"
    table(found, ["reward", "mass", "modes", "distance"] if world == "ring" else [trained_on, *FAMILIES, *(f"{f} L-GMD" for f in FAMILIES)])
    if figure:
        figure_of(record.content).save(figure)
        print(figure)
