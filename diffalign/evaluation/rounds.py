"""Finished rounds of an evaluation on disk, so that an interrupted evaluation continues where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from safetensors.torch import load_file, save_file
from torch import Tensor


@attrs.frozen
class Rounds:
    """Storage of rounds: one file for each round, in a folder for exactly one set of weights and settings.

    Args:
        folder: holds one folder for each identity
        identity: digest of the checkpoint's manifest and the configuration, which identifies weights and rewards
    """

    folder: Path
    identity: str
    _asked: set[Path] = attrs.field(factory=set, init=False, eq=False, repr=False)

    def under(self, settings: Mapping[str, Any]) -> "Rounds":
        """Rounds of one evaluation. The folder's name depends on the identity and on every setting."""
        text = json.dumps([self.identity, settings], sort_keys=True, default=str)
        found = Rounds(self.folder / hashlib.sha256(text.encode()).hexdigest()[:16], self.identity)
        self._asked.add(found.folder)
        return found

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Load the tensors that were saved under a name; None if there are none."""
        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.exists() else None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors under a name, completely or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{name}.tmp"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        temporary.replace(self.folder / f"{name}.safetensors")

    def clear(self) -> None:
        """Remove the rounds of the evaluations that were asked for here, once their result is written. Those of others stay."""
        for folder in self._asked:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another evaluation was interrupted, or is under way
            self.folder.rmdir()
