"""Writes docs/configuration.md from the constructors: `python book/configuration.py`, or `make reference`."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import docstring_parser

from diffalign.config import listing, parts, run
from diffalign.config.signature import MISSING, accepts, alternatives, is_slot, item_of, parameters, value_of
from diffalign.core import AlignmentLoop

FILE = Path(__file__).parents[1] / "docs" / "configuration.md"

HEADER = f"""\
# Configuration reference

Written by `make reference` from the constructors; a test compares it with them. `diffalign parts NAME` prints the same about one part, a
part of your own included, and `diffalign check RUN.yaml` the whole configuration of a run with every default filled in.

A run file is YAML. A value whose type is a part is a class with its arguments, or only its name if it needs none:

```yaml
objective:
  class_path: SoftmaxTB        # a name from this page, or the import path of a class of yours
  init_args:
    beta: {{class_path: Linear, init_args: {{start: 5.0, end: 20.0, steps: 100}}}}
rewards: JPEGCompressibility
```

The class may be left out where it goes without saying, and only the arguments are written: where the default is a part of that class, where
there is one class only, and as {", as ".join(f"`{name}` in `{key}`" for key, name in run.USUAL.items())}.

```yaml
sampler:
  class_path: TreeSampler
  init_args: {{steps: 8, plan: {{splits: [1, 2], eta: 0.7}}}}  # a FixedPlan, as the default is
prompts: {{path: shapeworld/count}}
optimizers:
  default: {{lr: 1e-4, weight_decay: 0.0}}  # the others are those of torch's AdamW
average: {{decay: 0.9}}
```

`optimizers: 1e-4` is AdamW with weight decay 1e-4; `{{default: {{lr: 1e-4}}}}` is torch's AdamW with its own default, 0.01.

Any value can be replaced on the command line by its dotted name: `diffalign train RUN.yaml --objective.beta=2 --sampler.steps 6`. There
null drops an entry of a mapping, such as one of several rewards and its weight (`--rewards.ocr=null --aggregation.weights.ocr=null`); the
last one stays. The objective's `policy` is the run's, and a policy's `sharding` is what `--shard` gives; they are not written. A key that
does not exist, a value of another type or a missing one is an error with its place.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEADER, *_run_keys(), *_slots(), *_values()]).rstrip() + "\n"


def _run_keys() -> Iterator[str]:
    about = {**_meanings(AlignmentLoop), **_meanings(run.Beside)}
    yield from ("## A run", "", *_table({name: listing.in_words(known) for name, known in run.keys().items()}, about), "")


def _slots() -> Iterator[str]:
    for slot, members in listing.by_slot([*parts.own().values()]).items():
        if slot in parts.SLOTS:
            yield from (f"## {slot}", "", (inspect.getdoc(parts.SLOTS[slot]) or "").partition("\n")[0], "")
            for part in members:
                yield from _section(part)


def _values() -> Iterator[str]:
    """What other arguments are made of: the package's classes that some argument's type names."""
    named = sorted(_mentioned(), key=lambda part: part.name)
    yield from ("## Values", "", "What stands as an argument of the above.", "")
    for part in named:
        yield from _section(part)


def _mentioned() -> list[parts.Announced]:
    in_slots = {part.name for slot, members in listing.by_slot([*parts.own().values()]).items() if slot in parts.SLOTS for part in members}
    known, found = parts.own(), dict.fromkeys(in_slots)
    waiting = [hint for known_key in run.keys().values() for hint in _classes(known_key.hint)]
    waiting += [hint for name in in_slots for hint in _hints(known[name].target)]
    while waiting:
        slot = waiting.pop()
        for part in known.values():
            if part.name not in found and part.target is not None and accepts(slot, part.target) == "call":
                found[part.name] = None
                waiting += _hints(part.target)
    return [known[name] for name in found if name not in in_slots]


def _hints(target: Any) -> list[type]:
    return [hint for entry in (parameters(target) or {}).values() for hint in _classes(entry.hint)]


def _classes(hint: Any) -> list[type]:
    """The package's classes that a type names, inside lists and mappings as well."""
    members = [inner for member in alternatives(hint) for inner in (member, item_of(member), value_of(member)) if inner is not MISSING]
    return [member for member in members if inspect.isclass(member) and is_slot(member) and member.__module__.startswith("diffalign")]


def _section(part: parts.Announced) -> Iterator[str]:
    yield from (f"### {part.name}", "", part.summary, "")
    taken = listing.arguments(part.target)
    if taken:
        yield from (*_table(taken, _meanings(part.target)), "")


def _meanings(target: Any) -> dict[str, str]:
    """What the docstring says about each argument, or that of a class which it extends."""
    sources = (
        [known for known in reversed(target.__mro__) if known.__module__.startswith("diffalign")] if inspect.isclass(target) else [target]
    )
    texts: dict[str, str] = {}
    for source in sources:
        found = docstring_parser.parse(inspect.cleandoc(source.__doc__ or ""), docstring_parser.DocstringStyle.GOOGLE).params
        texts |= {name: " ".join((entry.description or "").split()) for entry in found for name in entry.arg_name.split(", ")}
    return texts


def _table(taken: Mapping[str, str], meanings: Mapping[str, str]) -> Iterator[str]:
    yield from ("| argument | type | default | meaning |", "|---|---|---|---|")
    for name, text in taken.items():
        kind, _, default = text.partition("; ")
        default = default.removeprefix("default ")
        shown = default if default in ("", "required") else f"`{default}`"
        yield "| " + " | ".join(_cell(entry) for entry in (f"`{name}`", kind, shown, meanings.get(name, ""))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(page())
