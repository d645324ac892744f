"""Storage of a batch in which a number was not finite."""

import json
from pathlib import Path

from safetensors.torch import save_file

from ..core import NonFiniteError

OFFENDING = "offending"
"""Name of the folder inside the run folder."""


def keep_offending_batch(error: Exception, folder: Path, rank: int = 0) -> Path | None:
    """Write the evidence of an error: `offending/batch-RANK.safetensors`, and a `.json` with message, roles, prompts and shapes.

    Args:
        error: the error, with or without evidence
        folder: folder of the run
        rank: number of this process, which holds a share of the batch

    Returns:
        The file; None if the error has no evidence.
    """
    evidence = error.evidence if isinstance(error, NonFiniteError) else None
    if evidence is None:
        return None
    file = folder / OFFENDING / f"batch-{rank}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(evidence.tensors), file)
    facts = {
        "error": str(error),
        "step": evidence.step,
        "roles": list(evidence.roles),
        "prompts": list(evidence.prompts),
        "not_finite": [name for name, value in evidence.tensors.items() if not bool(value.isfinite().all())],
        "shapes": {name: list(value.shape) for name, value in evidence.tensors.items()},
    }
    file.with_suffix(".json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return file
