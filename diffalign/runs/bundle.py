"""Bundle of a run folder without weights and images: one zip file that can be attached to a bug report."""

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..core import ConfigError
from .recording import environment

TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".log", ".csv", ".md")
"""Suffixes of the files that are packed: texts that a run writes. Weights, latents and images have others."""

LINKS = ".links.json"
"""Last part of the names of files that hold the secret links of voters. They are not packed."""

_TOKEN = re.compile(rb"(\btoken=)[\w%.~-]+")
"""Secret of such a link, as a run prints it."""

LARGEST = 8 * 2**20
"""Largest number of bytes that are packed of a file; of a longer file the end is taken."""


def bundle(folder: Path, file: Path, logs: Sequence[Path] = ()) -> Mapping[str, int]:
    """Write the zip.

    It holds the texts of the run folder under their own paths, `environment-now.json` (the machine on which the bundle is made, perhaps
    not that of the run), `files.txt` (all files of the folder with their sizes) and the logs under `logs/`. It does not hold the links by
    which people vote: `*.links.json` is left out, and `token=...` is masked in every text.

    Args:
        folder: folder of the run
        file: path of the zip; an old file is replaced once the new one is complete
        logs: files with the console output of the run, if it was saved

    Returns:
        Bytes packed, by name in the zip.

    Raises:
        ConfigError: `folder` is no run folder, a log does not exist, or two logs have the same name.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"bundle: RUN must be a run folder, which has a config.yaml; got {folder}")
    contents = {name: _masked(_last(folder / name)) for name in _texts(folder)}
    contents["environment-now.json"] = json.dumps(environment(), indent=1).encode()
    contents["files.txt"] = "".join(f"{size:>14,}  {name}\n" for name, size in _inventory(folder)).encode()
    for log in logs:
        name = f"logs/{log.name}"
        if not log.is_file() or name in contents:
            raise ConfigError(f"bundle: --log must name a file, each of another name; got {log}")
        contents[name] = _masked(_last(log))
    _write(file, contents)
    return {name: len(content) for name, content in contents.items()}


def _texts(folder: Path) -> Iterator[str]:
    """Text files in order, without secrets; a link is not followed out of the folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in TEXTS and not path.name.endswith(LINKS) and path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix()


def _inventory(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def _last(path: Path) -> bytes:
    """End of a file, beginning with a whole line."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - LARGEST))
        content = stream.read()
    return content if size <= LARGEST else content.partition(b"\n")[2]


def _masked(content: bytes) -> bytes:
    return _TOKEN.sub(rb"\1***", content)


def _write(file: Path, contents: Mapping[str, bytes]) -> None:
    """Write the zip so that it is either complete or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(suffix=".zip.tmp", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
