"""Folder of a run, before anything is written to it."""

import shutil
import tempfile
from pathlib import Path

from ..core import ConfigError
from .snapshot import checkpoints, step_of

_FILES = (
    *("metrics.jsonl", "watch.jsonl", "alarms.json", "evaluation.json", "config.yaml", "environment.json", "report.html", "*.tmp"),
    *("votes.jsonl", "votes.links.json"),
    *("images", "lora", "best", "offending", "trackers", "evaluations", "student", "step-*"),
)
"""Patterns of the files that a run, its hooks and its evaluations write into the folder, without `code/`, from which a run may import."""


def require_writable(folder: Path, option: str = "--folder") -> None:
    """Refuse a folder that cannot be written now, before a model is loaded and work is done.

    Args:
        folder: the folder, which need not be there yet
        option: option by which another one is given, for the message

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ConfigError(f"folder {folder} must be writable; {error}. Give another {option}, or free disk space.") from error


def has_begun(folder: Path) -> bool:
    """True if a run has done a step there: a folder of a run that failed before that is as good as none."""
    metrics = folder / "metrics.jsonl"
    return any(step_of(path) for path in checkpoints(folder)) or (metrics.exists() and metrics.stat().st_size > 0)


def clear(folder: Path) -> None:
    """Remove the files that a run writes, and no others."""
    for path in [found for pattern in _FILES for found in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
