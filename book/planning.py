"""Writes docs/planning.md, counting what published models cost on cards: `python book/planning.py`, some minutes on one core.

`python book/planning.py SDXL` counts this row alone.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from diffalign import config
from diffalign.core import AlignmentLoop
from diffalign.costs.activations import Activations
from diffalign.costs.beside import beside_bytes
from diffalign.costs.cards import CARDS
from diffalign.costs.limits import work_of
from diffalign.costs.planned import planned
from diffalign.costs.roofline import bounds
from diffalign.costs.sizes import tensor_bytes
from diffalign.costs.unloaded import shape_of
from diffalign.samplers import Branches

FILE = Path(__file__).parents[1] / "docs" / "planning.md"
DEVICES = ("h200", "h100", "a100", "4090")
ROWS = 4

MODELS: Mapping[str, int] = {"SDXL": 1024, "Sana-1.6B": 1024, "SD3.5-M": 512, "FLUX.1-dev": 512, "Z-Image": 1024, "Qwen-Image": 1024}
"""Models of the table and their sides in pixels."""

RUN = """\
policy:
  class_path: FlowMatchingPolicy.from_pretrained
  init_args: {{path: {path}, resolution: {pixels}, dtype: bfloat16, lora: {{rank: 32}}, checkpointing: true, offload: true}}
objective: {{class_path: SoftmaxTB, init_args: {{rows: {rows}}}}}
sampler: {{class_path: TreeSampler, init_args: {{steps: {steps}, plan: {{splits: {splits}, branches: 3, eta: 0.7}}}}}}
rewards: JPEGCompressibility
prompts: {{class_path: Prompts, init_args: {{prompts: [a text]}}}}
prompts_per_step: 1
"""

TEXT = """\
# Planning without weights

`diffalign check RUN.yaml` builds a run and says what a step costs. Where the weights are not on this machine, `--no-weights` plans the
run by the published shape of its model: the network is made on torch's meta device, which has sizes and no numbers. Nothing is downloaded,
no GPU is needed, and it takes a minute at most for each image size that prompts ask for.

```
diffalign check examples/flux1_tmpo_24gb.yaml --no-weights --device 4090
diffalign check examples/sd35_tmpo_three_tasks.yaml --no-weights --device h100 --memory 80
diffalign check RUN.yaml --no-weights --teraflops 400 --bandwidth 2.0 --memory 48     # a card without a name here
```

It says

- how much memory a device needs: weights, gradients and optimizer, the rollout, the update, and text encoders and autoencoder, where
  they stay (`offload: true` takes them off the device while they have nothing to do);
- the row budget that fits: `--objective.rows N`. The memory of an update is counted on the operators of a forward and a backward pass, at
  each moment of it, with activation checkpointing where the run has it, for the longest prompt and the largest image size that one asks
  for. Gradients are counted once, beside it. Under guidance a row of the budget is two network rows. Rows whose graph the rollout keeps
  (`keep_graph`) are in memory at once, whatever the budget;
