"""Makes the file of real images of diffalign.digits from scikit-learn: `python tools/digits_data.py [FILE]`.

The pictures are those of `sklearn.datasets.load_digits`, unchanged; values 0..16 fit into a byte.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign.digits.handwriting import FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    file: Path = parser.parse_args().file
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found]
    except ImportError as error:
        raise SystemExit("tools/digits_data.py reads the pictures from scikit-learn; install it: pip install scikit-learn") from error
    source = load_digits()
    pixels = torch.from_numpy(source.images).to(torch.uint8)
    labels = torch.from_numpy(source.target).to(torch.uint8)
    if not torch.equal(pixels.double(), torch.from_numpy(source.images)) or pixels.shape != (1797, 8, 8):
        raise SystemExit(f"load_digits must give 1797 pictures of 8 x 8 whole numbers; got shape {tuple(pixels.shape)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"pixels": pixels.contiguous(), "labels": labels.contiguous()}, file)
    print(f"{len(labels)} pictures -> {file} ({file.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
