"""Builds wheel and sdist into dist/, installs the wheel into an environment of its own and trains there, outside the checkout.

python book/package.py [--clean]

The environment takes the dependencies from the one that runs this, and the package from the wheel. With --clean it installs everything
from the index, as a user does: about a minute of a core, beside the downloads. torch alone has the version of the environment that runs
this, so that pip finds it in its cache where that one was installed from the same index, and the largest download is not made twice.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ("--total", "2", "--prompts_per_step", "1", "--evaluation", "null")
WHERE = "import diffalign, diffalign.core; print(diffalign.__file__)"


def build() -> Path:
    """Both archives; returns the wheel."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--directory", str(ROOT / "dist")], cwd=ROOT, check=True)
    return max((ROOT / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)


def environment(folder: Path, wheel: Path, clean: bool) -> Path:
    """A virtual environment with the wheel; returns its folder of programs."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    options = ["--no-deps"]
    if clean:
        pinned = folder / "pinned.txt"
        pinned.write_text(f"torch=={importlib.metadata.version('torch').partition('+')[0]}\n")
        options = ["--no-compile", "--constraint", str(pinned)]  # what is imported is compiled then; the rest is never looked at
    subprocess.run([python, "-m", "pip", "install", "--quiet", *options, wheel], check=True)
    if not clean:  # a line of a .pth file adds a folder and not what its own .pth files name: the checkout stays out
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="install the dependencies from the index")
    arguments = parser.parse_args()
    wheel = build()
    with tempfile.TemporaryDirectory() as temporary:
        programs = environment(Path(temporary) / "environment", wheel, arguments.clean)
        elsewhere = Path(temporary) / "elsewhere"
        elsewhere.mkdir()
        found = subprocess.run([programs / "python", "-c", WHERE], cwd=elsewhere, check=True, capture_output=True, text=True).stdout.strip()
        if not Path(found).is_relative_to(programs.parent):
            raise SystemExit(f"the wheel must be what is imported; it was {found}")
        subprocess.run([programs / "diffalign", "train", "shapeworld_tmpo", *SHORT], cwd=elsewhere, check=True)
        if not (elsewhere / "runs/shapeworld_tmpo/report.html").exists():
            raise SystemExit("the run has written no report")
    print(f"{wheel.relative_to(ROOT)}, {wheel.stat().st_size / 2**20:.1f} MiB: installed and trained outside the checkout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
