"""Figures of the studies: reward against what is kept of diversity, and both on the way, drawn from the files of results.

    digits            losses on trees, on handwriting: share of even digits against the effective number of the five even ones
    digits_ends       losses on finished samples, the same
    digits_long       both over the steps of the long runs, and of Flow-GRPO without a KL, with the steps at which the alarm rang
    shapeworld        every objective at as many network rows: count reward against the diversity of the exact pictures
    few               students of four steps on handwriting: share of even digits by pictures drawn

Nothing is run. A figure shows means of the seeds below 100 and 95 % intervals, of the settings that the tables of the studies have: rows of
other settings and of searches are not drawn. It is written as `fronts_NAME.png`.

Args:
    figures: what is drawn
    results: folder of the files of results
    out: folder of the pictures
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from PIL import Image

from benchmarks.intervals import interval
from benchmarks.record import RESULTS
from benchmarks.study.chart import GREY, INK, Axis, Level, Line, Panel, Point, chart, in_few_colors
from benchmarks.study.tmpo import EVEN, MEASURED, SEARCH
from diffalign.digits import effective_classes

Row = Mapping[str, float]
Entry = Mapping[str, Any]
DOCS = Path(__file__).parents[2] / "docs"
COLORS = {
    "Softmax-TB": "#1558c0",
    "Softmax-TB, soft": "#6f9be0",
    "Flow-GRPO": "#c5221f",
    "Flow-GRPO, no KL": "#d98200",
    "ELBOSoftmaxTB": "#00796b",
    "ELBOPolicyGradient": "#7a5c00",
    "DiffusionNFT": "#7b3fb5",
    "AWM": "#2e7d32",
    "CRD": "#d05a00",
    "DGPO": "#ad1480",
    "RAM": "#546e7a",
    "TDM-R1": "#c5221f",
    "TDM-R1 without": "#80868b",
    "TDM and direct RL": "#1558c0",
    "TDM and direct RL, weight 1": "#6f9be0",
    "base": "#3c4043",
}
"""Beginning of a name -> color; the longest that fits counts."""
OVER_SEEDS = "Means over seeds, whose number stands in brackets, with 95 % intervals; further right and higher is better."


@attrs.frozen(eq=False)
class Setting:
    """The runs behind a point or line.

    Args:
        name: as it is written
        where: values that an entry of the file has, all of them
        step: of the row that is shown
        shape: of the point
    """

    name: str
    where: Mapping[str, Any]
    step: int = 0
    shape: str = "circle"

    @property
    def color(self) -> str:
        return COLORS[max(filter(self.name.startswith, COLORS), key=len)]


@attrs.define
class Source:
    """One file of results.

    Args:
        file: where it stands

    Raises:
        SystemExit: the file is missing, or has no run of a setting.
    """

    file: Path
    content: Mapping[str, Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if not self.file.exists():
            raise SystemExit(f"fronts needs {self.file}, which is not there: give the folder of the results as --results")
        self.content = json.loads(self.file.read_text())

    def runs(self, where: Mapping[str, Any]) -> list[Entry]:
        """Entries of the reported seeds with these values; at least one."""
        entries = [entry for entry in self.content.get("runs", ()) if entry["seed"] < SEARCH]
        found = [entry for entry in entries if all(entry.get(name) == value for name, value in where.items())]
        if not found:
            raise SystemExit(
                f"{self.file} must have a run of {dict(where)} with a seed below {SEARCH}; it has {len(entries)} runs with such seeds, "
                "and none of these settings: run that study, or draw other --figures"
            )
        return found

    def rows(self, setting: Setting) -> list[Row]:
        """The row of the setting's step in each of its runs."""
        rows = [row for entry in self.runs(setting.where) for row in entry["rows"] if row["step"] == setting.step]
        if not rows:
            raise SystemExit(
                f"{self.file} has runs of {setting.name}, but none was measured after step {setting.step}: run that study again"
            )
        return rows


def point(source: Source, setting: Setting, x: str, y: str) -> Point:
    """Means and intervals of two measures, and in the name the number of seeds."""
    rows = source.rows(setting)
    means = (interval([row[name] for row in rows]) for name in (x, y))
    return Point(f"{setting.name} ({len(rows)})", setting.color, setting.shape, *means)


