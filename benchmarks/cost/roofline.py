"""Least time of a rollout, an update and a step of every model family on a card, counted on torch's meta device. Nothing is run.

Each operator of a network call takes at least max(operations / peak, bytes / bandwidth); the sum over a call is the bound "operator by
operator", which no run in torch's eager mode beats. "Fused" is the bound if all that is no matrix product and no attention were done by a
neighbour: what a compiler may come to. Base in bfloat16. Three ways of computing adapters (LoRA):
  none       no adapters, as a reference computes
  bfloat16   masters in float32, products in bfloat16: what diffalign does
  float32    products in float32, as peft does where factors are in float32
A step is one prompt's: a tree of 27 leaves (3 x 3 x 3) whose three branchings lie a quarter of the rollout apart, then an update of its 13
branching nodes in pieces of --rows rows. Starting operators is not in it: a call of SD3.5-M starts 2,700.
With --measured, bounds and expected times stand beside what was once measured on one H100 (`cost families`). The constants of the expected
times (`diffalign.costs.expected`) were fitted to these rows; "left out" is what constants fitted without a row expect of it.

Args:
    device: name of the card
    teraflops: peak of products in bfloat16, instead of the maker's number
    bandwidth: memory bandwidth in TB/s, instead of the maker's number
    models: models that are counted; none counts all
    adapters: ways of computing adapters
    call: rows of the forward pass
    rows: rows a piece of the update
    measured: also compare with what was measured
    json: also write the table here
"""

from pathlib import Path
from typing import Literal

import attrs
import torch

from benchmarks.record import write
from benchmarks.subjects.published_shapes import MODELS, Published
from diffalign.costs.cards import CARDS, Card, asked
from diffalign.costs.expected import COMPILED, EAGER
from diffalign.costs.operators import CAST, ELEMENTWISE, PRODUCT, Call
from diffalign.costs.roofline import Work, bounds, pieces
from diffalign.costs.rows import Counted
from diffalign.policies.lora import ADAPTER

ADAPTERS = ("none", "bfloat16", "float32")
MEASURED = (  # model, adapters, rows, with backward or not, ms (one H100 80 GB, torch 2.11), ms expected if the fit leaves the row out
    ("SD3.5-M 512", "float32", 27, False, 325.0, 301.0),
    ("SD3.5-M 512", "float32", 9, False, 117.0, 108.5),
    ("SD3.5-M 512", "float32", 1, False, 54.0, 53.3),
    ("SD3.5-M 512", "bfloat16", 27, False, 278.0, 253.2),
    ("SD3.5-M 512", "none", 27, False, 255.0, 243.0),
    ("SD3.5-M 512", "float32", 2, True, 137.0, 119.9),
    ("SD3.5-M 512", "float32", 6, True, 187.0, 195.3),
    ("SD3.5-M 512", "bfloat16", 6, True, 159.0, 170.8),
    ("FLUX.1-dev 512", "float32", 9, False, 712.0, 865.9),
    ("FLUX.1-dev 512", "none", 9, False, 487.0, 597.8),
    ("FLUX.1-dev 512", "float32", 1, False, 100.0, 115.7),
)


LATER = (
    ("SD3.5-M 512", EAGER, 1, False, 58.6),
    ("SD3.5-M 512", EAGER, 3, False, 59.5),
    ("SD3.5-M 512", EAGER, 9, False, 100.4),
    ("SD3.5-M 512", EAGER, 27, False, 278.7),
    ("SD3.5-M 512", EAGER, 108, False, 1086.0),
    ("SD3.5-M 512", EAGER, 6, True, 191.5),
    ("SD3.5-M 512", EAGER, 13, True, 350.1),
    ("SD3.5-M 512", COMPILED, 3, False, 32.0),
    ("SD3.5-M 512", COMPILED, 9, False, 61.0),
    ("SD3.5-M 512", COMPILED, 27, False, 174.8),
    ("SD3.5-M 512", COMPILED, 108, False, 669.2),
    ("SD3.5-M 512", COMPILED, 13, True, 229.5),
    ("FLUX.1-dev 512", EAGER, 1, False, 145.7),
    ("FLUX.1-dev 512", EAGER, 9, False, 545.3),
    ("FLUX.1-dev 512", EAGER, 27, False, 1596.8),
    ("FLUX.1-dev 512", EAGER, 2, True, 406.1),
    ("FLUX.1-dev 512", EAGER, 6, True, 835.5),
)
"""Model, what it reaches, rows, backward too, milliseconds: adapters with products in bfloat16, measured after the constants were fitted
(another H100 of the same kind: `cost calls`, benchmarks/results/calls_h100.json; 13 rows compiled: `cost families`, families_h100.json).
`COMPILED` was set by two of them."""


def counted(model: Published, adapters: str) -> Counted:
    policy = model.policy(torch.bfloat16, lora=adapters != "none")
    if adapters == "float32":
        for module in policy.network.modules():
            if hasattr(module, "lora_variant"):
                module.lora_variant.pop(ADAPTER, None)
                module.cast_input_dtype_enabled = True
    return Counted.of(policy, model.condition(torch.bfloat16))


