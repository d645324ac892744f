"""What accelerators can do, as their makers give it."""

from collections.abc import Mapping

import attrs
import torch

_TERA = 1e12
_HALF = (torch.bfloat16, torch.float16)


@attrs.frozen
class Card:
    """An accelerator.

    Args:
        name: as it is asked for, "h100"
        half: operations per second of dense matrix products in bfloat16 and float16 that add up in float32, without sparsity
        single: of those in float32, without TF32
        bandwidth: bytes per second of its memory
        memory: GiB; None where it is not known
        calls_itself: words of the name by which torch knows it, all of which must be there
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float | None = None
    calls_itself: tuple[str, ...] = ()

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second of matrix products in a type; other types than the two halves go at float32's speed."""
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
    """The card of a name of the table.

    Raises:
        ValueError: there is none.
    """
    found = CARDS.get(name.lower())
    if found is None:
        raise ValueError(f"device must be one of {', '.join(CARDS)}; got {name!r}. Give --teraflops and --bandwidth of another card.")
    return found


def asked(name: str | None, teraflops: float | None = None, bandwidth: float | None = None) -> Card | None:
    """The card that somebody asks for: by its name, or by its speed and bandwidth; None where not both of these are given.

    Args:
        name: of the table
        teraflops: of matrix products in half precision; in place of the table's. float32 follows in proportion, without a name at 1
        bandwidth: TB/s of its memory; in place of the table's

    Raises:
        ValueError: a name that the table lacks, a bandwidth without a speed.
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
    """The card that torch knows by a name ("NVIDIA H100 80GB HBM3"); None where the table lacks it."""
    return next((known for known in CARDS.values() if known.calls_itself and all(word in name for word in known.calls_itself)), None)
