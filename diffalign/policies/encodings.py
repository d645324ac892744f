"""Cache of encoded texts: as many as memory is given for are encoded once; with a folder, all of them, once for all runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .diffusers import Family

Row = Mapping[str, Tensor]
AT_ONCE = 16
"""Number of texts that are encoded together."""
ENCODERS = ("text_encoder", "tokenizer")
"""Beginnings of the names of the parts that encode texts."""


def encoder_revision(folder: Path, file: Path | None = None, variant: str | None = None) -> str:
    """Digest of the contents of all files of text encoders and tokenizers, and of what is loaded of them: what a text is encoded by.

    Args:
        folder: folder of the pipeline
        file: file that the encoders' weights were taken from, if not the folder's
        variant: variant of the weights' files that are loaded; a folder may have several
    """
    digest = hashlib.sha256(f"{variant} {'' if file is None else _digest(file)}\n".encode())
    index = folder / "model_index.json"
    if index.exists():  # a pipeline may go without an encoder whose files are there, and has settings of its own (of empty texts)
        entries = json.loads(index.read_text(encoding="utf-8")).items()
        said = {name: entry for name, entry in entries if name.startswith(ENCODERS) or not (name[0] == "_" or isinstance(entry, list))}
        digest.update(json.dumps(said, sort_keys=True).encode())
    for each in sorted(path for part in folder.iterdir() if part.name.startswith(ENCODERS) for path in part.rglob("*")):
        if each.is_file():
            real = each.resolve()
            content = real.name if real.parent.name == "blobs" else _digest(real)  # the hub's cache names a file by its digest
            digest.update(f"{each.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _stacked(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)


def _size(row: Row) -> int:
    """Bytes of an encoded text."""
    return sum(tensor.nbytes for tensor in row.values())


class Texts(Protocol):
    """Source of encoded texts."""

    def of(self, texts: Sequence[str], device: torch.device, negative: bool = False) -> dict[str, Tensor]:
        """Tensors [P, ...] of P texts, on a device."""


class Encodings:
    """Encoded texts of a run, kept on the CPU.

    In memory are the texts that were asked for last, up to `limit` bytes. Another text is encoded anew when it is asked for, beside other
    texts than before perhaps, so that its last digits may differ. A folder keeps all texts, and gives them back to the bit.

    Args:
        family: encodes texts that are not there
        folder: folder with one file per text, named by a digest of encoder revision, family, number of tokens and text; None keeps the
            texts in memory
        revision: revision of the encoders; needed with a folder
        limit: most bytes of texts in memory, without a folder

    Raises:
        ValueError: a folder without revision, or a limit below 0.
    """

    def __init__(self, family: Family, folder: Path | None = None, revision: str = "", limit: int = 2 * 2**30) -> None:
        if folder is not None and not revision:
            raise ValueError("Encodings with a folder needs the encoders' revision: encoder_revision(folder of the pipeline)")
        if limit < 0:
            raise ValueError(f"Encodings.limit must be a number of bytes, 0 or more; got {limit}")
        self.family, self.folder, self.revision, self.limit = family, folder, revision, limit
        self._rows: dict[tuple[bool, str], Row] = {}  # what was not asked for longest is first
        self._bytes = 0

    def of(self, texts: Sequence[str], device: torch.device, negative: bool = False) -> dict[str, Tensor]:
        """Tensors [P, ...] of P texts. Rows of different length are padded with zeros.

        Args:
            texts: P texts
            device: device of the result
            negative: encode them as texts that guidance leads away from
        """
        known = {text: self._known(text, negative) for text in dict.fromkeys(texts)}
        missing = [text for text, row in known.items() if row is None]
        fresh = dict(zip(missing, self._encoded(missing, negative), strict=True)) if missing else {}
        for text, row in fresh.items():
            self._keep(text, negative, row)
        found = {**{text: row for text, row in known.items() if row is not None}, **fresh}
        rows = [found[text] for text in texts]
        return {name: _stacked([row[name] for row in rows]).to(device) for name in rows[0]}

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str], negative: bool) -> list[Row]:
        with self.family.resident("text_encoder"):
            if negative:
                return [row for text in texts for row in self._split(self.family.encode_negative(text))]
            pieces = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
            return [row for piece in pieces for row in self._split(self.family.encode(piece))]

    def _split(self, tensors: Mapping[str, Tensor]) -> list[Row]:
        rows: list[Row] = []
        for index in range(len(next(iter(tensors.values())))):
            row = {name: tensor[index].cpu() for name, tensor in tensors.items()}
            for name in self.family.ragged:  # padding depends on the other texts of the batch, so it is removed
                row[name] = row[name][: int(row["lengths"])]
            rows.append({name: tensor.clone() for name, tensor in row.items()})
        return rows

    def _known(self, text: str, negative: bool) -> Row | None:
        if self.folder is None:
            row = self._rows.pop((negative, text), None)
            if row is not None:
                self._rows[negative, text] = row
            return row
        file = self._file(self.folder, text, negative)
        return load_file(file) if file.exists() else None

    def _keep(self, text: str, negative: bool, row: Row) -> None:
        if self.folder is None:
            self._rows[negative, text] = row
            self._bytes += _size(row)
            while self._bytes > self.limit:
                self._bytes -= _size(self._rows.pop(next(iter(self._rows))))
            return
        file = self._file(self.folder, text, negative)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{uuid4().hex}")  # several processes, also of several machines, may encode the same text
        save_file(dict(row), temporary, metadata={"text": text})
        temporary.replace(file)

    def _file(self, folder: Path, text: str, negative: bool) -> Path:
        key = [self.revision, type(self.family).__name__, str(self.family.dtype), self.family.max_sequence_length, negative, text]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return folder / name[:2] / f"{name}.safetensors"
