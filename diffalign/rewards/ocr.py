"""Reward for text in the image, read by optical character recognition."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import ConfigError, Prompt, Reward
from diffalign.core.words import allowed_word

from .pixels import check_batch, eight_bit
from .reading import RapidReader, Reader, TesseractReader

_QUOTED = re.compile('"([^"]+)"|“([^“”]+)”|„([^„“”]+)[“”]|«([^«»]+)»|「([^「」]+)」')


@attrs.define(eq=False)
class OCR(Reward):
    """Similarity of the wanted text and the text in the image, by optical character recognition.

    With t the wanted text, r all text that is read, and d the edit distance. Spaces are left out, and case is ignored by default.

        edit      1 - d(t, r) / max(|t|, |r|)          further text lowers the reward
        partial   1 - min_s d(t, s) / |t|              s is any part of r, so further text costs nothing
        exact     1 if t = r, else 0

    The wanted text is `prompt.metadata[key]`, or else the text in double quotes in the prompt (of several quotes all, in order). Single
    quotes do not count. Scale: 0 to 1. Licence: Apache-2.0 (RapidOCR and its models, Tesseract).

    Args:
        match: "edit", "partial" or "exact"
        engine: "rapidocr" (extra `ocr`; its wheel contains the models) or "tesseract" (the program)
        key: key of the metadata
        ignore_case: whether "Open" equals "OPEN"
        reader: reader that replaces the engine

    Raises:
        ImportError: the engine is not installed.
        ConfigError: (in a call or in `require`) a prompt has no wanted text.

    Reference: edit distance as in Liu et al., Flow-GRPO, arXiv:2505.05470.
    """

    match: Literal["edit", "partial", "exact"] = attrs.field(default="edit", validator=allowed_word)
    engine: Literal["rapidocr", "tesseract"] = attrs.field(default="rapidocr", validator=allowed_word)
    key: str = "text"
    ignore_case: bool = True
    reader: Reader | None = None
    _reader: Reader = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._reader = self.reader or {"rapidocr": RapidReader, "tesseract": TesseractReader}[self.engine]()

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without a wanted text, before anything is drawn.

        Raises:
            ConfigError: a prompt has no wanted text; the message names the first such prompt.
        """
        for prompt in prompts:
            self._wanted(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("OCR", images, prompts)
        wanted = [self._wanted(prompt) for prompt in prompts]
        pixels = eight_bit("OCR", images, prompts).permute(0, 2, 3, 1).cpu().numpy()
        read = [self._plain(self._reader.read(picture)) for picture in pixels]
        return torch.tensor([MATCHES[self.match](*pair) for pair in zip(wanted, read, strict=True)], device=images.device)

    def _wanted(self, prompt: Prompt) -> str:
        text = wanted_text(prompt, self.key)
        plain = self._plain(text)
        if not plain:
            raise ConfigError(
                f"OCR needs the text that an image should show: prompt {str(prompt)!r} has no metadata {self.key!r} and nothing in "
                f'double quotes. Write {{"prompt": ..., "{self.key}": ...}} in the prompt file, or quote the text.'
            )
        return plain

    def _plain(self, text: str) -> str:
        text = "".join(text.split())
        return text.casefold() if self.ignore_case else text


def wanted_text(prompt: str, key: str = "text") -> str:
    """Text that an image should show: from the prompt's metadata if that is not empty, else the quoted text; "" if there is neither.

    Raises:
        ConfigError: the metadata is not text.
    """
    metadata: Mapping[str, object] = getattr(prompt, "metadata", {})
    text = metadata.get(key, "")
    if not isinstance(text, str):
        raise ConfigError(f"metadata {key!r} of prompt {str(prompt)!r} must be text; got {text!r}")
    if text.strip():  # an empty cell of a table says nothing
        return text
    return " ".join(next(filter(None, groups)).strip() for groups in _QUOTED.findall(prompt))


def edit_distance(wanted: str, read: str, anywhere: bool = False) -> int:
    """Least number of insertions, deletions and replacements that turn `wanted` into `read`; with `anywhere`, into any part of `read`.

    Reference: Levenshtein; Sellers for `anywhere`.
    """
    row = [0] * (len(read) + 1) if anywhere else list(range(len(read) + 1))
    for i, letter in enumerate(wanted, 1):
        previous, row = row, [i]
        for j, other in enumerate(read, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (letter != other)))
    return min(row) if anywhere else row[-1]


def _edit(wanted: str, read: str) -> float:
    return 1 - edit_distance(wanted, read) / max(len(wanted), len(read))


def _partial(wanted: str, read: str) -> float:
    return 1 - edit_distance(wanted, read, anywhere=True) / len(wanted)


def _exact(wanted: str, read: str) -> float:
    return float(wanted == read)


MATCHES: Mapping[str, Callable[[str, str], float]] = {"edit": _edit, "partial": _partial, "exact": _exact}
