"""Report of a run: one self-contained HTML page from the files of its folder."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from diffalign.core.unessential import unessential
from diffalign.durable import write_whole

from .curves import Place, curve, front
from .intervals import bootstrap, paired_change
from .page import details, enlargeable, page, table
from .pairing import fewer, over, paired
from .pictures import side_by_side
from .recorded import Entries, by_prompt, columns, comparable, measures, read, read_lines, read_list

CURVES = {
    "reward": "Training reward (raw mean of the step)",
    "diversity/l_gmd": "Diversity within the group (L-GMD of latents)",
    "softmax_tb": "Softmax trajectory balance",
    "log_ratio/reference": "Mean log-ratio to the reference, nats",
    "log_ratio/spread": "Spread within the group of the log-ratio to the reference, nats",
    "target/spread": "Spread within the group of beta R, nats",
    "reference/felt": "How much the reference is felt: spread of the log-ratio over spread of beta R",
    "kl": "KL to the reference",
    "ess/target": "Effective share of the target",
    "ess/policy": "Effective share of the policy",
    "budget/used": "What a budget compares with its target",
    "ratio/clipped": "Share of clipped ratios",
    "grad_norm/policy": "Gradient norm before clipping",
    "contract/deviation": "First-step contract: deviation of a repeated call, as a share of the velocity's part of the step",
    "rows_per_second": "Network rows per second",
    "mfu/rollout": "Rollout: useful operations, as a share of the device's peak",
    "mfu/update": "Update: useful operations, as a share of the device's peak",
}
"""Titles of the curves that come first; every other metric follows under its own name."""

DRAWN = "drawn"
"""Pictures of the run's own prompts: images/drawn-NNNNNN.png."""

_NO_CURVE = ("step", "elapsed", "seconds/", "hidden/", "rows/", "calls/", "memory/", "waits/")


def write_report(folder: Path, name: str) -> Path:
    """Write `report.html` from the files of a run folder.

    Args:
        folder: run folder; of metrics.jsonl, evaluation.json, config.yaml, environment.json, alarms.json, watch.jsonl and images/, those
            that exist are used
        name: title of the page
    """
    metrics = read_lines(folder / "metrics.jsonl")
    recorded: Entries = read_list(folder / "evaluation.json")
    evaluations = comparable(recorded)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{len(metrics)} steps{_duration(metrics)}. Folder: {escape(folder.name)}.</p>',
        _what_ran(folder),
        _warnings(folder),
        _headline(evaluations, recorded),
        _pictures(folder, evaluations),
        _front(evaluations),
        _curves(metrics, evaluations, read_lines(folder / "watch.jsonl")),
        _ledger(metrics),
        details("Configuration", read(folder / "config.yaml")),
        details("Environment", read(folder / "environment.json")),
    ]
    target = folder / "report.html"
    write_whole(target, page(name, parts))
    return target


def _duration(metrics: Entries) -> str:
    seconds = sum(value for line in metrics for name, value in line.items() if name.startswith("seconds/"))
    return f", {seconds:.0f} s in training steps" if metrics else ""


def _what_ran(folder: Path) -> str:
    config = yaml.safe_load(read(folder / "config.yaml")) or {}
    environment = json.loads(read(folder / "environment.json") or "{}")
    rows = [
        (key, ", ".join(_named(config[key])) or "none")
        for key in ("policy", "objective", "sampler", "rewards", "aggregation", "prompts", "hooks")
        if config.get(key)
    ]
    rows += [(key.replace("_", " "), str(config[key])) for key in ("prompts_per_step", "total", "seed") if key in config]
    if environment:
        device = ", ".join(environment.get("accelerators", [])) or f"CPU, {environment.get('threads')} threads"
        packages = environment.get("packages", {})
        rows += [("device", device), ("versions", f"diffalign {packages.get('diffalign')}, torch {packages.get('torch')}")]
        rows += [("commit", str(environment["commit"]))] if environment.get("commit") else []
    return f"<h2>What ran</h2>{table((), rows, 'texts')}" if rows else ""


