"""Feeds broken run files, overrides and prompt files to the readers: whatever comes out of them is a result or one of our errors.

Args:
    cases: of each kind
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diffalign import config
from diffalign.core import ConfigError
from diffalign.prompts import read_prompts

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


def main(cases: int = 10000) -> None:
    quiet = settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck)
    )
    accepted = {"run files": 0, "prompt files": 0}
    start = time.monotonic()

    @quiet
    @given(run_files(), overrides)
    def runs(content: str, given_overrides: list[str]) -> None:
        accepted["run files"] += check_run(content, given_overrides)

    with tempfile.TemporaryDirectory() as folder:

        @quiet
        @given(prompt_files())
        def prompts(file: tuple[str, bytes]) -> None:
            accepted["prompt files"] += check_prompts(*file, Path(folder))

        runs()
        prompts()
    spent = time.monotonic() - start
    print(f"{cases} of each kind in {spent:.0f} s; accepted: {accepted}; every refusal was a ConfigError")