- the seconds of a step on the card: [what is expected](scaling.md#the-limit-of-a-step), compiled or not as the run is, and the least, by
  the roofline: a floor. Measured steps of SD3.5-M took 1.2 (compiled and recorded) to 2.4 times the bound "operator by operator"; a call of
  one row, which waits for the host, up to ten times. If prompts ask for several sizes, it is the mean over the prompts.

Not in it: rewards and the evaluation, which are not built; the allocator's own room (leave a tenth); the unpacking of quantised weights.
Of [few-step objectives](few_step.md#roles) the losses of all roles are counted, with gradient and without, of a step in which none rests;
where stages are drawn, their mean number. An objective of your own says its rows by `update_rows` or `step_rows`
([extending](extending.md#an-objective)), else they are "not known": the metrics `rows/ROLE/update` and `memory/update_bytes` of a run's
first step say them.
Known are {known}. `path` may also be such a name. A run that has its weights is planned in the same way by `diffalign check RUN.yaml`.

## All that is missing

Without `--no-weights`, prompt files, weights of rewards and of the model that are neither here nor within reach are named in one message,
what is on this machine first. If there is no network, the hub is asked once and not again for each file.

## Cards and models

Written by `python book/planning.py`; a test counts a row again. A step of one prompt: a tree of 27 leaves whose three branchings lie a
quarter of the rollout apart, an update of its 13 branching nodes in pieces of {rows} rows, and the reference's. LoRA of rank 32, bfloat16,
activation checkpointing, text encoders offloaded, no guidance. Least seconds a step, operator by operator (in brackets: if all that is
no product were fused with a neighbour); memory of a device in GiB, the text encoders' passage included; and the rows that an update
could have at once in 24 and in 80 GiB.

| model | pixels | steps | GiB | rows in 24, in 80 GiB | {devices} |
|---|---|---|---|---|{lines}|
"""


@attrs.frozen
class Row:
    """Costs of one model.

    Args:
        gibibytes: memory of a device
        rows: largest row budget by memory in GiB; 0 does not fit
        seconds: least seconds a step by card, apart and fused
    """

    gibibytes: float
    rows: tuple[int, ...]
    seconds: Mapping[str, tuple[float, float]]


def loop_of(name: str) -> AlignmentLoop:
    """The loop of a model of the table, without weights."""
    steps = shape_of(name).steps
    splits = [steps * place // 4 for place in (1, 2, 3)]
    text = RUN.format(path=name, pixels=MODELS[name], rows=ROWS, steps=steps, splits=splits)
    return planned(config.parse_text(text, "plan")).loop


def row(name: str) -> Row:
    """Count a model of the table."""
    loop = loop_of(name)
    assert isinstance(loop.sampler, Branches)
    tree = loop.sampler.branching()
    update = loop.objective.update_rows(tree.leaves, tree.replay_rows)
    assert update is not None
    activations, policy = Activations.of(loop), loop.objective.policy
    assert activations.counted is not None
    trained = sum(map(tensor_bytes, policy.trainable_parameters().values()))
    fixed = sum(map(tensor_bytes, policy.parameters())) + 3 * trained  # gradients, and two moments of AdamW
    work = work_of(loop, tree, update)
    seconds = {}
    for device in DEVICES:
        apart, fused = (sum(part.seconds for part in bounds(activations.counted, work, CARDS[device], fused=way)) for way in (False, True))
        seconds[device] = (apart, fused)
    room = [max(activations.fitting(memory * 2**30 - fixed), 0) for memory in (24, 80)]
    most = fixed + max(activations.at(ROWS), beside_bytes(policy).texts)
    return Row(most / 2**30, tuple(room), seconds)


def line(name: str, costs: Row) -> str:
    """A row of the table."""
    times = " | ".join(f"{apart:.3g} ({float(f'{fused:.2g}'):g})" for apart, fused in costs.seconds.values())
    rows = ", ".join(str(count) if count else "none" for count in costs.rows)
    return f"| {name} | {MODELS[name]} | {shape_of(name).steps} | {costs.gibibytes:.1f} | {rows} | {times} |"


def header() -> str:
    """All but the rows of the table."""
    from diffalign.costs.shapes import PUBLISHED

    devices, lines = " | ".join(DEVICES), "|".join("---" for _ in DEVICES)
    return TEXT.format(known=", ".join(PUBLISHED), rows=ROWS, devices=devices, lines=lines)


def write(names: Sequence[str]) -> None:
    """Write the page, with the rows of these models counted anew and the others as they were. Each row is written when it is known."""
    before = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    rows = {name: text for text in before for name in MODELS if text.startswith(f"| {name} | ")}
    for name in names:
        rows[name] = line(name, row(name))
        print(rows[name], flush=True)
        FILE.write_text(header() + "".join(f"{rows[name]}\n" for name in MODELS if name in rows), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:] or list(MODELS))
