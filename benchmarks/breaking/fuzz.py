"""Feeds broken files of users to their readers: what comes out is what they mean, or one message of ours.

Run files with overrides, prompt files, adapters and READMEs. Adapters are compared with the weights that plain diffusers has with the same
file, prompt files with what Python reads in them, READMEs with what the hub reads. A case is made of its number.

Args:
    cases: of each kind
    kinds: what is broken
    json: write the counts here, and go on from those that it holds
"""

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.record import Record
from diffalign import config
from diffalign.core import ConfigError
from diffalign.prompts import read_prompts

from . import fuzz_cards, fuzz_lora, fuzz_prompts
from .fault import FaultError

RUN = """
policy:
  class_path: GaussianMixturePolicy
  init_args: {means: [[3.0, 0.0], [-3.0, 0.0]], scale: 0.5}
objective: {class_path: SoftmaxTB, init_args: {beta: 2.0}}
sampler: {class_path: TreeSampler, init_args: {steps: 5, plan: {class_path: FixedPlan, init_args: {splits: [1, 2]}}}}
rewards: {class_path: JPEGCompressibility}
prompts: {class_path: Prompts, init_args: {prompts: [a, b]}}
total: 2
"""

text = st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | text | st.dates() | st.binary(max_size=4)
names = st.sampled_from(
    ["class_path", "init_args", "policy", "beta", "steps", "plan", "splits", "rows", "prompts", "TreeSampler", "FixedPlan"]
)
values = st.recursive(
    scalars | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | text | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def paths(tree: object, prefix: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Every place in a run file."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in inner for place in ((*prefix, key), *paths(value, (*prefix, key)))]


PLACES = paths(yaml.safe_load(RUN))


@st.composite
def run_files(draw: st.DrawFn) -> str:
    """A good run file with some places replaced, removed or added to; or with characters changed; or no run file at all."""
    if draw(st.integers(0, 9)) == 0:
        deep = st.integers(1, 5000).map(lambda depth: "total: " + "[" * depth)
        huge = st.integers(4000, 6000).map(lambda digits: "total: " + "9" * digits)
        return draw(st.text(max_size=60) | st.binary(max_size=40).map(lambda content: content.decode("latin-1")) | deep | huge)
    tree = yaml.safe_load(RUN)
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        below = tree
        try:
            for key in place[:-1]:
                below = below[key]
            change = draw(st.integers(0, 3))
            if change == 0:
                del below[place[-1]]
            elif change == 1 and isinstance(below, dict):
                below[draw(text | names)] = draw(values)
            else:
                below[place[-1]] = draw(values)
        except (KeyError, IndexError, TypeError):  # a change before has removed the place
            continue
    content: str = yaml.safe_dump(tree)
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.text(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
    return content


dotted = st.lists(names | text, min_size=1, max_size=4).map(".".join)
overrides = st.lists(st.builds("--{}={}".format, dotted, text | names) | dotted | text, max_size=3)


@st.composite
def prompt_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Ending and content."""
    ending = draw(st.sampled_from([".txt", ".json", ".jsonl", ".TXT", ""]))
    plain = st.binary(max_size=60) | st.text(max_size=60).map(str.encode)
    entry = st.fixed_dictionaries(
        {}, optional={"prompt": scalars.filter(lambda value: not isinstance(value, bytes)), "count": st.integers()}
    )
    dump: Callable[[object], str] = lambda value: yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()  # noqa: E731
    lines = st.lists(entry.map(dump) | st.text(max_size=10), max_size=4).map(lambda rows: "\n".join(rows).encode())
    deep = st.integers(1, 10**5).map(lambda depth: b"[" * depth) | st.integers(4000, 6000).map(lambda digits: b"[" + b"9" * digits + b"]")
    return ending, draw(plain | lines | deep)


def check_run(content: str, given_overrides: list[str]) -> bool:
    """Read and build; true if it was accepted."""
    try:
        config.parse_text(content, "fuzz", given_overrides).build()
    except ConfigError:
        return False
    return True


def check_prompts(ending: str, content: bytes, folder: Path) -> bool:
    """Read; true if it was accepted."""
    file = folder / f"prompts{ending}"
    file.write_bytes(content)
    try:
        read_prompts(str(file))
    except ConfigError:
        return False
    return True


PART = 500
"""Cases of one entry of the record."""

BY_NUMBER: Mapping[str, Callable[[int, Path], str]] = {
    "adapters": fuzz_lora.case,
    "prompts": fuzz_prompts.case,
    "cards": fuzz_cards.case,
}
BY_HYPOTHESIS: Mapping[str, tuple[st.SearchStrategy[tuple[Any, Any]], Callable[[Any, Path], bool]]] = {
    "runs": (st.tuples(run_files(), overrides), lambda case, _: check_run(*case)),
    "files": (prompt_files(), lambda case, folder: check_prompts(*case, folder)),
}
KINDS = (*BY_NUMBER, *BY_HYPOTHESIS)


def tried(kind: str, first: int, count: int) -> dict[str, Any]:
    """Try cases from a number on.

    Returns:
        How often each outcome came, and what faults there were.
    """
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name) / "case"
        if kind in BY_NUMBER:
            for number in range(first, first + count):
                try:
                    outcomes[BY_NUMBER[kind](number, folder)] += 1
                except FaultError as fault:
                    faults.append(str(fault)[:500])
                    print(faults[-1])
        else:
            cases, check = BY_HYPOTHESIS[kind]
            folder.mkdir()

            @seed(first)
            @settings(
                max_examples=count,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(cases)
            def try_one(case: Any) -> None:
                outcomes["accepted" if check(case, folder) else "refused"] += 1

            try_one()
    return {"outcomes": dict(sorted(outcomes.items())), "faults": faults}


def main(cases: int = 10000, kinds: tuple[Literal[*KINDS], ...] = KINDS, json: Path | None = None) -> int:
    for name in ("diffusers", "peft", "transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    record, faults = Record(json), 0
    for kind in kinds:
        total: Counter[str] = Counter()
        for first in range(0, cases, PART):
            count = min(PART, cases - first)
            entry = record.run(
                kind, {"first": first, "cases": count}, lambda kind=kind, first=first, count=count: tried(kind, first, count)
            )
            total.update(entry["outcomes"])
            faults += len(entry["faults"])
        print(f"{kind}, {cases} cases:")
        print("\n".join(f"  {count:6d}  {outcome}" for outcome, count in total.most_common()))
    print(f"faults: {faults}")
    return int(faults > 0)
