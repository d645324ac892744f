"""What TDM-R1 gives to a student of four steps, and which of its parts it needs.

python benchmarks/tdm_r1_study.py [--world shapeworld] [--seeds N] [--steps N] [--only ARM ...] [--json FILE] [--figure FILE]

    TDM-R1                      the run file `shapeworld_tdm_r1`, or the settings of `examples/ring_tdm_r1.py`
    last stage spared           the reward pulls at the first three stages, whose ends are noisy, not at the last; weight 12 instead of 8
    no reward term              the control: distillation goes on, with as many steps and samples
    all stage ends              the surrogate learns from the ends of all stages, with their trajectory's advantage, not only the last
    stochastic trajectories     the same, where every step but the last renoises (`CPS`, eta 0.8): the advantage is that of the one sample
    moving reference            the surrogate's density ratio against its own moving average (the paper) instead of the frozen teacher
    direct RL loss              no surrogate: the same group loss (`DGPO`) on the student's own weights

`--world shapeworld`: held-out prompts of all four families, of which the run trains on counts; beside the arms the base with 100 and with 8
network evaluations and the student that they start from, all with the seed's noise. L-GMD is diversity. Minutes to hours.
`--world ring`: seconds a run; reward, share of samples on rewarded modes, and distance to the nearest mode (0.42 for exact modes).
`--json` is written after every row, and rows that it holds already are not run again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ring
import ring_tdm_r1
from bars import bars

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
FAMILIES = ("count", "binding", "relation", "text")
START = "student, 4 evaluations"
ETA = 0.8
ARMS: dict[str, list[str]] = {
    "TDM-R1": [],
    "last stage spared": ["--objective.reward_stages=3", "--objective.mix.reward=12"],
    "no reward term": ["--objective.mix.reward=0"],
    "all stage ends": ["--objective.surrogate_stages=CleanerStages"],
    "moving reference": ["--objective.reference=MovingReference", "--objective.group_objective.beta=5000"],
    "stochastic trajectories": [
        "--policy.kernel=CPS",
        "--objective.attribution=MonteCarlo",
        "--objective.surrogate_stages=CleanerStages",
        "--sampler={class_path: ChainSampler, init_args: {steps: 4, samples: SAMPLES, eta: 0.8, window: [0, 3]}}",
    ],
    "direct RL loss": [
        "--objective={class_path: DGPO, init_args: {levels: 2, beta: 10.0, clip: 0.05}}",
        "--optimizers={policy: {class_path: AdamW, init_args: {lr: 1e-3, betas: [0.0, 0.999], weight_decay: 0.0}}}",
    ],
}
"""Arm -> what it changes in the run file."""
ON_SHAPEWORLD = ("last stage spared", "all stage ends")
"""Arms that the ring lacks; its settings have all stage ends already."""


def measured(policy: Policy, steps: int, prompts: Mapping[str, int], samples: int, seed: int) -> Row:
    """Mean reward, share of exact pictures and L-GMD by family."""
    row: Row = {}
    for family in FAMILIES:
        held_out = read_prompts(f"shapeworld/{family}-held-out")[: prompts[family]]
        rewards = {"reward": CompositionalReward(), "exact": ExactMatch()}
        result = evaluate(policy, held_out, rewards, samples=samples, steps=steps, seed=seed, pictures=0)
        row |= {family: float(result.rewards["reward"].mean()), f"{family} exact": float(result.rewards["exact"].mean())}
        row[f"{family} L-GMD"] = float(result.l_gmd.mean())
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


def changes(arm: str) -> list[str]:
    """What an arm changes in the run file, with the file's own number of samples."""
    samples = config.parse("shapeworld_tdm_r1").tree["sampler"].arguments["samples"]
    return [change.replace("SAMPLES", str(samples)) for change in ARMS[arm]]


def trained(arm: str, seed: int, steps: int | None) -> Policy:
    """The student after one run."""
    job = config.parse("shapeworld_tdm_r1", [*changes(arm), f"--seed={seed}", "--evaluation=null", "--hooks=[]"])
    total, loop = job.tree["total"] if steps is None else steps, job.build()
    loop.run(total)
    policy = loop.evaluation_policy()
    assert isinstance(policy, TDMPolicy)
    return policy


def ring_row(arm: str, base: Policy, student: TDMPolicy, steps: int, seed: int) -> Row:
    """The ring's numbers after one run."""
    if arm == "direct RL loss":
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