def over(rows: Iterable[tuple[float, float]]) -> list[tuple[float, tuple[float, float]]]:
    """Mean and interval by place, of the places that all runs have; in order."""
    found: dict[float, list[float]] = {}
    for place, value in rows:
        found.setdefault(place, []).append(value)
    whole = max(map(len, found.values()))
    return [(place, interval(values)) for place, values in sorted(found.items()) if len(values) == whole]


def on_digits(arm: str, steps: int, rate: float = 1e-4, last: float = 1.0) -> Mapping[str, Any]:
    return {"task": "even", "arm": arm, "rate": rate, "last": last, "steps": steps}


UNSCALED = "flow-grpo, not standardised, kl 1 / beta"
TREES = (
    Setting("Softmax-TB, 20 nats", on_digits("softmax-tb", 600), 600),
    Setting("Softmax-TB, soft values (tried)", on_digits("softmax-tb, soft values of nodes (tried)", 600), 600),
    Setting("Flow-GRPO, kl 1/20, not standardised", on_digits(UNSCALED, 600), 600),
    Setting("Flow-GRPO, kl 0.1", on_digits("flow-grpo, kl 0.1", 600), 600),
    Setting("Flow-GRPO, no KL", on_digits("flow-grpo", 600), 600),
    Setting("Flow-GRPO, kl 1/80", on_digits("flow-grpo, not standardised, kl 1 / 4 beta", 2400, last=0.1), 2400, "diamond"),
)
BESIDE = (
    Setting("Softmax-TB on trees", on_digits("softmax-tb", 600), 600),
    Setting("Flow-GRPO on trees", on_digits(UNSCALED, 600), 600),
)
ENDS = (
    Setting("ELBOSoftmaxTB, sigma from 0.3", on_digits("elbo softmax-tb, sigma from 0.3", 150, 3e-5), 150, "square"),
    Setting("ELBOSoftmaxTB, flow", on_digits("elbo softmax-tb, flow weighting", 150), 150, "square"),
    Setting("ELBOPolicyGradient", on_digits("elbo policy gradient, sigma from 0.3", 150, 3e-5), 150, "square"),
    Setting("DiffusionNFT, kl 0.1", on_digits("diffusion-nft, kl 0.1", 150, 3e-4), 150, "square"),
    Setting("AWM, kl 0.1", on_digits("awm, kl 0.1", 150), 150, "square"),
    Setting("CRD, kl 1", on_digits("crd, kl 1.0", 150, 3e-4), 150, "square"),
    Setting("DGPO, kl 0.02", on_digits("dgpo, kl 0.02", 150, 3e-4), 150, "square"),
    Setting("RAM, beta 5", on_digits("ram, beta 5.0", 150), 150, "square"),
    Setting("ELBOSoftmaxTB, flow, 1e-4", on_digits("elbo softmax-tb, flow weighting", 300, last=0.1), 300, "diamond"),
    Setting("ELBOSoftmaxTB, flow, 5e-5", on_digits("elbo softmax-tb, flow weighting", 600, 5e-5, 0.1), 600, "diamond"),
    Setting("DiffusionNFT, kl 0.03", on_digits("diffusion-nft, kl 0.03", 600, 3e-4, 0.1), 600, "diamond"),
)


def optimum(source: Source, target: str) -> Point:
    """Share of even digits and effective number of them, of the base tilted by exp(20 R)."""
    shares = source.content.get("targets", {}).get(target)
    if shares is None:
        raise SystemExit(f"{source.file} must have the shares of the exact optimum under targets, {target!r}: run `study tmpo` on it")
    of_even = sum(shares[digit] for digit in EVEN)
    modes = effective_classes(torch.tensor(shares, dtype=torch.float64), EVEN)
    return Point("exact optimum", INK, "star", (of_even, math.nan), (modes, math.nan))


REWARD = Axis("reward: share of even digits", (0.87, 1.005), (0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0))
KEPT = Axis("effective even digits, of 5", (0.9, 5.2), (1, 2, 3, 4, 5))


def digits(results: Path) -> Image.Image:
    source = Source(results / "digits_study.json")
    points = [*(point(source, setting, "reward", "modes") for setting in TREES), optimum(source, "even")]
    reward = attrs.evolve(REWARD, ends=(0.93, 1.005), ticks=REWARD.ticks[3:])
    return chart(
        "Handwriting, losses on trees: reward against the digits that are kept",
        (OVER_SEEDS,),
        (("circle", GREY, "600 steps"), ("diamond", GREY, "2,400 steps at a rate that falls")),
        (Panel("8 trees of 27 leaves a step", reward, KEPT, 760, points),),
    )