def work(model: str, policy: Counted, rows: int) -> Work:
    steps = MODELS[model].shape.steps
    at = [steps * place // 4 for place in (1, 2, 3)]
    widths = [3 ** sum(step > split for split in at) for step in range(steps)]
    trained = sum(parameter.numel() for parameter in policy.policy.trainable_parameters().values())
    update = pieces(13, rows)
    return Work(tuple(widths), update, update, trained)


def gigabytes(call: Call) -> str:
    parts = (call.of(kind).moved / 1e9 for kind in (PRODUCT, CAST, ELEMENTWISE))
    return " ".join(f"{part:7.1f}" for part in parts)


def line(name: str, adapters: str, policy: Counted, card: Card, call_rows: int, rows: int) -> tuple[str, dict[str, float]]:
    call = policy(call_rows).forward
    peak = card.peak(torch.bfloat16)
    apart, fused = (call.seconds(card, fused=way) for way in (False, True))
    row: dict[str, float] = {
        "teraflop_a_row": policy(1).forward.useful / 1e12,
        "forward_ms": 1e3 * apart,
        "forward_share": call.useful / apart / peak,
        "expected_ms": 1e3 * EAGER.call(call, card),
        "fused_ms": 1e3 * fused,
        "fused_share": call.useful / fused / peak,
        "operators": len(call.operators),
        "casts": len(call.of(CAST).operators),
        "float32_products": len(call.of(PRODUCT, torch.float32).operators),
        "gigabytes": call.moved / 1e9,
    }
    said = ""
    if adapters != "none":
        (rollout, update), (least, _) = (bounds(policy, work(name, policy, rows), card, fused=way) for way in (False, True))
        row |= {"rollout_s": rollout.seconds, "update_s": update.seconds, "fused_rollout_s": least.seconds}
        row |= {"rollout_share": rollout.share(peak), "update_share": update.share(peak)}
        said = f" {rollout.seconds:7.2f} {rollout.share(peak):4.0%} {update.seconds:7.2f} {update.share(peak):4.0%}"
    text = (
        f"{name:16s} {adapters:8s} {row['teraflop_a_row']:7.2f} {row['forward_ms']:8.1f} {row['forward_share']:4.0%} "
        f"{row['fused_ms']:8.1f} {row['fused_share']:4.0%} {row['expected_ms']:8.1f} {row['operators']:6d} {row['casts']:5d} "
        f"{row['float32_products']:4d} {gigabytes(call)}{said}"
    )
    return text, row


def compare(models: dict[tuple[str, str], Counted], card: Card) -> None:
    columns = f"{'rows':>4s} {'ms':>6s} {'bound':>7s} {'share':>6s} {'expected':>9s} {'share':>6s} {'left out':>9s}"
    print(f"\n{'measured on one H100':27s} {columns}")
    for name, adapters, rows, backward, measured, without in MEASURED:
        if (name, adapters) not in models:
            continue
        found = models[name, adapters](rows)
        calls = (found.forward, found.backward) if backward else (found.forward,)
        bound = 1e3 * sum(call.seconds(card) for call in calls)
        expected = 1e3 * sum(EAGER.call(call, card) for call in calls)
        what = f"{name} {adapters}{' +backward' if backward else ''}"
        shares = [f"{number / measured:.0%}" for number in (bound, expected, without)]
        print(f"{what:27s} {rows:4d} {measured:6.0f} {bound:7.1f} {shares[0]:>6s} {expected:9.1f} {shares[1]:>6s} {shares[2]:>9s}")
    print("\nmeasured after the fit")
    for name, reached, rows, backward, measured in LATER:
        if (name, "bfloat16") not in models:
            continue
        found = models[name, "bfloat16"](rows)
        expected = 1e3 * sum(reached.call(call, card) for call in ((found.forward, found.backward) if backward else (found.forward,)))
        what = f"{name}{', compiled' if reached is COMPILED else ''}{' +backward' if backward else ''}"
        print(f"{what:37s} {rows:4d} {measured:6.0f} {expected:9.1f} {expected / measured:6.0%}")


def main(
    device: Literal[*CARDS] = "h100",
    teraflops: float | None = None,
    bandwidth: float | None = None,
    models: tuple[Literal[*MODELS], ...] = (),
    adapters: tuple[Literal[*ADAPTERS], ...] = ADAPTERS,
    call: int = 9,
    rows: int = 2,
    measured: bool = False,
    json: Path | None = None,
) -> None:
    card = asked(device, teraflops, bandwidth)
    print(f"{card.name}: {card.half / 1e12:.4g} TFLOP/s in bfloat16, {card.single / 1e12:.4g} in float32, {card.bandwidth / 1e12:.3g} TB/s")
    print(
        f"forward of {call} rows: TFLOP a row; ms and share of the peak, operator by operator, then fused; ms expected in eager mode "
        "(fitted on an H100);\noperators, casts, products in float32; GB of products, casts, others. Step of one prompt: rollout s and "
        "share, update s and share."
    )
    found, table = {}, {}
    for name in models or MODELS:
        for way in adapters:
            found[name, way] = counted(MODELS[name], way)
            text, table[f"{name}, {way}"] = line(name, way, found[name, way], card, call, rows)
            print(text, flush=True)
    if measured:
        compare(found, card)
    if json:
        about = {"card": attrs.asdict(card), "torch": torch.__version__, "call": call, "rows": rows}
        write(json, {**about, "models": table})
