"""Pack a run folder into one zip for a bug report: configuration, environment, metrics, last log; no weights, no images."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument(
        "--log", type=Path, action="append", default=[], metavar="FILE", help="saved console output of the run; repeat for more files"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.zip", help="output file (RUN-bundle.zip in this folder)")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..runs.bundle import bundle
    from ..runs.folder import require_writable
    from .options import refuse_overrides

    refuse_overrides("bundle", "a run folder", overrides)
    folder = options.run.absolute()
    file = options.out or Path(f"{folder.name}-bundle.zip")
    require_writable(file.parent, "--out")
    for name, size in bundle(folder, file, options.log).items():
        print(f"{size:>10,}  {name}")
    print(f"{file}: read it before you send it; it holds your prompts, folders and the names of your parts")
    return 0
