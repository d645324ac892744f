"""Page of a comparison: one self-contained HTML file, with the images and the numbers as further files."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from .budgets import Recorded, Standing, at_equal_budgets
from .compare import Comparison
from .curves import Place, Points, front
from .page import details, enlargeable, page, table
from .pairing import over
from .pictures import comparison_sheet
from .recorded import comparable

_UNITS = {"steps": "steps", "rows": "network rows", "seconds": "seconds of training"}


def write_comparison(folder: Path, comparison: Comparison, recorded: Sequence[Recorded] = ()) -> Path:
    """Write `compare.html`, `compare.png` and `compare.json`.

    Args:
        folder: output folder, which is created
        comparison: runs that were evaluated anew on the same prompts and noise
        recorded: recorded evaluations and costs of the runs, for the tables at equal steps, rows and seconds

    Returns:
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    standings, notes = at_equal_budgets(recorded)
    first = next(iter(comparison.runs.values()))
    labels = [str(prompt) for prompt in first.prompts[: len(first.images)]]
    sheet = comparison_sheet({name: result.images for name, result in comparison.runs.items()}, labels)
    sheet.save(folder / "compare.png")
    (folder / "compare.json").write_text(json.dumps({**comparison.plain(), **_plain(standings, notes)}, indent=1), encoding="utf-8")
    names = " against ".join(comparison.runs)
    settings = ", ".join(f"{name} {value}" for name, value in first.settings.items())
    parts = [
        f"<h1>{escape(names)}</h1>",
        f'<p class="soft">{len(first.prompts)} prompts, the same noise for all runs ({settings}). Intervals are 95 %, over prompts.</p>',
        *(f"<p>{escape(note)}</p>" for note in comparison.notes()),
        _fronts(comparison, recorded),
        _means(comparison),
        _wins(comparison),
        _pictures(sheet),
        _budgets(standings, notes),
        details("Prompts", "\n".join(str(prompt) for prompt in first.prompts)),
    ]
    target = folder / "compare.html"
    target.write_text(page(names, parts), encoding="utf-8")
    return target


def _fronts(comparison: Comparison, recorded: Sequence[Recorded]) -> str:
    means, first = comparison.means(), next(iter(comparison.runs.values()))
    spreads = ["l_gmd", *(name for name in first.diversity if name.startswith("vendi/"))]
    figures = []
    for reward in comparison.rewards():
        for spread in spreads:
            paths = {run.name: _path(run, reward, spread) for run in recorded}
            places = [
                Place(run, means[f"diversity {spread}"][run], means[f"reward {reward}"][run], paths.get(run, ())) for run in comparison.runs
            ]
            best = ", ".join(comparison.front(reward, spread))
            what = f"Reward {reward} against diversity {spread}. Not beaten in both: {best}."
            figures.append(f"<figure>{front(places, what)}<figcaption>{escape(what)}</figcaption></figure>")
    if not figures:
        return ""
    note = "Dashed: the way there, as each run evaluated itself." if any(run.evaluations for run in recorded) else ""
    return f'<h2>Reward and diversity</h2><div class="grid">{"".join(figures)}</div><p class="soft">{note}</p>'


def _path(run: Recorded, reward: str, spread: str) -> Points:
    known = [entry for entry in comparable(run.evaluations) if reward in entry["rewards"] and spread in entry["diversity"]]
    return [(entry["diversity"][spread], entry["rewards"][reward]) for entry in known[:-1]]


def _means(comparison: Comparison) -> str:
    first, *others = comparison.runs
    few = comparison.fewer()
    steps = ["step", *(str(result.step) for result in comparison.runs.values())]
    rows = [steps, *([name + over(name, few), *(str(runs[run]) for run in comparison.runs)] for name, runs in comparison.means().items())]
    changes = [[name + over(name, few), *(runs[run].signed() for run in others)] for name, runs in comparison.differences().items()]
    return (
        f"<h2>Means over prompts</h2>{table(('', *comparison.runs), rows)}"
        f"<h2>Paired differences to {escape(first)}</h2>{table(('', *others), changes)}"
    )


def _wins(comparison: Comparison) -> str:
    rates, few = comparison.win_rates(), comparison.fewer()
    if not rates:
        return ""
    pairs = next(iter(rates.values()))
    head = [name + over(f"reward {name}", few) for name in rates]
    rows = [[f"{a} against {b}", *(str(rates[reward][a, b]) for reward in rates)] for a, b in pairs]
    return (
        f"<h2>Win rates</h2>{table(('', *head), rows)}"
        '<p class="soft">How often the first has more of the reward than the second, for the same prompt and noise; a tie is a half. '
        "An image for which the reward has no score in one of them does not count.</p>"
    )


def _pictures(sheet: Image.Image) -> str:
    figure = enlargeable(sheet, "pictures", "One row a prompt, one column a run, the same noise. Click to enlarge.")
    return f"<h2>Pictures</h2>{figure}"


def _budgets(standings: Mapping[str, Sequence[Standing]], notes: Sequence[str]) -> str:
    parts = ["<h2>At equal steps, rows and seconds: left out</h2>"] if notes else []
    parts += [f'<p class="soft">{escape(note)}.</p>' for note in notes]
    for budget, runs in standings.items():
        rows = [
            ["evaluated at step", *(str(run.step) for run in runs)],
            [f"{_UNITS[budget]} by then", *(f"{run.cost:.0f}" for run in runs)],
        ]
        rows += [[name + over(name, runs[0].fewer), *(_with_change(run, name) for run in runs)] for name in runs[0].values]
        parts.append(f"<h2>At equal {_UNITS[budget]}</h2>{table(('', *(run.run for run in runs)), rows)}")
    if standings:
        parts.append(
            '<p class="soft">Each run at its last own evaluation within what the cheapest run spent in all; in brackets the paired '
            "difference to the first run of the table.</p>"
        )
    return "".join(parts)


def _with_change(run: Standing, name: str) -> str:
    return f"{run.values[name].mean:.3f}" + (f" ({run.changes[name].signed()})" if name in run.changes else "")


def _plain(standings: Mapping[str, Sequence[Standing]], notes: Sequence[str]) -> dict[str, object]:
    return {
        "equal": {
            budget: [
                {
                    "run": run.run,
                    "step": run.step,
                    "cost": run.cost,
                    "values": {name: value.plain() for name, value in run.values.items()},
                    "differences": {name: value.plain() for name, value in run.changes.items()},
                    "paired_prompts": dict(run.fewer),
                }
                for run in runs
            ]
            for budget, runs in standings.items()
        },
        "left_out": list(notes),
    }
