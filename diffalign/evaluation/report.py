"""The report of a run: one self-contained HTML page from the files of its folder."""

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from .pictures import side_by_side

CURVES = {
    "reward": "Training reward (raw mean of the step)",
    "diversity/l_gmd": "Diversity within the group (L-GMD of latents)",
    "softmax_tb": "Softmax trajectory balance",
    "log_ratio/reference": "Mean log-ratio to the reference",
    "ess/target": "Effective share of the target",
    "grad_norm/policy": "Gradient norm before clipping",
    "contract/deviation": "First-step contract: max |mean - rollout mean| / std",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6675; --line: #d8dde5; --paper: #fff; --accent: #1f6feb; --faint: #a9c7f5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #343c48; --paper: #14181f; --accent: #6ea8fe; --faint: #35507a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p { margin: .3rem 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } td, th { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; } .scroll { overflow-x: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; } figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
img { max-width: 100%; height: auto; border: 1px solid var(--line); background: #fff; } pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); font-size: .8rem; }
.big { display: none; position: fixed; inset: 0; overflow: auto; background: rgba(0, 0, 0, .85); padding: 1rem; text-align: center; z-index: 1; } .big:target { display: block; }
.big img { max-width: none; }
"""


def write_report(folder: Path, name: str) -> Path:
    """Write `report.html` from metrics.jsonl, evaluation.json, config.yaml, environment.json and images/ of a run folder."""
    metrics = [json.loads(line) for line in _read(folder / "metrics.jsonl").splitlines()]
    evaluations = json.loads(_read(folder / "evaluation.json") or "[]")
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{len(metrics)} steps{_duration(metrics)}. Folder: {escape(folder.name)}.</p>',
        _headline(evaluations),
        _pictures(folder, evaluations),
        _curves(metrics, evaluations),
        _ledger(metrics),
        f"<h2>Configuration</h2><pre>{escape(_read(folder / 'config.yaml'))}</pre>",
        f"<h2>Environment</h2><pre>{escape(_read(folder / 'environment.json'))}</pre>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    target = folder / "report.html"
    target.write_text(page)
    return target


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _duration(metrics: Sequence[dict[str, Any]]) -> str:
    return f" in {metrics[-1]['elapsed']:.0f} s" if metrics else ""


def _headline(evaluations: Sequence[dict[str, Any]]) -> str:
    if len(evaluations) < 2:
        return "<h2>Held-out prompts</h2><p>Not evaluated before and after.</p>"
    first, last = evaluations[0], evaluations[-1]
    names = list(last["rewards"])
    rows = [(name, [entry["rewards"][name] for entry in (first, last)], _changes(first, last, name)) for name in names]
    rows.append(("diversity (L-GMD)", [first["l_gmd"], last["l_gmd"]], _changes(first, last, None)))
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{before:.3f}</td><td>{after:.3f}</td><td>{_interval(changes)}</td></tr>"
        for name, (before, after), changes in rows
    )
    return (
        f'<h2>Held-out prompts: step {first["step"]} against step {last["step"]}</h2><div class="scroll"><table>'
        f"<tr><th></th><th>before</th><th>after</th><th>change, 95 % interval over prompts</th></tr>{body}</table></div>"
        f'<p class="soft">{len(last["by_prompt"])} prompts that were not trained on, the same noise before and after.</p>'
    )


def _changes(first: dict[str, Any], last: dict[str, Any], name: str | None) -> list[float]:
    def value(entry: dict[str, Any]) -> float:
        return float(entry["l_gmd"] if name is None else entry["rewards"][name])

    return [value(after) - value(before) for before, after in zip(first["by_prompt"], last["by_prompt"], strict=True)]


def _interval(changes: Sequence[float]) -> str:
    mean = sum(changes) / len(changes)
    if len(changes) < 2:
        return f"{mean:+.3f}"
    std = math.sqrt(sum((change - mean) ** 2 for change in changes) / (len(changes) - 1))
    return f"{mean:+.3f} &plusmn; {1.96 * std / math.sqrt(len(changes)):.3f}"


def _pictures(folder: Path, evaluations: Sequence[dict[str, Any]]) -> str:
    if len(evaluations) < 2:
        return ""
    files = [folder / "images" / f"step-{entry['step']:06d}.png" for entry in (evaluations[0], evaluations[-1])]
    if not all(file.exists() for file in files):
        return ""
    both = folder / "images" / "before-after.png"
    side_by_side(*(Image.open(file) for file in files)).save(both)
    source = f"data:image/png;base64,{base64.b64encode(both.read_bytes()).decode()}"
    return (
        "<h2>Before (left) and after (right): the same prompts and noise</h2>"
        f'<a href="#sheet"><img src="{source}" alt="samples before and after training"></a>'
        f'<a class="big" id="sheet" href="#"><img src="{source}" alt="samples before and after training, full size"></a>'
        '<p class="soft">Click to enlarge.</p>'
    )


def _curves(metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    figures = []
    for name in evaluations[0]["rewards"] if len(evaluations) > 2 else []:
        held_out = [(entry["step"], entry["rewards"][name]) for entry in evaluations]
        figures.append(f"<figure>{_curve(held_out)}<figcaption>Held-out {escape(name)}</figcaption></figure>")
    for name, title in CURVES.items():
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if len(points) > 1:
            figures.append(f"<figure>{_curve(points)}<figcaption>{escape(title)}</figcaption></figure>")
    return f'<h2>Curves</h2><div class="curves">{"".join(figures)}</div>' if figures else ""


def _curve(points: Sequence[tuple[float, float]], width: int = 340, height: int = 170) -> str:
    """The values, and their running mean over a tenth of the run."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    spread = high - low or abs(high) or 1.0
    last = points[-1][0] or 1
    left, right, top, bottom = 52, 8, 8, 20

    def line(values: Sequence[tuple[float, float]], color: str, stroke: float) -> str:
        places = " ".join(
            f"{left + (width - left - right) * x / last:.1f},{height - bottom - (height - top - bottom) * (y - low) / spread:.1f}"
            for x, y in values
        )
        return f'<polyline points="{places}" fill="none" stroke="var(--{color})" stroke-width="{stroke}"/>'

    window = max(1, len(points) // 10)
    smooth = [
        (points[i][0], sum(y for _, y in points[max(0, i - window + 1) : i + 1]) / len(points[max(0, i - window + 1) : i + 1]))
        for i in range(len(points))
    ]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"><path d="M{left} {top}V{height - bottom}H{width - right}" '
        f'fill="none" stroke="var(--line)"/>{line(points, "faint", 1)}{line(smooth, "accent", 2)}'
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{left - 4}" y="{height - bottom}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{left}" y="{height - 5}">0</text><text x="{width - right}" y="{height - 5}" text-anchor="end">step {last:g}</text></svg>'
    )


def _ledger(metrics: Sequence[dict[str, Any]]) -> str:
    totals: dict[str, float] = {}
    for line in metrics:
        for name, value in line.items():
            if name.startswith(("seconds/", "rows/", "calls/")):
                totals[name] = totals.get(name, 0.0) + value
    if not totals:
        return ""
    seconds = {name.removeprefix("seconds/"): value for name, value in totals.items() if name.startswith("seconds/")}
    whole = sum(seconds.values()) or 1.0
    stages = "".join(f"<tr><td>{escape(name)}</td><td>{value:.1f}</td><td>{value / whole:.1%}</td></tr>" for name, value in seconds.items())
    entries = [name.removeprefix("rows/") for name in totals if name.startswith("rows/")]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{totals[f'rows/{name}']:.0f}</td><td>{totals[f'calls/{name}']:.0f}</td></tr>" for name in entries
    )
    peak = max((line.get("memory/peak_bytes", 0.0) for line in metrics), default=0.0)
    return (
        f'<h2>Ledger</h2><div class="scroll"><table><tr><th>stage</th><th>seconds</th><th>share</th></tr>{stages}</table></div>'
        f'<div class="scroll"><table><tr><th>role/stage</th><th>network rows</th><th>calls</th></tr>{rows}</table></div>'
        f'<p class="soft">Peak memory {peak / 2**30:.2f} GiB.</p>'
    )
