"""Texts that are longer than any encoder of a policy reads: encoders cut them off, and the command line hides what diffusers says of it."""

from collections.abc import Sequence

from diffalign.core import Prompt
from diffalign.core.unessential import say_once

from .diffusers import Family

_SHOWN = 60
"""Characters of a text in the message."""


def unread(family: Family, text: str) -> int:
    """Count the tokens at the end of a text that no encoder of the family reads; 0 if one reads it whole.

    Tokens of a chat template around the text are not counted, so a text that ends just before the limit may lose some all the same.
    """
    from transformers import PreTrainedTokenizerBase

    beyond = []
    for name, part in family.pipeline.components.items():
        if name.startswith("tokenizer") and isinstance(part, PreTrainedTokenizerBase):
            clip = type(part).__name__.startswith("CLIPTokenizer")  # one class in newer transformers, two in older ones
            limit = part.model_max_length if clip else family.max_sequence_length
            beyond.append(len(part(text, truncation=False, verbose=False).input_ids) - limit)
    return max(0, min(beyond, default=0))


def tell_unread(family: Family, prompts: Sequence[Prompt]) -> None:
    """Say once which prompts are cut off: a reward reads them whole, and the policy draws only their beginning."""
    cut = [text for text in dict.fromkeys(map(str, prompts)) if unread(family, text)]
    if cut:
        first = cut[0] if len(cut[0]) <= _SHOWN else f"{cut[0][:_SHOWN]}..."
        say_once(
            f"{len(cut)} of {len(prompts)} prompts are longer than the policy reads; the end of each has no influence on its pictures. "
            f"First: {first!r}, of which {unread(family, cut[0])} tokens are not read. Shorten them, or raise max_sequence_length (now "
            f"{family.max_sequence_length}) where the family has it."
        )