def ring_world(arguments: argparse.Namespace, found: dict[str, dict[str, Row]], save: Callable[[], None]) -> None:
    steps = 800 if arguments.steps is None else arguments.steps
    for seed in range(arguments.seeds):
        key = str(seed)
        arms = [arm for arm in arguments.only if arm not in ON_SHAPEWORLD]
        wanted = [arm for arm in (START, *arms) if key not in found.get(arm, {})]
        if not wanted:
            continue
        base = ring.trained_base(seed, arguments.pretrain).fork()
        student = ring_tdm_r1.distilled(base, arguments.distil, seed)
        assert isinstance(student, TDMPolicy)
        for arm in wanted:
            before = ring_tdm_r1.measured(ring_tdm_r1.points_of(student, 4)) if arm == START else None
            _note(found, arm, key, before or ring_row(arm, base, student, steps, seed), save)


def shapeworld(arguments: argparse.Namespace, found: dict[str, dict[str, Row]], save: Callable[[], None]) -> None:
    prompts = dict(zip(FAMILIES, arguments.prompts, strict=True))
    for name, make in baselines(not arguments.skip_base).items():
        for seed in range(arguments.seeds):
            if str(seed) not in found.get(name, {}):
                policy, steps = make()
                _note(found, name, str(seed), measured(policy, steps, prompts, arguments.samples, seed), save)
    for arm in arguments.only:
        for seed in range(arguments.seeds):
            if str(seed) not in found.get(arm, {}):
                after = trained(arm, seed, arguments.steps)
                _note(found, arm, str(seed), measured(after, 4, prompts, arguments.samples, seed), save)


def _note(found: dict[str, dict[str, Row]], name: str, key: str, row: Row, save: Callable[[], None]) -> None:
    found.setdefault(name, {})[key] = row
    print(f"{name:26s} seed {key}  " + "  ".join(f"{measure} {value:.3f}" for measure, value in row.items()), flush=True)
    save()


def table(found: Mapping[str, Mapping[str, Row]], measures: list[str]) -> None:
    """Means over seeds, with the standard deviation where there are several."""
    print(f"\n{'':26s} seeds  " + "".join(f"{measure:>18s}" for measure in measures))
    for name, rows in found.items():
        line = f"{name:26s} {len(rows):5d}  "
        for measure in measures:
            values = torch.tensor([row[measure] for row in rows.values()], dtype=torch.float64)
            spread = f" +- {float(values.std()):.3f}" if len(values) > 1 else ""
            line += f"{float(values.mean()):.3f}{spread}".rjust(18)
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("shapeworld", "ring"), default="shapeworld")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm")
    parser.add_argument("--steps", type=int, help="of a run; by default those of the run file, or 800 on the ring")
    parser.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS), help="some of the arms")
    parser.add_argument("--prompts", type=int, nargs=4, default=(24, 12, 12, 12), help="held-out prompts of " + ", ".join(FAMILIES))
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--skip-base", action="store_true", help="leave out the base with 100 evaluations, the dearest of the baselines")
    parser.add_argument("--pretrain", type=int, default=2500, help="steps of the ring's base")
    parser.add_argument("--distil", type=int, default=400, help="steps of the ring's student")
    parser.add_argument("--json", type=Path, help="rows by world, name and seed; continued where it exists")
    parser.add_argument("--figure", type=Path, help="bars of the means, one dot for each seed (PNG)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, dict[str, dict[str, Row]]] = {}
    if arguments.json and arguments.json.exists():
        record = json.loads(arguments.json.read_text())
    found = record.setdefault(arguments.world, {})

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")

    if arguments.world == "ring":
        ring_world(arguments, found, save)
        table(found, ["reward", "mass", "modes", "distance"])
    else:
        shapeworld(arguments, found, save)
        table(found, ["count exact", *FAMILIES, *(f"{family} L-GMD" for family in FAMILIES)])
    if arguments.figure:
        panels = []
        for world, measures in (("shapeworld", ["count exact", *FAMILIES]), ("ring", ["reward", "mass"])):
            if rows := record.get(world):
                values = {name: {m: [row[m] for row in seeds.values()] for m in measures} for name, seeds in rows.items()}
                panels.append((f"{world}: mean {'reward by family' if world == 'shapeworld' else 'on the rewarded modes'}", values))
        bars(panels).save(arguments.figure)
        print(arguments.figure)


if __name__ == "__main__":
    main()