def digits_ends(results: Path) -> Image.Image:
    source = Source(results / "digits_study.json")
    points = [*(point(source, setting, "reward", "modes") for setting in (*ENDS, *BESIDE)), optimum(source, "even, ends")]
    kept = attrs.evolve(KEPT, ends=(3.3, 5.3), ticks=(3.5, 4, 4.5, 5))
    return chart(
        "Handwriting, losses on finished samples: reward against the digits that are kept",
        (OVER_SEEDS,),
        (
            ("square", GREY, "finished samples, 150 steps"),
            ("diamond", GREY, "300 or 600 steps at a rate that falls"),
            ("circle", GREY, "trees, 600 steps"),
        ),
        (Panel("The axis of digits begins at 3.3", REWARD, kept, 800, points),),
    )


FREE = Setting("Flow-GRPO, no KL", on_digits("flow-grpo", 300))
LONG = tuple(
    Setting(name, on_digits(arm, steps))
    for name, arm in (("Softmax-TB, 20 nats", "softmax-tb"), ("Flow-GRPO, kl 1/20, not standardised", UNSCALED))
    for steps in (2400, 6000)
)
RANG = {"near": ("triangle", "alarm: further from real pictures"), "diversity": ("square", "alarm: less diverse")}
"""What the alarm watched -> shape and meaning of its mark."""


def digits_long(results: Path) -> Image.Image:
    long, short = Source(results / "digits_study.json"), Source(results / "digits_alarm.json")
    runs = [(setting, entry) for setting in LONG for entry in long.runs(setting.where)]
    runs += [(FREE, entry) for entry in short.runs(FREE.where)]
    best = optimum(long, "even").y[0]

    def lines(measure: str) -> list[Line]:
        return [
            Line(
                setting.name,
                setting.color,
                [(row["step"], (row[measure], math.nan)) for row in entry["rows"]],
                [(alarm["step"], RANG[alarm["kind"]][0]) for alarm in entry.get("alarms", ())],
            )
            for setting, entry in runs
        ]

    steps = Axis("steps of 216 pictures (logarithmic)", (70, 6400), MEASURED, math.log)
    reward = attrs.evolve(REWARD, ends=(0.92, 1.003), ticks=(0.92, 0.94, 0.96, 0.98, 1.0))
    return chart(
        "Handwriting: what lasts over long runs",
        ("One line a run; dots are measures. Black marks stand at the step at which the alarm rang. The run without a KL has 300 steps.",),
        [
            *(("line", color, name) for name, color in {setting.name: setting.color for setting, _ in runs}.items()),
            *((shape, INK, meaning) for shape, meaning in RANG.values()),
        ],
        (
            Panel("Digits that are kept", steps, KEPT, 560, lines=lines("modes"), levels=[Level("exact optimum", GREY, best)]),
            Panel("Reward", steps, reward, 420, lines=lines("reward")),
        ),
    )


def on_shapeworld(arm: str, steps: int, groups: int = 10, rate: float = 1e-3) -> Mapping[str, Any]:
    return {"arm": arm, "steps": steps, "groups": groups, "rate": rate, "prompts": 12, "samples": 32}


SHAPEWORLD = (
    Setting("Softmax-TB", on_shapeworld("softmax-tb", 90), 90),
    Setting("Flow-GRPO, kl 0.03", on_shapeworld("flow-grpo, kl 0.03", 90), 90),
    Setting("ELBOSoftmaxTB, sigma from 0.3", on_shapeworld("elbo softmax-tb", 25), 25, "square"),
    Setting("AWM, kl 0.1", on_shapeworld("awm, kl 0.1", 37), 37, "square"),
    Setting("RAM, beta 5", on_shapeworld("ram, beta 5", 37), 37, "square"),
    Setting("DiffusionNFT, kl 0.1", on_shapeworld("diffusion-nft, kl 0.1", 30), 30, "square"),
    Setting("DGPO", on_shapeworld("dgpo", 30), 30, "square"),
    Setting("CRD", on_shapeworld("crd", 30), 30, "square"),
    Setting("base, not trained", on_shapeworld("base", 0, 0, 0.0), 0, "triangle"),
    Setting("base, guidance 3, twice the evaluations", on_shapeworld("base, guidance 3", 0, 0, 0.0), 0, "triangle"),
)


