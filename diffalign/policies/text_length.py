"""Texts that are longer than any encoder of a policy reads: encoders cut them off, and the command line hides what diffusers says of it."""

from collections.abc import Sequence

import torch

from diffalign.core.unessential import say_once

from .diffusers import Family

_SHOWN = 60
"""Characters of a text in the message."""

_SPECIAL = 4
"""Tokens that a tokenizer may add to a text; every other token stands for at least a byte of it."""


def unread(family: Family, texts: Sequence[str]) -> list[int]:
    """Count, for each text, the tokens at its end that no encoder of the family reads; 0 if one reads it whole.

    Tokens of a chat template around the text are not counted, so a text that ends just before the limit may lose some all the same.
    """
    from transformers import PreTrainedTokenizerBase

    parts = [part for name, part in family.pipeline.components.items() if name.startswith("tokenizer")]
    known = [part for part in parts if isinstance(part, PreTrainedTokenizerBase)]  # a processor of texts and pictures is none
    most = [len(text.encode(errors="replace")) + _SPECIAL for text in texts]
    least = most if known else [0] * len(texts)
    for part in known:
        clip = type(part).__name__.startswith("CLIPTokenizer")  # one class in newer transformers, two in older ones
        limit = part.model_max_length if clip else family.max_sequence_length
        open_still = [place for place, size in enumerate(most) if least[place] > 0 and size > limit]
        counts = part([texts[place] for place in open_still], truncation=False, verbose=False).input_ids if open_still else []
        beyond = {place: max(0, len(tokens) - limit) for place, tokens in zip(open_still, counts, strict=True)}
        least = [min(before, beyond.get(place, 0)) for place, before in enumerate(least)]
    return least


def tell_unread(family: Family, prompts: Sequence[str], called: str = "prompts") -> None:
    """Say once, in the first process, which prompts are cut off: a reward reads them whole, and the policy draws only their beginning.

    Args:
        family: conventions of the model family
        prompts: the texts
        called: name for them in the message
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    texts = [*dict.fromkeys(map(str, prompts))]
    cut = [(text, tokens) for text, tokens in zip(texts, unread(family, texts), strict=True) if tokens]
    if cut:
        text, tokens = cut[0]
        first = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        say_once(
            f"{len(cut)} of {len(prompts)} {called} are longer than the policy reads; the end of each has no influence on its pictures. "
            f"First: {first!r}, of which {tokens} tokens are not read. Shorten them, or raise max_sequence_length (now "
            f"{family.max_sequence_length}) where the family has it."
        )
