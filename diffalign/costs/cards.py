"""Data sheets of accelerators: speed, bandwidth and memory by their makers."""

import re
from collections.abc import Mapping

import attrs
import torch

_TERA = 1e12
_HALF = (torch.bfloat16, torch.float16)
_NO_OTHER_CARD = frozenset({"NVIDIA", "GeForce", "RTX", "SXM4", "SXM5", "PCIE", "PCIe", "80GB", "HBM3", "HBM3e"})
"""Words of torch's names that say maker, series, slot and memory of a card in the table. Any other ("Laptop", "Ti", "MIG", "64GB") makes it
another card, or a part of one, whose speed is not there."""


@attrs.frozen
class Card:
    """An accelerator.

    Args:
        name: name in the table, such as "h100"
        half: operations per second of dense matrix products in bfloat16 and float16 that accumulate in float32, without sparsity
        single: operations per second of matrix products in float32, without TF32
        bandwidth: bytes per second of its memory
        memory: memory in GiB; None if it is not known
        calls_itself: words of torch's name of the card that tell it from the others
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float | None = None
    calls_itself: tuple[str, ...] = ()

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second of matrix products in a type. Types other than bfloat16 and float16 count as float32."""
        return self.half if dtype in _HALF else self.single


def _card(name: str, half: float, single: float, bandwidth: float, memory: float, *words: str) -> Card:
    return Card(name, half * _TERA, single * _TERA, bandwidth * _TERA, memory, words)


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (  # TFLOP/s in bfloat16 and in float32, TB/s, GiB; more words first, because the first that fits is taken
        _card("h100-pcie", 756.0, 51.2, 2.0, 80, "H100", "PCIe"),
        _card("h100-nvl", 835.5, 60.0, 3.9, 94, "H100", "NVL"),
        _card("h100", 989.4, 66.9, 3.35, 80, "H100"),
        _card("h200", 989.4, 66.9, 4.8, 141, "H200"),
        _card("a100-40gb", 311.9, 19.5, 1.555, 40, "A100", "40GB"),
        _card("a100", 311.9, 19.5, 2.039, 80, "A100"),
        _card("l40s", 362.0, 91.6, 0.864, 48, "L40S"),
        _card("4090", 165.2, 82.6, 1.008, 24, "4090"),
        _card("3090", 71.2, 35.6, 0.936, 24, "3090"),
    )
}


def card(name: str) -> Card:
    """Find a card in the table by its name.

    Raises:
        ValueError: the table has no such card.
    """
    found = CARDS.get(name.lower())
    if found is None:
        raise ValueError(f"device must be one of {', '.join(CARDS)}; got {name!r}. Give --teraflops and --bandwidth of another card.")
    return found


def asked(name: str | None, teraflops: float | None = None, bandwidth: float | None = None) -> Card | None:
    """Find the card for which a bound is asked: by its name, or by its speed and bandwidth. None if neither is complete.

    Args:
        name: name in the table; None for a card that is given by its numbers
        teraflops: TFLOP/s of matrix products in half precision, in place of the table's. The speed in float32 is scaled in proportion;
            without a name it is the same
        bandwidth: TB/s of its memory, in place of the table's

    Raises:
        ValueError: the table lacks the name, or a bandwidth is given without a speed.
    """
    if name is None and bandwidth is not None and teraflops is None:
        raise ValueError("--bandwidth goes with --teraflops, or with --device NAME, whose speed is known")
    if name is None and (teraflops is None or bandwidth is None):
        return None
    base = Card("this device", _TERA, _TERA, _TERA) if name is None else card(name)
    if teraflops is not None:
        base = attrs.evolve(base, half=teraflops * _TERA, single=teraflops * _TERA * base.single / base.half)
    return base if bandwidth is None else attrs.evolve(base, bandwidth=bandwidth * _TERA)


def recognised(name: str) -> Card | None:
    """Find the card that torch calls by a name, such as "NVIDIA H100 80GB HBM3".

    None if the table lacks it. A part of a card (MIG) and cards with other words in their names (Laptop, Ti) are not in it.
    """
    words = set(re.split(r"[\s-]+", name.strip()))
    named = (known for known in CARDS.values() if known.calls_itself and words.issuperset(known.calls_itself))
    return next((known for known in named if words <= _NO_OTHER_CARD.union(known.calls_itself)), None)