def _named(value: Any) -> list[str]:
    """Short names of the parts in a place of a configuration."""
    if isinstance(value, str):
        return [value.rpartition(".")[2]]
    if isinstance(value, Mapping) and "class_path" in value:
        path = value.get("init_args", {}).get("path")
        names = value["class_path"].split(".")
        name = ".".join(names[-2:]) if names[-1][:1].islower() and len(names) > 1 and names[-2][:1].isupper() else names[-1]
        return [f"{name} ({path})" if isinstance(path, str) else name]
    entries = value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, list) else [])
    return [f"{key}: {name}" if isinstance(key, str) else name for key, entry in entries for name in _named(entry)]


def _warnings(folder: Path) -> str:
    alarms: Entries = read_list(folder / "alarms.json")
    texts = "".join(f'<div class="warning">{escape(alarm["message"])}</div>' for alarm in alarms)
    return f"<h2>Warnings</h2>{texts}" if texts else ""


def _headline(evaluations: Entries, recorded: Entries) -> str:
    """Show what changed on held-out prompts from the first to the last of the evaluations that can be compared."""
    if len(recorded) < 2:
        return "<h2>Held-out prompts</h2><p>Not evaluated before and after.</p>"
    compared = {entry["step"] for entry in evaluations}
    others = ", ".join(str(entry["step"]) for entry in recorded if entry["step"] not in compared)
    note = f'<p class="soft">Not compared, because the prompts or the settings were others: step {others}.</p>' if others else ""
    return (_changed(evaluations[0], evaluations[-1]) if len(evaluations) > 1 else _alone(evaluations[0])) + note


