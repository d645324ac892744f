"""Lock on a run folder: one run trains in it at a time, and any number of readers look on."""

import errno
import os
import socket
import sys
from pathlib import Path
from types import TracebackType

import attrs

from ..core import ConfigError, Devices, SingleProcess, agree
from ..core.unessential import say_once, unessential
from .snapshot import name_complete

if sys.platform != "win32":
    import fcntl

LOCK = "train.lock"
"""Name of the locked file in a run folder. It names the process that trains, and is removed at its end."""

_HELD: dict[Path, int] = {}
"""Folders that this process trains in -> descriptor of the locked file."""


@attrs.define(eq=False)
class FolderLock:
    """Holds the lock of a run folder until the `with` block ends. The system frees it when the process ends in any other way.

    So a file that a kill leaves behind locks nothing. Of several processes of a run only the first one locks. Where a file system has no
    locks, a line says so and the run goes on.

    Args:
        folder: folder of the run
        devices: processes of the run
    """

    folder: Path
    devices: Devices = attrs.field(factory=SingleProcess)
    _taken: Path | None = attrs.field(default=None, init=False)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        descriptor = None if self._taken is None else _HELD.pop(self._taken, None)  # a forked child holds nothing
        if descriptor is None or self._taken is None:
            return
        with unessential(f"{self._taken / LOCK} cannot be removed"):  # it locks nothing any more
            if _is_at(self._taken / LOCK, descriptor):
                (self._taken / LOCK).unlink()
        os.close(descriptor)
        self._taken = None

    def take(self, create: bool = True) -> None:
        """Take the lock, unless it is held already. Every process of the run must call this.

        Complete checkpoints that a crash left without their name get it: nobody else may rename them.

        Args:
            create: make a folder that is not there; otherwise such a folder is not locked

        Raises:
            ConfigError: another run trains in the folder, or the file cannot be written. All processes raise.
        """
        failed: ConfigError | None = None
        if self.devices.rank == 0 and self._taken is None and (create or self.folder.is_dir()):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                place = self.folder.resolve()
                _HELD[place] = _locked(place / LOCK, self.folder)
                self._taken = place
                name_complete(self.folder)
            except ConfigError as error:
                failed = error
            except OSError as error:
                failed = ConfigError(f"folder {self.folder} must be writable; {error}. Give another folder, or free disk space.")
        agree(self.devices, failed)


def is_held_elsewhere(folder: Path) -> bool:
    """True if another process trains in a folder."""
    if folder.resolve() in _HELD:
        return False
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        _flock(descriptor, shared=True)
    except BlockingIOError:
        return True
    except OSError as error:
        _say_unlocked(folder, error)
    finally:
        os.close(descriptor)
    return False


def _locked(file: Path, folder: Path) -> int:
    """Open and lock a file, and write into it which process has it; returns the descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ConfigError(
                f"folder {folder} must have one run at a time; {owner} trains in it now. Wait for its end, stop it, or give another folder."
            ) from None
        except OSError as error:
            _say_unlocked(folder, error)
        if _is_at(file, descriptor):  # else the run that has just ended has removed it
            break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _flock(descriptor: int, shared: bool = False) -> None:
    """Lock an open file, without waiting.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: there are no locks here.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "Windows has none of this kind")
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _is_at(file: Path, descriptor: int) -> bool:
    """True if a path still leads to an open file."""
    return file.exists() and os.path.samestat(file.stat(), os.fstat(descriptor))


def _say_unlocked(folder: Path, error: OSError) -> None:
    say_once(f"{folder} is in a place without locks ({error.strerror}): see to it that only one run trains in it at a time")


def _forget() -> None:
    """Let go in a forked child, which would keep the lock after a kill of the process that trains."""
    for descriptor in _HELD.values():
        os.close(descriptor)
    _HELD.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)
