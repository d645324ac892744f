"""Collects into wheels/ what a machine with torch and transformers, but without a network, lacks to run diffalign.

python book/wheels.py [--into wheels] [--dry-run]

The target is Linux on x86-64 with Python 3.12 and a CUDA build of torch 2.11, with what comes with it (numpy too). There:
  python -m pip install --no-index --find-links wheels "diffalign[testing]"
The wheels are those of pyproject's dependencies and of what they need in turn, in the versions that are installed here, so that what runs
there is what was tested here; pip takes from them what is missing or too old. torch and numpy are never among them. More than 64 MiB are
refused.
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from package import ROOT, build
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LIMIT = 64 * 2**20
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
THERE = ("torch", "numpy")
"""On the target, with all that they need."""
MARKERS = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "platform_machine": "x86_64"}


def needed(requirements: Iterable[str], without: frozenset[str] = frozenset()) -> dict[str, str]:
    """Name -> version installed here of all that these requirements lead to on the target, except `without` and what only that leads to.

    Raises:
        importlib.metadata.PackageNotFoundError: something of it is not installed here, so its version is unknown.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in without:
            continue
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            wanted = map(Requirement, distribution.requires or ())
            waiting += [one for one in wanted if one.marker is None or one.marker.evaluate({**MARKERS, "extra": extra})]
    return found


def lacking() -> list[str]:
    """What to download, as "name==version", sorted; the package itself is built here."""
    there = frozenset(needed(THERE))
    found = needed(["diffalign[testing]"], there)
    return sorted(f"{name}=={version}" for name, version in found.items() if name != "diffalign")


def collect(folder: Path) -> int:
    """Download and build; returns the bytes of all wheels."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms, f"--dest={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *lacking()], check=True)
    shutil.copy(build(), folder)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > LIMIT:
        raise SystemExit(f"the wheels in {folder} must have {LIMIT} bytes at most; they have {size}")
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "wheels", help="wheels that lie there are deleted first (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the list and download nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        print("\n".join(lacking()))
        return 0
    size = collect(arguments.into)
    for wheel in sorted(arguments.into.glob("*.whl"), key=lambda file: -file.stat().st_size):
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    print(f"{size / 2**20:7.2f} MiB  in all, of {LIMIT / 2**20:.0f} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