def _changed(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    pairs = paired([columns(last), columns(first)])
    few = fewer(pairs, len(last["by_prompt"]))
    rows = [
        (label + over(label, few), f"{bootstrap(before).mean:.3f}", f"{bootstrap(after).mean:.3f}", paired_change(before, after).signed())
        for label, (after, before) in pairs.items()
    ]
    apart = [(label, f"{last[kind][name]:.3f}") for label, kind, name in measures(last) if label not in pairs]
    rows += [(label, "-", mean, "no prompt was scored in both") for label, mean in apart]
    return (
        f"<h2>Held-out prompts: step {first['step']} against step {last['step']}</h2>"
        f"{table(('', 'before', 'after', 'change [95 % interval]'), rows, 'wrapped')}"
        f'<p class="soft">{_whose(last)}, the same noise before and after. Intervals are over '
        "prompts. More diversity is more of every measure.</p>"
    )


def _alone(last: Mapping[str, Any]) -> str:
    values = {label: column.values for label, column in columns(last).items()}
    few = fewer({label: [each] for label, each in values.items()}, len(last["by_prompt"]))
    rows = [(label + over(label, few), str(bootstrap(each))) for label, each in values.items()]
    return (
        f"<h2>Held-out prompts: step {last['step']}</h2>{table(('', 'mean [95 % interval]'), rows, 'wrapped')}"
        f'<p class="soft">{_whose(last)}. Intervals are over prompts.</p>'
    )


def _whose(entry: Mapping[str, Any]) -> str:
    """Say the number of prompts and, if it is known, how many of them were trained on."""
    count, trained = len(entry["by_prompt"]), entry.get("also_trained")
    if trained is None:
        return f"{count} prompts"
    return f"{count} prompts, of which {trained} were trained on as well" if trained else f"{count} prompts that were not trained on"


def _pictures(folder: Path, evaluations: Entries) -> str:
    """Show the first and the last images: of held-out prompts if they were drawn, else of the run's own prompts."""
    found = [(entry["step"], folder / "images" / f"step-{entry['step']:06d}.png") for entry in evaluations]
    drawn = [(int(file.stem.rpartition("-")[2]), file) for file in folder.glob(f"images/{DRAWN}-*.png")]
    ends = _ends([(step, file) for step, file in found if file.exists()]) or _ends(sorted(drawn))
    if not ends:
        return ""
    side_by_side(*(Image.open(file) for _, file in ends)).save(folder / "images" / "before-after.png")
    names = [f"{word}: step {step}" for word, (step, _) in zip(("Before", "After"), ends, strict=True)]
    figures = "".join(enlargeable(file, f"picture-{place}", name) for place, ((_, file), name) in enumerate(zip(ends, names, strict=True)))
    return (
        f'<h2>Before and after: the same prompts and noise</h2><div class="grid">{figures}</div>'
        '<p class="soft">Click a picture to enlarge it, click again to go back.</p>'
    )


def _ends(files: Sequence[tuple[int, Path]]) -> Sequence[tuple[int, Path]]:
    """Take the first and the last picture that can be read, of pictures by step; none where these are not two."""
    first = next((each for each in files if _is_whole(each[1])), None)
    last = next((each for each in reversed(files) if _is_whole(each[1])), None)
    return [first, last] if first is not None and last is not None and first != last else []


def _is_whole(file: Path) -> bool:
    """True if a picture can be read: half of one, as a full disk leaves it, must not cost the report."""
    with unessential(f"{file} in the report"), Image.open(file) as picture:
        picture.load()
        return True
    return False


def _front(evaluations: Entries) -> str:
    if len(evaluations) < 2:
        return ""
    last = evaluations[-1]
    spread = bootstrap(by_prompt(last, "diversity", "l_gmd"))
    figures = []
    for name in last["rewards"]:
        path = [(entry["diversity"]["l_gmd"], entry["rewards"][name]) for entry in evaluations[:-1] if name in entry["rewards"]]
        place = Place("", spread, bootstrap(by_prompt(last, "rewards", name)), path)
        what = f"Held-out {name} against diversity (L-GMD); the large dot is the end, bars are 95 % intervals"
        figures.append(f"<figure>{front([place], what)}<figcaption>{escape(what)}</figcaption></figure>")
    return f'<h2>Reward and diversity</h2><div class="grid">{"".join(figures)}</div>'


def _curves(metrics: Entries, evaluations: Entries, watched: Entries) -> str:
    series = {}
    if len(evaluations) > 2:
        for label, kind, name in measures(evaluations[-1]):
            if kind == "rewards" or name == "l_gmd":
                series[f"Held-out {label}"] = [(entry["step"], entry[kind][name]) for entry in evaluations if name in entry[kind]]
    names = dict.fromkeys(name for line in metrics for name in line if not name.startswith(_NO_CURVE))
    for name in (*CURVES, *(name for name in names if name not in CURVES)):
        series[CURVES.get(name, name)] = [(line["step"], line[name]) for line in metrics if name in line]
    for name in sorted({name for line in watched for name in line["held_out"]}):
        points = [(line["step"], line["held_out"][name]) for line in watched if name in line["held_out"]]
        series[f"Held-out reward on training samples: {name}"] = points
    figures = [
        f"<figure>{curve(points, title)}<figcaption>{escape(title)}</figcaption></figure>"
        for title, points in series.items()
        if len(points) > 1
    ]
    return f'<h2>Curves</h2><div class="grid">{"".join(figures)}</div>' if figures else ""


def _ledger(metrics: Entries) -> str:
    totals: dict[str, float] = {}
    for line in metrics:
        for name, value in line.items():
            if name.startswith(("seconds/", "hidden/", "rows/", "calls/")):
                totals[name] = totals.get(name, 0.0) + value
    if not totals:
        return ""
    seconds = {name.removeprefix("seconds/"): value for name, value in totals.items() if name.startswith("seconds/")}
    whole = sum(seconds.values()) or 1.0
    stages = [(name, f"{value:.1f}", f"{value / whole:.1%}") for name, value in seconds.items()]
    entries = [name.removeprefix("rows/") for name in totals if name.startswith("rows/")]
    rows = [(name, f"{totals[f'rows/{name}']:.0f}", f"{totals[f'calls/{name}']:.0f}") for name in entries]
    peak = max((line.get("memory/peak_bytes", 0.0) for line in metrics), default=0.0)
    hidden = {name.removeprefix("hidden/"): value for name, value in totals.items() if name.startswith("hidden/")}
    beside = "".join(f" Beside other stages: {value:.1f} s of {escape(name)}." for name, value in hidden.items())
    return (
        f"<h2>Ledger</h2>{table(('stage', 'seconds', 'share'), stages)}{table(('role/stage', 'network rows', 'calls'), rows)}"
        f'<p class="soft">Peak memory {peak / 2**30:.2f} GiB.{beside}</p>'
    )
