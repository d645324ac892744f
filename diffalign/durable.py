"""Files that are whole or not there: what a crash, a full disk or a power cut cannot tear."""

import errno
import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, text: str) -> None:
    """Replace the content of a file: a reader, or the next start after a crash, sees the old or the new one."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


def append_line(file: Path, line: str) -> None:
    """Add a line in one write; where the disk is full, the part of it that fitted is taken back.

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
    """Give a folder whose files are written its name, in place of what may have it.

    A crash leaves the old folder, or the new one under one of its two names.
    """
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


def discard(folder: Path) -> None:
    """Remove a folder so that a crash half-way leaves nothing under its name."""
    old = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)
