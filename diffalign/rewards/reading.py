"""Readers of text in images: RapidOCR, whose wheel contains the models, and the program Tesseract."""

import importlib
import io
import shutil
import subprocess
from abc import ABC, abstractmethod
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffalign.core import RewardError

Pixels = NDArray[np.uint8]


class Reader(ABC):
    """Reads the text of an image."""

    @abstractmethod
    def read(self, pixels: Pixels) -> str:
        """Read all text of an RGB image [H, W, 3] in reading order; "" if there is none."""


@attrs.frozen(eq=False)
class RapidReader(Reader):
    """RapidOCR (PP-OCR models) on ONNX Runtime, on the CPU.

    Args:
        enlarge: pixels to which the shorter side is enlarged before text is searched

    Raises:
        ImportError: the extra `ocr` is not installed.
    """

    enlarge: int = attrs.field(default=128, validator=attrs.validators.ge(32))
    _engine: Any = attrs.field(init=False, repr=False)

    @_engine.default
    def _start(self) -> Any:
        try:
            importlib.import_module("onnxruntime")  # its engine, which its installation does not require
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(f"OCR reads with RapidOCR, which is not installed ({error}): pip install 'diffalign[ocr]'") from error
        threads = "EngineConfig.onnxruntime"
        return RapidOCR(
            params={
                "Global.log_level": "critical",
                "Det.limit_side_len": self.enlarge,  # the default 736 takes nine times as long and is not better on small images
                f"{threads}.intra_op_num_threads": torch.get_num_threads(),
                f"{threads}.inter_op_num_threads": 1,
            }
        )

    def read(self, pixels: Pixels) -> str:
        # it expects BGR, and keeps the flags of the last call, so all flags are given every time
        found = self._engine(np.ascontiguousarray(pixels[..., ::-1]), use_det=True, use_cls=False, use_rec=True)
        return " ".join(found.txts or ())


@attrs.frozen(eq=False)
class TesseractReader(Reader):
    """Tesseract: runs the program `tesseract` once per image.

    Args:
        layout: page segmentation mode; 6 is a block of text, 7 a line, 11 words anywhere
        enlarge: pixels to which the shorter side is enlarged first
        seconds: time after which a call fails

    Raises:
        ImportError: there is no such program.
    """

    layout: int = 6
    enlarge: int = attrs.field(default=128, validator=attrs.validators.ge(32))
    seconds: float = attrs.field(default=60.0, validator=attrs.validators.gt(0.0))
    _program: str = attrs.field(init=False, repr=False)

    @_program.default
    def _find(self) -> str:
        program = shutil.which("tesseract")
        if program is None:
            raise ImportError(
                "OCR with engine 'tesseract' needs the program tesseract on the PATH (Debian: apt-get install tesseract-ocr); "
                "engine 'rapidocr' needs no program."
            )
        return program

    def read(self, pixels: Pixels) -> str:
        image = Image.fromarray(pixels)
        factor = max(1.0, self.enlarge / min(image.size))
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        picture = io.BytesIO()
        image.save(picture, format="PNG")
        command = [self._program, "stdin", "stdout", "--psm", str(self.layout)]
        try:
            done = subprocess.run(command, input=picture.getvalue(), capture_output=True, timeout=self.seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise RewardError(f"tesseract did not read an image within {self.seconds:g} s") from error
        if done.returncode != 0:
            raise RewardError(f"tesseract failed with {done.returncode}: {done.stderr.decode(errors='replace').strip()[:200]}")
        return done.stdout.decode(errors="replace").strip()