def shapeworld(results: Path) -> Image.Image:
    source = Source(results / "shapeworld_study.json")
    points = [point(source, setting, "reward", "L-GMD of the exact") for setting in SHAPEWORLD]
    panel = Panel(
        "Held-out prompts",
        Axis("count reward", (0.75, 0.94), (0.76, 0.8, 0.84, 0.88, 0.92)),
        Axis("L-GMD of the exact pictures, ln of latent distance", (0.0, 0.28), (0, 0.05, 0.1, 0.15, 0.2, 0.25)),
        760,
        points,
    )
    return chart(
        "ShapeWorld after 54 thousand network rows: reward against diversity",
        (OVER_SEEDS,),
        (
            ("circle", GREY, "losses on trees"),
            ("square", GREY, "losses on finished samples"),
            ("triangle", GREY, "no training"),
        ),
        (panel,),
    )


def on_few(arm: str, changes: Sequence[str] = (), size: tuple[int, int, int] = (48, 24, 480)) -> Mapping[str, Any]:
    return {"task": "even", "arm": arm, "set": list(changes), **dict(zip(("groups", "samples", "steps"), size, strict=True))}


FEW = (
    Setting("TDM-R1", on_few("TDM-R1")),
    Setting("TDM and direct RL, weight 4", on_few("TDM and direct RL", ["objective.weight=4"])),
    Setting("TDM and direct RL, weight 1", on_few("TDM and direct RL")),
    Setting("TDM-R1 without its reward term", on_few("no reward term")),
)
"""Runs with the budget of the release."""


def few(results: Path) -> Image.Image:
    source = Source(results / "few_study.json")
    runs = {setting: source.runs(setting.where) for setting in FEW}

    def untrained(arm: str, seeds: Sequence[int]) -> list[float]:
        return [entry["row"]["even"] for entry in source.runs(on_few(arm, size=(0, 0, 0))) if entry["seed"] in seeds]

    lines = []
    for setting, entries in runs.items():
        drawn = [(row["step"] * entry["groups"] * entry["samples"], row["even"]) for entry in entries for row in way_of(entry)]
        begun = [(0, even) for even in untrained("TDM, 4 evaluations", [entry["seed"] for entry in entries])]
        lines.append(
            Line(f"{setting.name} ({len(entries)})", setting.color, [(pictures / 1000, even) for pictures, even in over([*begun, *drawn])])
        )
    seeds = sorted({entry["seed"] for entries in runs.values() for entry in entries})
    base, _ = interval(untrained("base, 100 evaluations", seeds))
    panel = Panel(
        'Prompt "a digit", 1,152 pictures a step',
        Axis("pictures drawn, thousands", (0, 570), (0, 100, 200, 300, 400, 500)),
        Axis("share of even digits (trained)", (0.38, 0.82), (0.4, 0.5, 0.6, 0.7, 0.8)),
        760,
        lines=lines,
        levels=[Level("base with 100 evaluations", GREY, base, 0.62)],
    )
    return chart(
        "Handwriting in 4 evaluations: what a reward without a gradient adds to distillation",
        ("Means over runs, whose number stands in brackets, with 95 % intervals. All runs begin as the distilled student.",),
        [("line", line.color, line.name) for line in lines],
        (panel,),
    )


def way_of(entry: Entry) -> list[Row]:
    """Measures of a run of few steps on its way and at its end."""
    return [*entry.get("curve", ()), {"step": entry["steps"], **entry["row"]}]


FIGURES: Mapping[str, Callable[[Path], Image.Image]] = {
    "digits": digits,
    "digits_ends": digits_ends,
    "digits_long": digits_long,
    "shapeworld": shapeworld,
    "few": few,
}


def main(
    figures: tuple[Literal[*FIGURES], ...] = tuple(FIGURES),
    results: Path = RESULTS,
    out: Path = DOCS,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in figures:
        file = out / f"fronts_{name}.png"
        in_few_colors(FIGURES[name](results), COLORS.values()).save(file, optimize=True)
        print(file)
