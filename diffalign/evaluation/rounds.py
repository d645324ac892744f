"""The finished rounds of an evaluation on disk, so that one that was interrupted goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from safetensors.torch import load_file, save_file
from torch import Tensor


@attrs.frozen
class Rounds:
    """One file for each round, in a folder that belongs to exactly one set of weights and settings.

    Args:
        folder: holds one folder for each identity
        identity: of the weights and the rewards: a digest of the checkpoint's manifest and the configuration
    """

    folder: Path
    identity: str

    def under(self, settings: Mapping[str, Any]) -> "Rounds":
        """Those of one evaluation; the folder's name depends on the identity and on every setting."""
        text = json.dumps([self.identity, settings], sort_keys=True, default=str)
        return Rounds(self.folder / hashlib.sha256(text.encode()).hexdigest()[:16], self.identity)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under a name; None if nothing was."""
        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.exists() else None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Appears complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{name}.tmp"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        temporary.replace(self.folder / f"{name}.safetensors")

    def clear(self) -> None:
        """Remove the folder, once the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
