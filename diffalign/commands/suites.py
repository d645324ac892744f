"""Prompts and rewards that are measured together, as benchmarks and papers do."""

from collections.abc import Mapping
from typing import NamedTuple


class Suite(NamedTuple):
    """Prompts and rewards of a benchmark.

    Args:
        prompts: a path of a prompt source
        rewards: by name, as `--reward` takes them
    """

    prompts: str
    rewards: Mapping[str, str]


SUITES: Mapping[str, Suite] = {
    "geneval": Suite("generated/geneval", {"geneval": "{class_path: GenEval, init_args: {credit: correct}}"}),
    "ocr": Suite("generated/text-held-out", {"ocr": "OCR"}),
    "drawbench-like": Suite(
        "generated/preference-held-out", {"pickscore": "PickScore", "imagereward": "ImageReward", "aesthetic": "Aesthetic"}
    ),
}
