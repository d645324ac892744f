"""Files that are complete or not there, even after a crash, a full disk or a power cut."""

import errno
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from .core.unessential import unessential


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, text: str, private: bool = False) -> None:
    """Replace the content of a file. A reader, or the next start after a crash, sees either the old or the new content.

    Args:
        file: the file
        text: its new content
        private: at no moment can anybody but the owner read it
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        if private:
            temporary.unlink(missing_ok=True)  # of a process that was killed, with any mode
            temporary.touch(mode=0o600, exist_ok=False)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


def append_line(file: Path, line: str) -> None:
    """Add a line in one write. If the disk is full, the part that was written is removed again.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    content = f"{line}\n".encode()
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        written = os.write(descriptor, content)
        if written < len(content):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    finally:
        os.close(descriptor)


def publish(temporary: Path, folder: Path) -> None:
    """Rename a folder, once its files are written, and replace an old folder of that name.

    After a crash there is the old folder, or the new one under its old or its new name.
    """
    give_usual_mode(temporary)
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    sync(folder.parent)


def weights(folder: Path) -> dict[Path, int]:
    """Files of weights in a folder, each with the time of its last change."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


def give_usual_mode(folder: Path, before: Mapping[Path, int] | None = None) -> None:
    """Give new weights in a folder the mode of any other new file. safetensors lets nobody but their owner read them.

    Args:
        folder: folder of the weights
        before: `weights` of the folder before they were written; those files keep their mode
    """
    probe = folder / "mode.tmp"
    with unessential(f"others' right to read the weights in {folder}"):  # some file systems know no modes
        probe.touch()
        usual = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for file, changed in weights(folder).items():
            if (before or {}).get(file) != changed and stat.S_IMODE(file.stat().st_mode) != usual:
                file.chmod(usual)


def discard(folder: Path) -> None:
    """Remove a folder so that even a crash half-way leaves nothing under its name."""
    old = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)
