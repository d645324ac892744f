"""How much of a step's gradient is signal, layer by layer: which layers to adapt, and which tree to draw.

Takes the gradients g_1 .. g_n of n steps of a run without moving any weight (same weights, other prompts, other noise) and prints by kind
of layer

    signal = |E g|^2 / E |g|^2,    |E g|^2 estimated without bias by (|sum g|^2 - sum |g|^2) / (n (n - 1))

the squared cosine between one step's gradient and the true one, and its jackknife error. About 1 / signal steps are needed before what was
learned outweighs what was gathered by chance, so where the noise is high it is better to adapt the layers with a high share, and to compare
trees of equal cost by it. `--changes policy.lora=null` looks at all weights of the model; LoRA's A matrices have no gradient at the start.

Args:
    run: a run file, or the name of a built-in run
    changes: KEY=VALUE each, what is other than in the run file
    batches: steps whose gradients are taken
    json: also write the table here
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import write
from diffalign.config import parse
from diffalign.core import Progress


class Recorder(torch.optim.Optimizer):
    """Keeps gradients, moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.seen: list[list[Tensor]] = []

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        self.seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in group["params"]])


def signal(products: Tensor) -> tuple[float, float]:
    """The share above and its jackknife error, from the inner products [n, n] of the gradients."""

    def share(some: Tensor) -> Tensor:
        n, squares = len(some), some.diagonal().sum()
        return (some.sum() - squares) / (n - 1) / squares

    count = len(products)
    without = torch.stack([share(products[keep][:, keep]) for keep in ~torch.eye(count, dtype=torch.bool)])
    return float(share(products)), float(((count - 1) * (without - without.mean()).square().mean()).sqrt())


def main(run: str, changes: tuple[str, ...] = (), batches: int = 40, json: Path | None = None) -> None:
    overrides = [f"--{change}" for change in changes]
    loop = parse(run, [*overrides, "--max_grad_norm", "null"]).build()
    (role,) = loop.running
    policy = loop.trained()[role]
    recorder = loop.running[role] = Recorder(policy.trainable_parameters().values())
    for step in range(batches):
        loop.step(loop.prompts.draw(step, loop.prompts_per_step), Progress(step, batches))

    products: dict[str, Tensor] = {}
    everything = torch.zeros(batches, batches, dtype=torch.float64)
    for number, name in enumerate(policy.trainable_parameters()):
        rows = torch.stack([gradients[number].flatten().double() for gradients in recorder.seen])
        kind = re.sub(r"\d+", "*", name)
        products[kind] = products.get(kind, 0) + rows @ rows.T
        everything += rows @ rows.T
    table = {}
    for kind, inner in {"all": everything, **products}.items():
        norm = float(inner.diagonal().mean() / everything.diagonal().mean())
        if norm > 0:
            share, error = signal(inner)
            table[kind] = {"share of the squared norm": norm, "signal": share, "error": error}
    print(f"{'signal':>8}{'+-':>8}{'norm^2':>8}  layer ({batches} steps)")
    for kind, row in sorted(table.items(), key=lambda item: (item[0] != "all", -item[1]["signal"])):
        print(f"{row['signal']:>8.4f}{row['error']:>8.4f}{row['share of the squared norm']:>8.1%}  {kind}")
    write(json, {"run": run, "overrides": overrides, "batches": batches, "layers": table})
